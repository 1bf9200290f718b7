"""Data sets are read from the files in which they are distributed, and say what is wrong with them."""

import dataclasses
import multiprocessing
import re
import shutil
import subprocess
from pathlib import Path

import datasets
import miniatures
import numpy as np
import pytest
import torch
from miniatures import cifar_images
from PIL import Image

from configs.errors import UserError
from tasks.check import check
from tasks.load import class_names, load_split
from tests.commands import here, python

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("cifar10", "cifar100", "dtd", "food101", "sun397", "cars", "fmow", "iwildcam", "parquet")
SAVED = {name: getattr(miniatures, f"save_{name}") for name in KINDS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tables that `datasets` makes of parquet files stay in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved(tmp_path):
    """Saves a miniature data set and returns its task and folder."""
    return lambda kind: (SAVED[kind](tmp_path / "data"), tmp_path / "data")


def splits(task):
    """Each split as {file within the data: label}."""
    found = {}
    for name in (task.train, task.held_out, *task.reported):
        split = load_split(task, name)
        files = [str(split.stored.path(row).relative_to(split.stored.root)) for row in range(len(split))]
        found[name] = dict(zip(files, split.labels.tolist(), strict=True))
    return found


def files(pattern, *names):
    """{file: label} for the names of classes in their order, and one file or more of each."""
    return {pattern.format(name, i): label for label, name in enumerate(names[0]) for i in names[1:] or [0]}


# class names; each split, where "both" is train and held-out together, which has one of each class; groups
TEXTURES, FOODS = ("banded", "zig_zagged"), ("apple_pie", "beef_tartare")
PLACES = ("a/abbey", "a/apse/indoor", "b/bus_depot/outdoor")
LISTED = {
    "dtd": (
        ("banded", "zig zagged"),
        {name: files("{0}/{0}_{1}.jpg", TEXTURES, i) for i, name in enumerate(["train", "held_out", "test"])},
    ),
    "food101": (  # called as its own file says
        ("Apple pie", "Beef tartare"),
        {"both": files("{}/{}.jpg", FOODS, 10, 11, 12), "test": files("{}/{}.jpg", FOODS, 20)},
    ),
    "sun397": (  # in the order of its list, names without the letter
        ("abbey", "apse indoor", "bus depot outdoor"),
        {"both": files("{}/sun_{}.jpg", PLACES, "a", "b", "c"), "test": files("{}/sun_{}.jpg", PLACES, "d")},
    ),
    "cars": (  # whose classes count from one
        ("AM General Hummer SUV 2000", "Acura RL Sedan 2012"),
        {"both": {"00001.jpg": 1, "00002.jpg": 0, "00003.jpg": 1, "00004.jpg": 0}, "test": {"00001.jpg": 0}},
    ),
    "fmow": (  # rows of seq and those of train from 2013 on are of no split; val of 2013 to 2015 is not held-out
        ("airport hangar", "zoo"),
        {"train": {"rgb_img_0.png": 1, "rgb_img_9.png": 0}, "held_out": {"rgb_img_3.png": 1}}
        | {"test": {"rgb_img_5.png": 0}, "ood": {"rgb_img_6.png": 0, "rgb_img_7.png": 1, "rgb_img_8.png": 1}},
    ),
    "iwildcam": (
        ("empty", "tayassu pecari"),
        {"train": {"a.jpg": 1, "f.jpg": 0}, "held_out": {"b.jpg": 0}}
        | {"test": {"c.jpg": 1}, "ood": {"e.jpg": 1, "g.jpg": 0}},
    ),
}


@pytest.mark.parametrize("kind", LISTED)
def test_images_that_files_list_have_their_classes_labels_and_splits(saved, kind):
    (task, _), (names, expected) = saved(kind), LISTED[kind]
    assert class_names(task) == names
    found = splits(task)
    if "both" in expected:
        train, held_out = found.pop("train"), found.pop("held_out")
        assert sorted(held_out.values()) == list(range(len(names)))
        assert train.keys().isdisjoint(held_out)
        found["both"] = train | held_out
    assert found == expected


def test_satellite_images_are_split_by_year_and_grouped_by_region(saved):
    task, folder = saved("fmow")
    ood = load_split(task, "ood")
    assert [ood.stored.path(row).name for row in range(len(ood))] == [f"rgb_img_{i}.png" for i in (6, 7, 8)]
    assert (ood.group_names, ood.groups.tolist()) == (("Asia", "Europe"), [1, -1, 0]), "no region: in no group"
    zoos = load_split(dataclasses.replace(task, parts=2, part=1), "ood")
    assert [zoos.stored.path(row).name for row in range(len(zoos))] == ["rgb_img_7.png", "rgb_img_8.png"]
    assert (zoos.labels.tolist(), zoos.groups.tolist()) == ([0, 0], [-1, 0])
    assert class_names(dataclasses.replace(task, parts=2, part=1)) == ("zoo",)
    between = miniatures.settings("fmow", folder, 2, **(miniatures.WILDS | {"shifts": ("val",)}))
    assert splits(between)["val"] == {"rgb_img_4.png": 1}
    with pytest.raises(UserError, match="FMoW has the splits train, id_val, id_test, val, test, not 'summer'"):
        load_split(miniatures.settings("fmow", folder, 2, shifts=("summer",)), "summer")


def test_cifar10_is_whole_in_memory_with_its_new_test_set(saved):
    task, _ = saved("cifar10")
    assert class_names(task) == ("airplane", "automobile")
    train, held_out, test, new = (load_split(task, name) for name in ("train", "held_out", "test", "new"))
    assert (held_out.labels.bincount().tolist(), train.labels.bincount().tolist()) == ([2, 2], [8, 8])
    every = np.concatenate([cifar_images(4, seed) for seed in range(5)])
    seen = {image.numpy().tobytes() for split in (train, held_out) for image in split.images}
    assert seen == {image.tobytes() for image in every}
    assert torch.equal(test.images, torch.from_numpy(cifar_images(4, 5)))
    assert torch.equal(new.images, torch.from_numpy(cifar_images(3, 9)))
    assert (test.labels.tolist(), new.labels.tolist()) == ([0, 1, 1, 0], [1, 0, 1])
    assert np.array_equal(np.asarray(new.pil(1)), cifar_images(3, 9)[1].transpose(1, 2, 0))
    assert len({split.digest for split in (train, held_out, test, new)}) == 4


def test_cifar100_has_its_fine_labels(saved):
    task, _ = saved("cifar100")
    assert class_names(task) == ("apple", "aquarium fish")
    test = load_split(task, "test")
    assert test.labels.tolist() == [1, 0, 1, 0]
    assert torch.equal(test.images, torch.from_numpy(cifar_images(4, 1)))
    assert len(load_split(task, "train")) == len(load_split(task, "held_out")) == 2


def test_images_in_parquet_are_decoded_when_they_are_asked_for(saved, tmp_path):
    task, _ = saved("parquet")
    assert class_names(task) == ("red fox", "hare")
    test, train, held_out = (load_split(task, name) for name in ("test", "train", "held_out"))
    assert test.labels.tolist() == [1]
    assert sorted(held_out.labels.tolist()) == sorted(train.labels.tolist()) == [0, 1]
    assert sorted([*train.stored.rows, *held_out.stored.rows]) == [0, 1, 2, 3]
    (tmp_path / "own.jpg").write_bytes(miniatures.encoded(int(held_out.stored.rows[1])))
    assert np.array_equal(np.asarray(held_out.pil(1)), np.asarray(Image.open(tmp_path / "own.jpg")))
    with multiprocessing.get_context("spawn").Pool(1) as other:  # as a loader's process decodes it
        assert np.array_equal(np.asarray(other.apply(held_out.pil, (1,))), np.asarray(held_out.pil(1)))
    assert len({split.digest for split in (test, train, held_out)}) == 3
    hares = load_split(dataclasses.replace(task, held_out_per_class=None, parts=2, part=1), "train")
    assert (hares.stored.rows.tolist(), hares.labels.tolist()) == ([1, 2], [0, 0])
    with pytest.raises(UserError, match=r"has the columns img, fine: .*task.label=label"):
        load_split(dataclasses.replace(task, label="label"), "train")


CARD = """---
dataset_info:
  features:
  - {name: img, dtype: image}
  - name: fine
    dtype: {class_label: {names: {'0': red_fox, '1': hare}}}
  splits:
  - {name: train, num_bytes: 400, num_examples: 4}
  - {name: validation, num_bytes: 400, num_examples: 1}
  download_size: 1000
  dataset_size: 800
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
---
"""


def test_parquet_of_two_folders_of_one_name_and_card_is_not_mixed_up(tmp_path):
    folders = [SAVED["parquet"](tmp_path / place / "set").folder for place in "ab"]
    other = datasets.Dataset.from_dict({"img": [{"bytes": miniatures.encoded(9), "path": None}], "fine": [0]})
    other = other.cast_column("img", datasets.Image()).cast_column("fine", datasets.ClassLabel(names=["fox", "hare"]))
    other.to_parquet(folders[1] / "data/validation-00000-of-00001.parquet")
    found = []
    for folder in folders:
        (folder / "README.md").write_text(CARD)
        for junk in ("._validation-1", ".ipynb_checkpoints/validation-2", "__MACOSX/validation-3"):
            miniatures.write(folder / f"data/{junk}.parquet", "no table")
        task = miniatures.settings("parquet", folder, 2, label="fine", folders={"test": "validation"})
        found.append(load_split(task, "test"))
    assert [split.labels.tolist() for split in found] == [[1], [0]]
    assert [split.stored.content(0) for split in found] == [miniatures.encoded(100), miniatures.encoded(9)]
    assert found[0].digest != found[1].digest


@pytest.mark.parametrize(
    ("kind", "file", "line"),
    [
        ("dtd", "labels/train1.txt", "._banded/._banded_0000.jpg"),
        ("food101", "meta/train.txt", "__MACOSX/apple_pie/1"),
        ("sun397", "Training_01.txt", "/a/.ipynb_checkpoints/sun_a.jpg"),
        ("iwildcam", "metadata.csv", "train,9,._a.jpg,1"),
    ],
)
def test_a_list_that_names_hidden_files_is_read_without_them(saved, kind, file, line):
    task, folder = saved(kind)
    before = splits(task)
    with (folder / file).open("a") as listed:
        listed.write(f"\n{line}\n")
    load_split.cache_clear()
    assert splits(task) == before
    assert class_names(task)


def test_a_digest_names_files_labels_and_sizes_and_not_the_machine(tmp_path):
    def digest(folder):
        return load_split(miniatures.settings("food101", folder, 2), "test").digest

    one, two, three, four = (SAVED["food101"](tmp_path / name).folder for name in "abcd")
    assert digest(one) == digest(two)
    cut(two / "images/apple_pie/20.jpg")
    (three / "images/apple_pie/20.jpg").rename(three / "images/apple_pie/21.jpg")
    replace(three / "meta/test.txt", "apple_pie/20", "apple_pie/21")
    (four / "meta/classes.txt").write_text("beef_tartare\napple_pie\n")
    load_split.cache_clear()
    assert len({digest(folder) for folder in (one, two, three, four)}) == 4


@pytest.mark.parametrize("kind", SAVED)
def test_a_check_of_every_data_set_ends_with_ok_and_too_few_images_are_counted_first(saved, kind, capsys):
    task, _ = saved(kind)
    check(task)
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"OK: {3 + len(task.shifts)} splits"
    assert [line.split(":")[0] for line in out[:3]] == ["train", "held_out", "test"]
    whole = dataclasses.replace(task, counts={"test": 9})
    with pytest.raises(UserError, match=r"images, but split 'test' has 9: restore .* task.counts=null"):
        load_split(whole, "test")
    assert len(load_split(whole, "train")) > 0


def test_a_check_goes_on_after_a_split_that_cannot_be_used_and_says_each_problem_once(saved, capsys):
    task, folder = saved("dtd")
    for split in ("val1", "test1"):
        replace(folder / f"labels/{split}.txt", "banded/", "bumpy/")
    with pytest.raises(UserError, match=r"val1.txt: 'bumpy' is none .*; .*test1.txt: 'bumpy' is none"):
        check(task)
    out = capsys.readouterr().out
    assert "train: 2 images" in out and "held_out: cannot be used" in out and "OK" not in out
    (folder / "labels/train1.txt").unlink()
    load_split.cache_clear()
    with pytest.raises(UserError, match=r"train1.txt cannot be read") as caught:
        check(task)
    assert str(caught.value).count("cannot be read") == 1


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


BIN, NEW, MAT = "cifar-10-batches-bin/", "cifar10.1_v6_", "cars_test_annos_withlabels.mat"
# kind, file, its damage (None: deleted; a share of it is kept; words are replaced; an array is saved), the error
SPOILED = [
    ("cifar10", BIN + "data_batch_3.bin", None, "Python version is"),
    ("cifar10", BIN + "data_batch_3.bin", 0.6, "not a multiple of 3,073"),
    ("cifar10", BIN + "batches.meta.txt", ("airplane\n", ""), "has 1"),
    ("cifar10", BIN + "batches.meta.txt", None, "meta.txt cannot be"),
    ("cifar10", NEW + "labels.npy", None, "labels.npy cannot be read"),
    ("cifar10", NEW + "data.npy", 0.5, "data.npy cannot be read"),
    ("cifar10", NEW + "labels.npy", np.array([{}] * 3), "Object arrays cannot"),
    ("cifar10", NEW + "labels.npy", np.array([0, 1]), "3 uint8 images and 2"),
    ("cifar10", NEW + "labels.npy", np.array([0, 1, 2]), "class ids up to 2"),
    ("cifar100", "cifar-100-binary/test.bin", 0.6, "not a multiple of 3,074"),
    ("dtd", "labels/val1.txt", None, "val1.txt cannot be read"),
    ("dtd", "images/banded/banded_2.jpg", None, r"banded_2.jpg is missing, and .*test1.txt"),
    ("dtd", "images/banded/banded_2.jpg", 0.5, "banded_2.jpg cannot be decoded"),
    ("dtd", "labels/val1.txt", ("banded/", "bumpy/"), "'bumpy' is none of the 2 classes"),
    ("food101", "meta/classes.txt", None, "classes.txt cannot be read"),
    ("food101", "images/apple_pie/20.jpg", None, "20.jpg is missing"),
    ("food101", "meta/test.txt", 0, "test.txt is empty"),
    ("food101", "meta/test.txt", ("beef_", "beet_"), "'beet_tartare' is none"),
    ("food101", "meta/classes.txt", ("beef_tartare\n", ""), "num_classes=2, but .* 1 cl"),
    ("sun397", "SUN397/ClassName.txt", None, "ClassName.txt cannot be read"),
    ("sun397", "SUN397/a/apse", None, "apse/indoor/sun_a.jpg is missing"),
    ("sun397", "Testing_01.txt", ("/a/abbey", "/a/abbot"), "'/a/abbot' is none"),
    ("cars", MAT, None, "withlabels.mat cannot be read"),
    ("cars", "devkit/cars_train_annos.mat", 0.5, "cars_train_annos.mat cannot be read"),
    ("cars", "cars_test/00001.jpg", None, "cars_test/00001.jpg is missing"),
    ("fmow", "country_code_mapping.csv", None, "country_code_mapping.csv cannot"),
    ("fmow", "rgb_metadata.csv", (",2016-02-01T00:00:00Z\n", ""), "row 12 has no timestamp"),
    ("fmow", "rgb_metadata.csv", ("category", "class"), "rgb_metadata.csv cannot be read"),
    ("fmow", "rgb_metadata.csv", ("2011-01-01", "once"), "a timestamp cannot be read"),
    ("fmow", "images/rgb_img_8.png", None, "rgb_img_8.png is missing"),
    ("fmow", "rgb_metadata.csv", ("j,FRA,airport_hangar", "j,FRA,zoos"), "has 3 classes"),
    ("iwildcam", "categories.csv", None, "categories.csv cannot be read"),
    ("iwildcam", "metadata.csv", ("id_val", "cis"), "has no split 'id_val', but cis"),
    ("iwildcam", "metadata.csv", ("e.jpg,1", "e.jpg,5"), "'5' is none of the 2"),
    ("iwildcam", "metadata.csv", 0.98, "row 7 has no y"),
    ("parquet", "data/validation-00000-of-00001.parquet", None, "split 'validation'"),
    ("parquet", "data/train-00000-of-00001.parquet", 0.5, "split 'train', is neither"),
]


@pytest.mark.parametrize(("kind", "file", "change", "words"), SPOILED)
def test_what_is_missing_cut_off_or_of_another_class_is_named(saved, kind, file, change, words):
    task, folder = saved(kind)
    path = folder / file
    if change is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(change, tuple):
        replace(path, *change)
    elif isinstance(change, np.ndarray):
        np.save(path, change)
    else:
        cut(path, change)
    with pytest.raises(UserError, match=words):
        check(task)


def run_check(*typed):
    return here(["-m", "tasks.check", *typed])


def test_a_check_needs_no_experiment_and_ends_with_ok_or_one_line(saved, tmp_path):
    _, folder = saved("dtd")
    small = ("task=dtd", f"task.folder={folder}", "task.num_classes=2", f"paths.runs={tmp_path / 'runs'}")
    good = run_check(*small, "task.counts=null")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[-1] == "OK: 3 splits"
    bad = run_check(*small)
    assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1)
    assert re.match(r"error: .*labels/train1.txt has 2 images, but split 'train' has 1,880", bad.stderr)


def test_a_test_whose_check_would_keep_its_lists_in_the_clones_runs_fails():
    with pytest.raises(AssertionError, match=r"without paths\.runs it works in the clone's"):
        subprocess.run([python(), "-m", "tasks.check", "task=dtd", "task.folder=nowhere"], cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("task=imagenett", "error: there is no task=imagenett, but imagenet"),
        ("task.foldr=x", "error: there is no setting task.foldr"),
        ("task=image_folder", "this experiment leaves it to you: type task."),
        ("task=dtd +task.counts.tset=3", "task.counts names the split 'tset', which the task has not: it has train,"),
    ],
)
def test_a_check_of_mistyped_settings_is_one_line(typed, message):
    answer = run_check(*typed.split())
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1
    assert message in answer.stderr


def test_a_task_of_texts_is_checked_whatever_model_reads_it(tmp_path):
    for split in ("train", "test"):
        lines = [f"{label}\t{split} says {label} {i}" for label in ("no", "yes") for i in range(4)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
    words = ("task=sentences", f"task.folder={tmp_path}", "task.num_classes=2", "task.options=[no,yes]")
    answer = run_check(*words, f"paths.runs={tmp_path / 'runs'}", "task.template='{text}'", "task.held_out_share=0.3")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.splitlines()[-1] == "OK: 3 splits"


def test_the_readme_says_where_every_data_set_is_from_and_how_many_images_it_has():
    text = (ROOT / "tasks/README.md").read_text()
    for path in sorted((ROOT / "configs/task").glob("*.yaml")):
        if path.stem not in ("glue", "image_folder", "text_file"):  # completed by others, or of own pools
            assert f"task={path.stem}" in text, path
        for count in re.findall(r"^counts: \{(.*)\}", path.read_text(), re.M):
            for number in re.findall(r": (\d+)", count):
                assert f"{int(number):,}" in text, (path, number)
