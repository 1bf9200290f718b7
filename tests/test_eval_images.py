"""Fixed transforms are CLIP's, and images that were decoded once are the images."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from pictures import rgb, save_kinds, save_tree, task

from configs.errors import UserError
from configs.schema import load
from store.shards import SHARD, Shards, _opened
from tasks.eval_images import EvalTransform, eval_batches, eval_transform
from tasks.image_folder import load_split
from tasks.prefetch import prefetch
from tasks.split import ImageSplit, Pixels
from tests.commands import python

ROOT = Path(__file__).resolve().parents[1]
SMALL = EvalTransform(size=16, resize=18, squash=False)
SIZES = [(16, 16), (37, 23), (23, 37), (101, 20), (7, 5), (18, 500), (17, 33)]


def plain(size, mode):
    """open_clip's own preprocessing, its normalisation made to do nothing."""
    return image_transform(size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode)


@pytest.mark.parametrize("size", [16, 19])
@pytest.mark.parametrize(("squash", "mode"), [(False, "shortest"), (True, "squash")])
def test_images_are_those_of_open_clip_before_its_normalisation(size, squash, mode):
    ours, theirs = EvalTransform(size, size, squash), plain(size, mode)
    for seed, (width, height) in enumerate(SIZES):
        image = rgb(width, height, seed)
        assert ours(image).dtype == torch.uint8
        assert torch.equal(ours(image) / 255, theirs(image)), (width, height)


@pytest.mark.parametrize("squash", [False, True])
def test_a_larger_resize_is_cropped_in_its_middle(squash):
    image, sides = rgb(90, 60), (20, 20) if squash else (30, 20)
    resized = np.asarray(image.resize(sides, 3)).transpose(2, 0, 1)  # 3 is bicubic
    left = (sides[0] - 16) // 2
    expected = resized[:, 2:18, left : left + 16]
    assert np.array_equal(EvalTransform(16, 20, squash)(image).numpy(), expected)


def test_a_model_says_what_it_sees():
    model = load("demo").model
    assert eval_transform(model) == EvalTransform(64, 64, False)
    other = load("demo", "model.eval_size=48", "model.eval_resize=56", "model.squash=true").model
    assert eval_transform(other) == EvalTransform(48, 56, True)
    assert len({eval_transform(m).key for m in (model, other)} | {EvalTransform(48, 56, False).key}) == 3
    with pytest.raises(UserError, match=r"model\.eval_resize=30 is smaller than the 64 pixels"):
        eval_transform(load("demo", "model.eval_resize=30").model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = save_tree(tmp_path_factory.mktemp("images"), per_class=5)
    save_kinds(root / "train/a b")
    return load_split(task(root), "train")


@pytest.fixture(scope="module")
def one_by_one(folder):
    return torch.stack([SMALL(folder.pil(i)) for i in range(len(folder))])


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("way", [{"batch": 1}, {"batch": 7}, {"batch": 100}, {"batch": 7, "workers": 2}], ids=str)
def test_batches_depend_on_nothing_but_the_images(folder, one_by_one, tmp_path, cached, way):
    way = way | {"decoded": tmp_path if cached else None}
    for _ in range(1 + cached):
        batches = list(eval_batches(folder, SMALL, **way))
        assert torch.equal(torch.cat(batches), one_by_one)
        assert [len(b) for b in batches] == [len(part) for part in one_by_one.split(way["batch"])]
    rows = torch.tensor([20, 3, 3, 0, 27])
    assert torch.equal(torch.cat(list(eval_batches(folder, SMALL, rows=rows, **way))), one_by_one[rows])
    assert list(eval_batches(folder, SMALL, rows=rows[:0], **way)) == []


def in_memory(n, height, width):
    images = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(0))
    pixels, labels = Pixels(images.to(torch.uint8)), torch.zeros(n, dtype=torch.int64)
    return ImageSplit("test", pixels, labels, f"{n} x {height} x {width}")


def all_of(split, transform, batch=4, **more):
    """The images that an evaluation sees."""
    return torch.cat(list(eval_batches(split, transform, batch=batch, **more)))


def test_images_in_memory_of_the_right_size_are_given_as_they_are(tmp_path):
    split = in_memory(9, 16, 16)
    same = EvalTransform(16, 16, False)
    assert torch.equal(all_of(split, same, decoded=tmp_path), split.images)
    assert not list(tmp_path.iterdir())
    for transform in (same, SMALL):
        assert torch.equal(all_of(split, transform), torch.stack([transform(split.pil(i)) for i in range(9)]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_clear_line_whoever_decodes_it(tmp_path, workers):
    root = save_tree(tmp_path / "data")
    path = root / "train/Öl/1.jpg"
    path.write_bytes(path.read_bytes()[:300])
    split = load_split(task(root), "train")
    for decoded in (None, tmp_path / "decoded"):
        with pytest.raises(UserError, match=r"Öl/1.jpg cannot be decoded") as error:
            list(eval_batches(split, SMALL, batch=4, workers=workers, decoded=decoded))
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "decoded").rglob("*.arrow"))


@pytest.mark.slow
def test_decoding_elsewhere_leaves_the_callers_chance_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(prefetch(abs, folder.labels, workers=1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_only_needed_shards_are_made_and_each_only_once(tmp_path):
    split = in_memory(2 * SHARD + 5, 3, 4)
    rows = torch.tensor([2 * SHARD + 4, 1])
    tiny = EvalTransform(4, 4, False)
    given = all_of(split, tiny, batch=2, rows=rows, decoded=tmp_path)
    assert torch.equal(given, torch.stack([tiny(split.pil(i)) for i in rows.tolist()]))
    made = {path.name: path.stat() for path in tmp_path.rglob("*.arrow")}
    assert sorted(made) == ["00000.arrow", "00002.arrow"]
    assert torch.equal(all_of(split, tiny, batch=999, decoded=tmp_path), all_of(split, tiny, batch=999))
    now = {path.name: path.stat() for path in tmp_path.rglob("*.arrow")}
    assert len(now) == 3
    assert all(now[name].st_ino == made[name].st_ino for name in made)


def test_other_images_and_other_transforms_have_other_shards(tmp_path):
    for split in (in_memory(3, 5, 5), in_memory(3, 5, 6)):
        for transform in (EvalTransform(4, 4, False), EvalTransform(4, 5, False), EvalTransform(4, 5, True)):
            assert torch.equal(all_of(split, transform, decoded=tmp_path), all_of(split, transform))
    assert len(list(tmp_path.iterdir())) == 6


ONE = SMALL(in_memory(9, 3, 4).pil(1)).numpy().tobytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(bytes([byte ^ 1 for byte in path.read_bytes()])),
        lambda path: path.write_bytes(path.read_bytes().replace(ONE, ONE[::-1])),  # whole, with other pixels
    ],
)
def test_a_damaged_shard_is_decoded_anew_with_a_word(tmp_path, capsys, damage):
    split = in_memory(9, 3, 4)
    right = all_of(split, SMALL, decoded=tmp_path)
    (path,) = tmp_path.rglob("*.arrow")
    damage(path)
    _opened.cache_clear()  # as in another process
    capsys.readouterr()
    assert torch.equal(all_of(split, SMALL, decoded=tmp_path), right)
    assert re.search(r"images .*/00000.arrow are damaged \(.*\): decoding them anew\n$", capsys.readouterr().out)
    assert torch.equal(all_of(split, SMALL, decoded=tmp_path), right)
    assert capsys.readouterr().out == ""


def test_a_half_written_shard_of_a_dead_process_goes(tmp_path):
    (tmp_path / ".00000.1.ab.tmp.arrow").write_bytes(b"half")
    (tmp_path / ".00001.1.ab.tmp.arrow").write_bytes(b"half")  # which somebody may be writing
    Shards(tmp_path, n=1).write(0, lambda row: b"whole", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".00001.1.ab.tmp.arrow", "00000.arrow"]


SHARDS = 4
BUILD = """
import sys
from pathlib import Path
from test_eval_images import SHARD, SHARDS, SMALL, all_of, in_memory
all_of(in_memory(SHARDS * SHARD, 5, 4), SMALL, batch=64, decoded=Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_two_builds_at_once_do_no_harm(tmp_path):
    call, paths = [python(), "-c", BUILD, str(tmp_path)], {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    processes = [subprocess.Popen(call, env=os.environ | paths) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    split = in_memory(SHARDS * SHARD, 5, 4)
    assert torch.equal(all_of(split, SMALL, batch=1000, decoded=tmp_path), all_of(split, SMALL, batch=1000))
    assert len(list(tmp_path.glob("*/*"))) == SHARDS
