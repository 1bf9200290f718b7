"""Folders of images are read as torchvision reads them, and say what is wrong with them."""

import multiprocessing
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from pictures import CLASSES, rgb, save_kinds, save_tree, task
from PIL import Image
from pydantic import ValidationError
from torchvision.datasets import ImageFolder

from configs.errors import UserError
from configs.schema import load
from models.classifier import pretrained
from tasks import files as data_files
from tasks.files import Files, packed
from tasks.image_folder import load_split
from tasks.load import class_names
from tasks.load import load_split as load_task_split
from tasks.split import ImageSplit

SPLITS = ("train", "test")


def files(split):
    return [str(split.stored.path(i).relative_to(split.stored.root)) for i in range(len(split))]


@pytest.fixture
def tree(tmp_path):
    return save_tree(tmp_path / "data")


def test_images_of_every_kind_are_those_of_torchvision_in_its_order(tree):
    save_kinds(tree / "train/a b")
    save_kinds(tree / "train/a b/deep")
    save_kinds(tree / "train/a b/deep-er")
    save_kinds(tree / "train/a b/deep/est")
    (tree / "linked").mkdir()
    rgb(9, 8).save(tree / "linked/x.jpg")
    (tree / "train/Öl/link").symlink_to(tree / "linked")
    (tree / "train/Öl/alone.jpg").symlink_to(tree / "linked/x.jpg")
    (tree / "train/readme.txt").write_text("no class")
    split, theirs = load_split(task(tree), "train"), ImageFolder(str(tree / "train"))
    seen = [i for i, (file, _) in enumerate(theirs.samples) if "/." not in file]  # theirs reads hidden files too
    ours = [(str(split.stored.path(i)), label) for i, label in enumerate(split.labels.tolist())]
    assert ours == [theirs.samples[i] for i in seen]
    assert len(split) == len(theirs) - 4 == 12 + 4 * 8 + 2
    for i, their in enumerate(seen):
        assert split.pil(i).mode == "RGB"
        assert np.array_equal(np.asarray(split.pil(i)), np.asarray(theirs[their][0])), split.stored.path(i)


def test_hidden_names_and_a_macs_leftovers_are_no_classes_and_no_images(tree):
    def found():
        splits = [load_split(task(tree), name) for name in SPLITS]
        return [(files(split), split.digest) for split in splits]

    before = found()
    for name in SPLITS:
        for junk in (".ipynb_checkpoints", "__MACOSX", "a b/.thumbnails", "a b/__MACOSX/deep"):
            (tree / name / junk).mkdir(parents=True)
            rgb(9, 8).save(tree / name / junk / "x.jpg")
        (tree / name / "a b/._0.jpg").write_bytes(b"a fork of resources")
    assert found() == before
    assert class_names(task(tree)) == tuple(re.sub("[_-]", " ", name) for name in sorted({"a b", "n-o_t", "Öl", "ß"}))


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    for name in SPLITS:
        for number in range(11):
            (tmp_path / name / str(number)).mkdir(parents=True)
            rgb(9, 8).save(tmp_path / name / str(number) / "x.png")
    config = task(tmp_path, num_classes=11)
    assert class_names(config) == tuple(map(str, range(11)))
    assert files(load_split(config, "test")) == [f"{number}/x.png" for number in range(11)]


def test_wordnet_ids_are_no_words_to_a_zero_shot_head():
    with pytest.raises(UserError, match=r"called n01440764, .*task\.names=imagenet"):
        pretrained(load("demo").model, ("n01440764", "n01443537"))


def test_pixels_of_more_than_8_bits_are_refused_and_not_turned_to_white(tree):
    path = tree / "train/a b/deep.png"
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(path)
    split = load_split(task(tree), "train")
    with pytest.raises(UserError, match=r"deep.png cannot be decoded \(its pixels have more than 8 bits"):
        split.pil(next(i for i, name in enumerate(files(split)) if "deep" in name))


def test_labels_follow_the_training_folder_whatever_a_split_is_called(tree):
    (tree / "test").rename(tree / "val")
    split = load_split(task(tree, folders={"test": "val"}), "test")
    assert split.labels.dtype == torch.int64
    assert split.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [Path(split.stored.called(row)).parts[1] for row in (0, 3, 6, 9)] == ["a b", "n-o_t", "Öl", "ß"]


@pytest.mark.parametrize("kept", [slice(0, 900), slice(0, 40), slice(0, 0), slice(-40, None)], ids=str)
def test_a_file_that_cannot_be_decoded_is_named(tree, kept):
    for name in ("broken.jpg", "broken.png"):
        path = tree / "train/a b" / name
        rgb(200, 200).save(path)
        path.write_bytes(path.read_bytes()[kept])
    split = load_split(task(tree), "train")
    broken = [i for i, name in enumerate(files(split)) if "broken" in name]
    assert len(broken) == 2
    for i in broken:
        with pytest.raises(UserError, match=r"broken.(jpg|png) cannot be decoded \("):
            split.pil(i)


def emptied(tree):
    for path in (tree / "test/n-o_t").iterdir():
        path.rename(path.with_suffix(".txt"))


@pytest.mark.parametrize(
    ("spoil", "classes", "words"),
    [
        (lambda tree: None, 5, "task.num_classes=5, but .*train has 4 class folders"),
        (lambda tree: shutil.rmtree(tree / "train"), 4, "train: No such file.*the classes of every split are those of"),
        (lambda tree: shutil.rmtree(tree / "test"), 4, "test: No such file or directory; set task.folder"),
        (lambda tree: shutil.rmtree(tree / "test/Öl"), 4, "test: class folder 'Öl' is missing"),
        (lambda tree: (tree / "test/zebra").mkdir(), 4, "test: class folder 'zebra' is unknown"),
        (emptied, 4, "test: class 'n-o_t' has no image"),
        (lambda tree: (tree / "test/Öl/gone.jpg").symlink_to(tree / "no.jpg"), 4, "Öl: .*gone.jpg: No such file"),
    ],
)
def test_folders_that_do_not_fit_are_named(tree, spoil, classes, words):
    spoil(tree)
    with pytest.raises(UserError, match=words):
        load_split(task(tree, num_classes=classes), "test")


def test_a_file_name_that_is_not_utf_8_is_named(tree):
    shutil.copy(os.fsencode(tree / "train/a b/0.jpg"), os.fsencode(tree / "train/a b") + b"/\xff.jpg")
    with pytest.raises(UserError, match=r"file name '\\udcff.jpg' is not UTF-8"):
        load_split(task(tree), "train")


def test_a_task_without_a_held_out_folder_is_told_how_to_take_one(tmp_path):
    with pytest.raises(UserError, match=r"held_out: No such file .* task\.held_out_per_class=20 takes some of train's"):
        load_split(task(save_tree(tmp_path / "tree", splits=("train",))), "held_out")


def held_out_files(root, n):
    settings = task(root, held_out_per_class=n)
    train, held_out = (set(files(load_split(settings, name))) for name in ("train", "held_out"))
    assert train.isdisjoint(held_out)
    return train, held_out


def test_held_out_is_so_many_of_each_class_and_train_the_rest(tmp_path):
    tree = save_tree(tmp_path, per_class=9)
    train, held_out = held_out_files(tree, 4)
    assert train | held_out == set(files(load_split(task(tree), "train")))
    assert [sum(name.startswith(c.split("/")[0]) for name in held_out) for c in CLASSES] == [4, 4, 4, 4]
    assert held_out_files(tree, 3)[1] < held_out
    numbers = {Path(name).stem for name in held_out if not name.startswith("ß")}
    assert len(numbers) > 4, "the draw of a class must not be that of every other"


def test_a_file_more_moves_no_other_class_and_at_most_one_of_its_own(tmp_path):
    before = held_out_files(save_tree(tmp_path / "one", per_class=9), 4)[1]
    other = save_tree(tmp_path / "other", per_class=9)
    for number in range(20):
        rgb(5, 5).save(other / f"train/Öl/{number + 100}.png")
    after = held_out_files(other, 4)[1]
    assert {name for name in before if not name.startswith("Öl")} == {n for n in after if not n.startswith("Öl")}
    stayed = {name for name in after if name.endswith("jpg")}
    assert stayed < before, "a class that grew may give places to new files, never to old ones"


def test_the_authors_file_says_what_is_held_out(tree):
    index = tree / "index.npy"
    marks = np.tile([0.0, 1.0, 0.0], 4)
    np.save(index, marks)
    settings = task(tree, held_out_index=index)
    assert [Path(name).name for name in files(load_split(settings, "held_out"))] == ["1.jpg"] * 4
    assert [Path(name).name for name in files(load_split(settings, "train"))] == ["0.jpg", "2.jpg"] * 4
    assert len(load_split(settings, "test")) == 12


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        (np.zeros(11), r"has shape \(11,\), but .*train has 12 images"),
        (np.full(12, 0.5), "other values than 0"),
        (np.repeat([0.0, 1.0, 0.0, 0.0], 3), "leaves no image of class 'n-o_t' to train"),
        (np.array([{"code": 1}] * 12), "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_an_index_that_does_not_fit_and_a_draw_of_all_images_are_refused(tree, marks, words):
    np.save(tree / "index.npy", marks)
    with pytest.raises(UserError, match=words):
        load_split(task(tree, held_out_index=tree / "index.npy"), "train")
    with pytest.raises(UserError, match=r"task\.held_out_per_class=3 leaves none of the 3 images of class 'a b'"):
        load_split(task(tree, held_out_per_class=3), "held_out")


@pytest.mark.parametrize("other", [{"held_out_index": Path("a.npy")}, {"folders": {"held_out": "other"}}])
def test_held_out_has_one_rule(other):
    with pytest.raises(ValidationError, match="exclude each other"):
        task(Path("x"), held_out_per_class=1, **other)


def test_a_digest_names_the_files_and_not_the_machine(tmp_path):
    one, two = save_tree(tmp_path / "one"), save_tree(tmp_path / "elsewhere")
    digests = {load_split(task(root), split).digest for root in (one, two) for split in ("train", "test")}
    assert len(digests) == 2
    settings = task(one, held_out_per_class=1)
    digests |= {load_split(settings, name).digest for name in ("train", "held_out")}
    digests.add(load_split(task(one, folders={"test": "train"}), "test").digest)  # the same images in another role
    assert len(digests) == 5
    (two / "test/a b/1.jpg").rename(two / "test/a b/1b.jpg")
    (two / "train/a b/1.jpg").write_bytes(b"another size")
    three = shutil.copytree(two, tmp_path / "three")
    assert digests.isdisjoint({load_split(task(three), "test").digest, load_split(task(three), "train").digest})


def test_a_digest_tells_splits_of_the_same_names_and_sizes_apart_by_their_content(tmp_path, monkeypatch):
    settings = task(tmp_path, num_classes=2, shifts=("night", "snow"))
    for split, value in (("train", 10), ("night", 40), ("snow", 200)):
        for c in ("cat", "dog"):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(30):
                Image.new("RGB", (8, 8), (value + i,) * 3).save(tmp_path / split / c / f"{i:02d}.bmp")
    night = load_split(settings, "night").digest
    assert night != load_split(settings, "snow").digest
    same = Path(shutil.copytree(tmp_path / "night", tmp_path / "snow", dirs_exist_ok=True))
    assert night != load_split(settings, "snow").digest  # equal content under another split's name

    def edited():
        (same / "cat/07.bmp").write_bytes((same / "dog/11.bmp").read_bytes())
        return load_split(settings, "snow").digest

    assert load_split(settings, "snow").digest != edited()  # one file of the same size
    # Of a large set some files are read, and only their ends: a keyed choice, so the same in each process.
    monkeypatch.setattr(data_files, "MANY", 5)
    monkeypatch.setattr(data_files, "SAMPLE", 20)
    read = []
    monkeypatch.setattr("tasks.files.read_file", lambda path, last: read.append((path.name, last)) or b"")
    assert load_split(settings, "snow").digest == load_split(settings, "snow").digest
    assert 10 < len(read) // 2 <= 20
    assert sorted(read[: len(read) // 2]) == sorted(read[len(read) // 2 :])
    assert {last for _, last in read} == {data_files.PIECE}


def test_class_names_are_those_of_folders_of_a_file_or_of_imagenet(tree):
    assert class_names(task(tree)) == ("a b", "n o t", "Öl", "ß")
    names, named = tree / "names.txt", task(tree, names=str(tree / "names.txt"))
    names.write_text("one\ntwo words\nthree\nfour\n")
    assert class_names(named) == ("one", "two words", "three", "four")
    for text, words in (("one\ntwo\n", "has 2 names for 4"), ("one\n\ntwo\nthree\n", "has 3 names for 4 classes")):
        names.write_text(text)
        with pytest.raises(UserError, match=words):
            class_names(named)
    with pytest.raises(UserError, match="neither folder, imagenet, nor a readable file"):
        class_names(task(tree, names="folders"))
    for i in range(1000):
        (tree / f"wnids/n{i:08d}").mkdir(parents=True)
    imagenet = task(tree, names="imagenet", num_classes=1000, folders={"train": "wnids"})
    assert class_names(imagenet) == tuple(IMAGENET_CLASSNAMES)
    (tree / "wnids/n00000003").rename(tree / "wnids/three")
    with pytest.raises(UserError, match="needs 1,000 class folders such as n01440764, but there is 'three'"):
        class_names(imagenet)


def test_some_classes_of_a_folder_keep_their_files_and_names(tree):
    whole, odd = load_task_split(task(tree), "train"), task(tree, parts=2, part=1)
    split = load_task_split(odd, "train")
    assert class_names(odd) == ("n o t", "ß")
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert files(split) == [f"n-o_t/{i}.jpg" for i in range(3)] + [f"ß/inner/{i}.jpg" for i in range(3)]
    assert np.array_equal(np.asarray(split.pil(4)), np.asarray(whole.pil(10)))
    others = [load_task_split(each, "train") for each in (task(tree, classes=2), task(tree, parts=2))]
    assert len({each.digest for each in (whole, split, *others)}) == 4


def test_the_parts_of_a_task_in_memory_deal_out_its_classes():
    whole = load("demo").task
    names, test = class_names(whole), load_task_split(whole, "test")
    parts = [load("demo", "task.parts=3", f"task.part={part}").task for part in range(3)]
    splits = [load_task_split(part, "test") for part in parts]
    assert sum(map(len, splits)) == len(test)
    assert len({split.digest for split in [*splits, test]}) == 4
    for i, (part, split) in enumerate(zip(parts, splits, strict=True)):
        assert class_names(part) == names[i::3]
        assert len(class_names(part)) == part.size
        rows = (test.labels % 3 == i).nonzero().flatten()
        assert torch.equal(split.labels, test.labels[rows] // 3)
        assert torch.equal(split.images, test.images[rows])
    few = load("demo", "task.parts=3", "task.part=1", "task.classes=5").task
    assert class_names(few) == names[1:16:3]
    assert load_task_split(few, "test").labels.max() == 4
    with pytest.raises(UserError, match=r"task.num_classes=619, but .* has 620 classes"):
        class_names(load("demo", "task.num_classes=619").task)


def test_a_big_split_is_cheap_to_send_to_another_process():
    n = 200_000
    names = packed([f"n{i // 200:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(n)])
    listed = Files(Path("/data/train"), names, np.zeros(n, np.int64))
    split = ImageSplit("train", listed, torch.arange(n) // 200, "0" * 32)
    assert len(pickle.dumps(split)) < 20e6
    with multiprocessing.get_context("spawn").Pool(1) as other:
        first, last = other.map(split.stored.path, [0, n - 1])
    assert first == Path("/data/train/n00000000/n00000000_0.JPEG")
    assert last == Path(f"/data/train/n00000999/n00000999_{n - 1}.JPEG")
