"""Data sets are read from the files in which they are distributed, and say what is wrong with them."""

import dataclasses
import multiprocessing
import re
import shutil
import subprocess
from collections import Counter
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
from tests.commands import python

ROOT = Path(__file__).resolve().parents[1]
SAVED = {
    name: getattr(miniatures, f"save_{name}")
    for name in (
        "cifar10",
        "cifar100",
        "dtd",
        "food101",
        "sun397",
        "cars",
        "fmow",
        "iwildcam",
        "parquet",
    )
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tables that `datasets` makes of parquet files stay in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def splits(task):
    """Each split as {file within the data: label}."""
    found = {}
    for name in (task.train, task.held_out, *task.reported):
        split = load_split(task, name)
        files = [str(split.stored.path(row).relative_to(split.stored.root)) for row in range(len(split))]
        found[name] = dict(zip(files, split.labels.tolist(), strict=True))
    return found


def test_cifar10_is_whole_in_memory_with_its_new_test_set(tmp_path):
    task = SAVED["cifar10"](tmp_path / "data")
    assert class_names(task) == ("airplane", "automobile")
    train, held_out = load_split(task, "train"), load_split(task, "held_out")
    assert Counter(held_out.labels.tolist()) == {0: 2, 1: 2}
    assert Counter(train.labels.tolist()) == {0: 8, 1: 8}
    every = np.concatenate([cifar_images(4, seed) for seed in range(5)])
    seen = {image.numpy().tobytes() for split in (train, held_out) for image in split.images}
    assert seen == {image.tobytes() for image in every}
    test, new = load_split(task, "test"), load_split(task, "new")
    assert torch.equal(test.images, torch.from_numpy(cifar_images(4, 5)))
    assert test.labels.tolist() == [0, 1, 1, 0]
    assert torch.equal(new.images, torch.from_numpy(cifar_images(3, 9)))
    assert new.labels.tolist() == [1, 0, 1]
    assert np.array_equal(np.asarray(new.pil(1)), cifar_images(3, 9)[1].transpose(1, 2, 0))
    assert len({split.digest for split in (train, held_out, test, new)}) == 4


def test_cifar100_has_its_fine_labels(tmp_path):
    task = SAVED["cifar100"](tmp_path / "data")
    assert class_names(task) == ("apple", "aquarium fish")
    test = load_split(task, "test")
    assert test.labels.tolist() == [1, 0, 1, 0]
    assert torch.equal(test.images, torch.from_numpy(cifar_images(4, 1)))
    assert len(load_split(task, "train")) == len(load_split(task, "held_out")) == 2


def test_textures_of_the_first_split_have_their_classes_in_alphabetical_order(tmp_path):
    task = SAVED["dtd"](tmp_path / "data")
    assert class_names(task) == ("banded", "zig zagged")
    assert splits(task) == {
        name: {f"zig_zagged/zig_zagged_{i}.jpg": 1, f"banded/banded_{i}.jpg": 0}
        for i, name in enumerate(("train", "held_out", "test"))
    }


def test_food_is_held_out_by_class_and_called_as_its_own_file_says(tmp_path):
    task = SAVED["food101"](tmp_path / "data")
    assert class_names(task) == ("Apple pie", "Beef tartare")
    found = splits(task)
    assert found["test"] == {"apple_pie/20.jpg": 0, "beef_tartare/20.jpg": 1}
    assert Counter(found["held_out"].values()) == {0: 1, 1: 1}
    assert found["train"] | found["held_out"] == {
        f"{name}/{number}.jpg": label
        for label, name in enumerate(("apple_pie", "beef_tartare"))
        for number in (10, 11, 12)
    }


def test_scenes_have_the_classes_of_their_list_and_names_without_its_letters(tmp_path):
    task = SAVED["sun397"](tmp_path / "data")
    assert class_names(task) == ("abbey", "apse indoor", "bus depot outdoor")
    found = splits(task)
    assert found["test"] == {"a/abbey/sun_d.jpg": 0, "a/apse/indoor/sun_d.jpg": 1, "b/bus_depot/outdoor/sun_d.jpg": 2}
    assert (len(found["train"]), len(found["held_out"])) == (6, 3)


def test_cars_count_their_classes_from_one(tmp_path):
    task = SAVED["cars"](tmp_path / "data")
    assert class_names(task) == ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")
    found = splits(task)
    assert found["test"] == {"00001.jpg": 0}
    assert found["train"] | found["held_out"] == {"00001.jpg": 1, "00002.jpg": 0, "00003.jpg": 1, "00004.jpg": 0}
    assert sorted(found["held_out"].values()) == [0, 1]


def test_satellite_images_are_split_by_year_and_grouped_by_region(tmp_path):
    task = SAVED["fmow"](tmp_path / "data")
    assert class_names(task) == ("airport hangar", "zoo")
    # The rows of seq and those of train from 2013 on are of no split; val of 2013 to 2015 is not held-out.
    assert splits(task) == {
        "train": {"rgb_img_0.png": 1, "rgb_img_9.png": 0},
        "held_out": {"rgb_img_3.png": 1},
        "test": {"rgb_img_5.png": 0},
        "ood": {"rgb_img_6.png": 0, "rgb_img_7.png": 1, "rgb_img_8.png": 1},
    }
    ood = load_split(task, "ood")
    assert ood.group_names == ("Asia", "Europe")
    assert ood.groups.tolist() == [1, -1, 0], "a country without a region is in no group"


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
        for junk in (
            "._validation-1.parquet",
            ".ipynb_checkpoints/validation-2.parquet",
            "__MACOSX/validation-3.parquet",
        ):
            (folder / "data" / junk).parent.mkdir(exist_ok=True)
            (folder / "data" / junk).write_bytes(b"no table")
        split = load_split(
            miniatures.settings("parquet", folder, 2, label="fine", folders={"test": "validation"}), "test"
        )
        found.append((split.labels.tolist(), split.content(0), split.digest))
    assert found[0][:2] == ([1], miniatures.encoded(100))
    assert found[1][:2] == ([0], miniatures.encoded(9))
    assert found[0][2] != found[1][2]


@pytest.mark.parametrize("name", ["dtd", "food101", "sun397", "iwildcam"])
def test_a_list_that_names_hidden_files_is_read_without_them(name, tmp_path):
    task = SAVED[name](tmp_path / "data")
    before = splits(task)
    lists = {
        "dtd": ("labels/train1.txt", "._banded/._banded_0000.jpg\n"),
        "food101": ("meta/train.txt", "__MACOSX/apple_pie/1\n"),
        "sun397": ("Training_01.txt", "/a/.ipynb_checkpoints/sun_a.jpg\n"),
        "iwildcam": ("metadata.csv", "train,9,._a.jpg,1\n"),
    }
    file, line = lists[name]
    with (tmp_path / "data" / file).open("a") as listed:
        listed.write(f"\n{line}")
    load_split.cache_clear()
    assert splits(task) == before
    assert class_names(task)


def test_satellite_images_of_the_years_between_are_a_split_that_selects_nothing(tmp_path):
    folder = SAVED["fmow"](tmp_path / "data").folder
    between = miniatures.settings("fmow", folder, 2, **(miniatures.WILDS | {"shifts": ("val",)}))
    assert splits(between)["val"] == {"rgb_img_4.png": 1}
    with pytest.raises(UserError, match="FMoW has the splits train, id_val, id_test, val, test, not 'summer'"):
        load_split(miniatures.settings("fmow", folder, 2, shifts=("summer",)), "summer")


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


def test_camera_traps_have_their_own_splits_and_labels(tmp_path):
    task = SAVED["iwildcam"](tmp_path / "data")
    assert class_names(task) == ("empty", "tayassu pecari")
    assert splits(task) == {
        "train": {"a.jpg": 1, "f.jpg": 0},
        "held_out": {"b.jpg": 0},
        "test": {"c.jpg": 1},
        "ood": {"e.jpg": 1, "g.jpg": 0},
    }


def test_images_in_parquet_are_decoded_when_they_are_asked_for(tmp_path):
    task = SAVED["parquet"](tmp_path / "data")
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


@pytest.mark.parametrize("name", SAVED)
def test_a_check_of_every_data_set_ends_with_ok(tmp_path, name, capsys):
    task = SAVED[name](tmp_path / "data")
    check(task)
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"OK: {3 + len(task.shifts)} splits"
    assert [line.split(":")[0] for line in out[:3]] == ["train", "held_out", "test"]


def test_a_check_goes_on_after_a_split_that_cannot_be_used_and_says_each_problem_once(tmp_path, capsys):
    task = SAVED["dtd"](tmp_path / "data")
    for split in ("val1", "test1"):
        replace(tmp_path / f"data/labels/{split}.txt", "banded/", "bumpy/")
    with pytest.raises(UserError, match=r"val1.txt: 'bumpy' is none .*; .*test1.txt: 'bumpy' is none"):
        check(task)
    out = capsys.readouterr().out
    assert "train: 2 images" in out
    assert "held_out: cannot be used" in out
    assert "OK" not in out
    (tmp_path / "data/labels/train1.txt").unlink()
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


SPOILED = {
    "cifar10 missing": (
        "cifar10",
        lambda d: (d / "cifar-10-batches-bin/data_batch_3.bin").unlink(),
        "Python version is",
    ),
    "cifar10 cut": (
        "cifar10",
        lambda d: cut(d / "cifar-10-batches-bin/data_batch_3.bin", 0.6),
        "not a multiple of 3,073",
    ),
    "cifar10 class": (
        "cifar10",
        lambda d: replace(d / "cifar-10-batches-bin/batches.meta.txt", "airplane\n", ""),
        "has 1",
    ),
    "cifar10 names": (
        "cifar10",
        lambda d: (d / "cifar-10-batches-bin/batches.meta.txt").unlink(),
        "meta.txt cannot be",
    ),
    "new missing": ("cifar10", lambda d: (d / "cifar10.1_v6_labels.npy").unlink(), "labels.npy cannot be read"),
    "new cut": ("cifar10", lambda d: cut(d / "cifar10.1_v6_data.npy"), "data.npy cannot be read"),
    "new pickle": (
        "cifar10",
        lambda d: np.save(d / "cifar10.1_v6_labels.npy", np.array([{}] * 3)),
        "Object arrays cannot",
    ),
    "new labels": (
        "cifar10",
        lambda d: np.save(d / "cifar10.1_v6_labels.npy", np.array([0, 1])),
        "3 uint8 images and 2",
    ),
    "new class": (
        "cifar10",
        lambda d: np.save(d / "cifar10.1_v6_labels.npy", np.array([0, 1, 2])),
        "class ids up to 2",
    ),
    "cifar100 cut": ("cifar100", lambda d: cut(d / "cifar-100-binary/test.bin", 0.6), "not a multiple of 3,074"),
    "dtd missing": ("dtd", lambda d: (d / "labels/val1.txt").unlink(), "val1.txt cannot be read"),
    "dtd image": (
        "dtd",
        lambda d: (d / "images/banded/banded_2.jpg").unlink(),
        r"banded_2.jpg is missing, and .*test1.txt",
    ),
    "dtd cut": ("dtd", lambda d: cut(d / "images/banded/banded_2.jpg"), "banded_2.jpg cannot be decoded"),
    "dtd class": (
        "dtd",
        lambda d: replace(d / "labels/val1.txt", "banded/", "bumpy/"),
        "'bumpy' is none of the 2 classes",
    ),
    "food missing": ("food101", lambda d: (d / "meta/classes.txt").unlink(), "classes.txt cannot be read"),
    "food image": ("food101", lambda d: (d / "images/apple_pie/20.jpg").unlink(), "20.jpg is missing"),
    "food empty": ("food101", lambda d: (d / "meta/test.txt").write_text("\n"), "test.txt is empty"),
    "food class": ("food101", lambda d: replace(d / "meta/test.txt", "beef_", "beet_"), "'beet_tartare' is none"),
    "food few": (
        "food101",
        lambda d: replace(d / "meta/classes.txt", "beef_tartare\n", ""),
        "num_classes=2, but .* 1 cl",
    ),
    "sun missing": ("sun397", lambda d: (d / "SUN397/ClassName.txt").unlink(), "ClassName.txt cannot be read"),
    "sun folder": ("sun397", lambda d: shutil.rmtree(d / "SUN397/a/apse"), "apse/indoor/sun_a.jpg is missing"),
    "sun class": ("sun397", lambda d: replace(d / "Testing_01.txt", "/a/abbey", "/a/abbot"), "'/a/abbot' is none"),
    "cars missing": (
        "cars",
        lambda d: (d / "cars_test_annos_withlabels.mat").unlink(),
        "withlabels.mat cannot be read",
    ),
    "cars cut": ("cars", lambda d: cut(d / "devkit/cars_train_annos.mat"), "cars_train_annos.mat cannot be read"),
    "cars image": ("cars", lambda d: (d / "cars_test/00001.jpg").unlink(), "cars_test/00001.jpg is missing"),
    "fmow missing": ("fmow", lambda d: (d / "country_code_mapping.csv").unlink(), "country_code_mapping.csv cannot"),
    "fmow cut": (
        "fmow",
        lambda d: replace(d / "rgb_metadata.csv", ",2016-02-01T00:00:00Z\n", ""),
        "row 12 has no timestamp",
    ),
    "fmow column": (
        "fmow",
        lambda d: replace(d / "rgb_metadata.csv", "category", "class"),
        "rgb_metadata.csv cannot be read",
    ),
    "fmow time": (
        "fmow",
        lambda d: replace(d / "rgb_metadata.csv", "2011-01-01", "once"),
        "a timestamp cannot be read",
    ),
    "fmow image": ("fmow", lambda d: (d / "images/rgb_img_8.png").unlink(), "rgb_img_8.png is missing"),
    "fmow class": (
        "fmow",
        lambda d: replace(d / "rgb_metadata.csv", "j,FRA,airport_hangar", "j,FRA,zoos"),
        "has 3 classes",
    ),
    "iwildcam missing": ("iwildcam", lambda d: (d / "categories.csv").unlink(), "categories.csv cannot be read"),
    "iwildcam split": (
        "iwildcam",
        lambda d: replace(d / "metadata.csv", "id_val", "cis"),
        "has no split 'id_val', but cis",
    ),
    "iwildcam class": ("iwildcam", lambda d: replace(d / "metadata.csv", "e.jpg,1", "e.jpg,5"), "'5' is none of the 2"),
    "iwildcam cut": ("iwildcam", lambda d: cut(d / "metadata.csv", 0.98), "row 7 has no y"),
    "parquet missing": (
        "parquet",
        lambda d: (d / "data/validation-00000-of-00001.parquet").unlink(),
        "split 'validation'",
    ),
    "parquet cut": ("parquet", lambda d: cut(d / "data/train-00000-of-00001.parquet"), "split 'train', is neither"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_missing_cut_off_or_of_another_class_is_named(tmp_path, name):
    kind, spoil, words = SPOILED[name]
    task = SAVED[kind](tmp_path / "data")
    spoil(tmp_path / "data")
    with pytest.raises(UserError, match=words):
        check(task)


def test_images_that_are_too_few_are_counted_before_anything_else(tmp_path):
    for name, saved in SAVED.items():
        task = saved(tmp_path / name)
        whole = dataclasses.replace(task, counts={"test": 9})
        with pytest.raises(UserError, match=r"images, but split 'test' has 9: restore .* task.counts=null"):
            load_split(whole, "test")
        assert len(load_split(whole, "train")) > 0


def test_a_split_of_some_classes_keeps_its_files_and_groups(tmp_path):
    task = SAVED["fmow"](tmp_path / "data")
    first = miniatures.settings("fmow", task.folder, 2, parts=2, part=1, **miniatures.WILDS)
    assert class_names(first) == ("zoo",)
    ood = load_split(first, "ood")
    assert [ood.stored.path(row).name for row in range(len(ood))] == ["rgb_img_7.png", "rgb_img_8.png"]
    assert (ood.labels.tolist(), ood.groups.tolist()) == ([0, 0], [-1, 0])
    hare = load_split(
        miniatures.settings("parquet", SAVED["parquet"](tmp_path / "p").folder, 2, label="fine", parts=2, part=1),
        "train",
    )
    assert (hare.stored.rows.tolist(), hare.labels.tolist()) == ([1, 2], [0, 0])


def test_columns_of_parquet_that_are_not_images_and_labels_are_named(tmp_path):
    folder = SAVED["parquet"](tmp_path / "data").folder
    with pytest.raises(UserError, match=r"has the columns img, fine: .*task.label=label"):
        load_split(miniatures.settings("parquet", folder, 2), "train")


def run_check(*typed):
    command = [python(), "-m", "tasks.check", *typed]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_check_needs_no_experiment_and_ends_with_ok_or_one_line(tmp_path):
    SAVED["dtd"](tmp_path / "data")
    small = ("task=dtd", f"task.folder={tmp_path / 'data'}", "task.num_classes=2", f"paths.runs={tmp_path / 'runs'}")
    good = run_check(*small, "task.counts=null")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[-1] == "OK: 3 splits"
    bad = run_check(*small)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert len(bad.stderr.splitlines()) == 1
    assert "labels/train1.txt has 2 images, but split 'train' has 1,880" in bad.stderr


def test_a_test_whose_check_would_keep_its_lists_in_the_clones_runs_fails():
    with pytest.raises(AssertionError, match=r"without paths\.runs it works in the clone's"):
        run_check("task=dtd", "task.folder=nowhere")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("task=imagenett", "error: there is no task=imagenett, but imagenet"),
        ("task.foldr=x", "error: there is no setting task.foldr"),
        ("task=image_folder", "this experiment leaves it to you: type task."),
        ("+task.counts.tset=3", "task.counts names the split 'tset', which the task has not: it has train, held_out,"),
    ],
)
def test_a_check_of_mistyped_settings_is_one_line(typed, said):
    answer = run_check("task=dtd", typed) if typed.startswith("+") else run_check(typed)
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1
    assert said in answer.stderr


def test_a_task_of_texts_is_checked_whatever_model_reads_it(tmp_path):
    for split in ("train", "test"):
        lines = [f"{label}\t{split} says {label} {i}" for label in ("no", "yes") for i in range(4)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
    words = ("task=sentences", f"task.folder={tmp_path}", "task.num_classes=2", "task.options=[no,yes]")
    words += (f"paths.runs={tmp_path / 'runs'}",)
    answer = run_check(*words, "task.template='{text}'", "task.held_out_share=0.3")
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
