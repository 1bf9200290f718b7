"""Smaller copies of training images, and images that simplejpeg decodes and PyTorch resizes."""

import io
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pictures import rgb, save_kinds, save_tree, task
from PIL import Image

from configs.errors import UserError
from configs.schema import load
from configs.training import Augment
from finetune.data import augmentation, pixels_of
from finetune.sweep import train_sweep
from slurm.clean import removable
from store import shards
from store.rows import identity
from store.runs import RunFolder
from store.staging import staged
from tasks import resized
from tasks.image_folder import load_split
from tasks.resized import resize, smaller, with_copies
from tests.commands import python
from tests.pools import small_network

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def data(tmp_path):
    return save_tree(tmp_path / "pictures", per_class=5)


def experiment(data, *typed):
    folder = data.parent
    own = (f"task.folder={data}", "task.num_classes=4", f"paths.runs={folder / 'runs'}", "compute=cpu")
    return load("own_images", *own, "model.image_size=16", "compute.resized=24", *typed)


def copies_of(config):
    return with_copies(load_split(config.task, "train"), config.compute)


def test_a_copy_has_the_shorter_side_that_was_asked_for_and_the_pixels_of_pillow():
    for width, height in ((80, 60), (60, 80), (61, 300)):
        image = rgb(width, height)
        copy = Image.open(io.BytesIO(smaller(image, 48, 95)))
        assert min(copy.size) == 48 and abs(copy.width / copy.height - width / height) < 0.02
        expected = np.asarray(image.resize(copy.size, Image.Resampling.BICUBIC)).astype(int)
        assert abs(np.asarray(copy) - expected).mean() < 3
    assert Image.open(io.BytesIO(smaller(rgb(30, 20), 48, 90))).size == (30, 20)
    assert len(smaller(rgb(80, 60), 48, 30)) < len(smaller(rgb(80, 60), 48, 90))


def test_copies_are_in_the_order_of_the_split_in_files_of_several(data, monkeypatch):
    for module in (resized, shards):
        monkeypatch.setattr(module, "SHARD", 8)
    monkeypatch.setattr(shards, "GROUP", 3)
    config = experiment(data)
    images, copies = load_split(config.task, "train"), copies_of(config)
    folder = copies.shards.folder
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000.arrow", "00001.arrow", "00002.arrow", "index.json"]  # no lock and no half-written file
    for index in range(len(images)):
        assert copies.content(index) == smaller(images.pil(index), 24, 90)
        assert np.array_equal(np.asarray(copies.pil(index)), pixels_of(copies, index).permute(1, 2, 0))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert copies_of(config).content(3) == copies.content(3)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_copies_of_another_size_quality_or_data_are_others(data):
    settings = ((), ("compute.resized=16",), ("compute.resized_quality=50",))
    folders = {copies_of(experiment(data, *typed)).shards.folder for typed in settings}
    other = save_tree(data.parent / "others", per_class=4)
    assert len(folders | {copies_of(experiment(other)).shards.folder}) == 4


def test_a_damaged_copy_is_refused_with_what_to_delete(data):
    config = experiment(data)
    copies = copies_of(config)
    path = copies.shards.path(0)
    content, place = bytearray(path.read_bytes()), path.read_bytes().find(copies.content(2))
    content[place + 100] ^= 1
    shards._opened.cache_clear()
    path.write_bytes(content)
    copies.content(1)
    with pytest.raises(
        UserError, match=r"00000\.arrow is damaged \(.*\): delete it and .*index\.json, and run the same"
    ):
        copies.content(2)
    shards._opened.cache_clear()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"00000\.arrow is damaged"):
        copies.content(1)
    path.unlink()
    (path.parent / "index.json").unlink()
    shards._opened.cache_clear()
    assert copies_of(config).content(2) == smaller(load_split(config.task, "train").pil(2), 24, 90)


MAKE = """
import sys, time
from store import shards
from tasks import resized
from configs.schema import load
resized.SHARD = shards.SHARD = 4
shards.GROUP, made = 1, resized.smaller
def slow(*words):
    time.sleep(0.05)
    return made(*words)
resized.smaller = slow
resized.resize(load(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_that_is_killed_leaves_nothing_torn(data, tmp_path, monkeypatch):
    words = ["own_images", f"task.folder={data}", "task.num_classes=4", "compute=cpu", "compute.resized=24"]
    words += ["model.image_size=16"]

    def start(runs):
        call = [python(), "-c", MAKE, *words, f"paths.runs={tmp_path / runs}"]
        return subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    for module in (resized, shards):
        monkeypatch.setattr(module, "SHARD", 4)
    monkeypatch.setattr(shards, "GROUP", 1)
    resize(load(*words, f"paths.runs={tmp_path / 'one'}"))
    victim, other = start("two"), start("two")
    while not list((tmp_path / "two").rglob("*.arrow")) and victim.poll() is None:
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    assert other.wait(120) == 0, other.stdout.read()
    assert "20 copies in" in other.stdout.read()
    made = {path.name: path.read_bytes() for path in (tmp_path / "one").rglob("*.arrow")}
    assert len(made) == 5
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").rglob("[0-9]*.arrow")} == made


@pytest.mark.parametrize("shape", [(90, 120), (333, 500), (40, 30)])
@pytest.mark.parametrize("kind", ["minimal", "medium", "rand"])
def test_pixels_are_cropped_and_resized_as_pillow_does_it(kind, shape):
    image = rgb(*shape)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    augment = Augment(kind=kind, crop=0.3, flip=0.5, color_jitter=0.4 if kind == "medium" else 0)  # no operations
    levels = 4 if kind == "medium" else 1  # several roundings
    for draw in range(5):
        both = []
        for given, from_pixels in ((image, False), (pixels, True)):
            random.seed(draw)
            torch.manual_seed(draw)
            both.append(torch.as_tensor(augmentation(augment, 32, from_pixels=from_pixels)(given)).int())
        assert both[0].shape == both[1].shape == (3, 32, 32)
        assert (both[0] - both[1]).abs().max() <= levels


def test_a_zone_plate_is_antialiased():
    """Rings too fine for the output become grey, as by Pillow; without antialiasing they would become other rings."""
    y, x = np.mgrid[-1:1:400j, -1:1:400j]
    rings = (127.5 + 127.5 * np.cos(400 * np.pi * (x**2 + y**2) / 4)).astype(np.uint8)
    pixels = torch.from_numpy(np.stack([rings] * 3))
    whole = augmentation(Augment(kind="minimal", crop=1.0), 50, from_pixels=True)(pixels)
    plain = torch.nn.functional.interpolate(pixels[None].float(), 50, mode="bicubic")[0, 0]
    # Along the edges a ring has 2 to 4 pixels of the 400, which is less than one of the output's 50.
    assert whole[0, :5].float().std() < 8 and plain[:5].std() > 20


def test_every_kind_of_image_has_the_pixels_that_pillow_gives(tmp_path):
    save_kinds(tmp_path / "train/a")
    save_kinds(tmp_path / "train/b")
    images = load_split(task(tmp_path, num_classes=2), "train")
    names = [images.stored.path(index).name for index in range(len(images))]
    for index, name in enumerate(names):
        expected = torch.from_numpy(np.array(images.pil(index))).permute(2, 0, 1)
        difference = (pixels_of(images.stored, index).int() - expected.int()).abs().max()
        assert difference <= (2 if "cmyk" in name else 0), name
    broken = images.stored.path(names.index("plain.jpg"))
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"plain\.jpg cannot be decoded"):
        pixels_of(images.stored, names.index("plain.jpg"))


@pytest.mark.slow
def test_rows_are_trained_on_copies_and_by_simplejpeg_and_are_other_rows(data, tmp_path):
    small = [*small_network(tmp_path), "model.image_size=24", "task.held_out_per_class=1", "model.probe_c=[1]"]
    small += ["sweep.rows=1", "~sweep.draw.optim.epochs", "optim.epochs=1", "optim.batch_size=8"]
    small += ["cluster=local", "cluster.workers=1"]
    starts, rows, weights = set(), set(), set()
    for name, typed in (("originals", "resized=null"), ("copies", "resized=24"), ("fast", "decoder=simplejpeg")):
        config = experiment(data, *small, f"name={name}", "compute.resized=null", f"compute.{typed}")
        train_sweep(config)
        starts.add(identity(config, 0))
        rows.add(identity(config, 1))
        weights.add((RunFolder.of(config).ingredient(1) / "weights.safetensors").read_bytes())
    assert (len(starts), len(rows), len(weights)) == (1, 3, 3)


def test_copies_are_staged_as_few_files_and_cleaned_away(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "node"))
    with pytest.raises(UserError, match=r"type compute\.resized=256"):
        resize(load("table3_clip_b32"))
    config = experiment(data, f"cluster.stage={tmp_path / 'runs/resized'}")
    config.compute.resized_to.mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no finished copies: python -m tasks\.resized makes them"):
        staged(config)
    resize(config)
    there = staged(config)
    assert there.task == config.task and there.compute.resized_to.is_relative_to(tmp_path / "node")
    assert copies_of(there).shards.folder.is_relative_to(tmp_path / "node")
    assert copies_of(there).content(3) == copies_of(config).content(3)
    assert identity(there, 1) == identity(config, 1)
    assert removable(config)["resized"] == [config.compute.resized_to]


def test_arrow_keeps_each_image_by_itself(data):
    """So that a crop reads the pages of one copy, whatever else is in the file."""
    copies = copies_of(experiment(data))
    allocated = pa.total_allocated_bytes()
    copies.content(0)
    assert pa.total_allocated_bytes() - allocated < 100_000
