"""Images that a csv or tsv lists: one table for all splits, or one for each."""

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from configs.schema import load
from store.rows import identity
from tasks.check import describe, overlaps
from tasks.load import class_names, load_split

LINES = [("train", "dog"), ("train", "cat"), ("train", "dog"), ("train", "cat"), ("val", "cat"), ("test", "dog")]


@pytest.fixture
def folder(tmp_path):
    """A data set of six images with a table for all of them, and one for each split."""
    (tmp_path / "photos").mkdir()
    table = ["path,label,split,note"]
    for number, (split, label) in enumerate(LINES):
        name = f"photos/{number}.png"
        Image.fromarray(np.full((8, 8, 3), 40 * number, dtype=np.uint8)).save(tmp_path / name)
        table.append(f'{name},{label},{split},"a, b"')
        with (tmp_path / f"{split}.tsv").open("a") as own:
            own.write(f"{name}\t{label}\n" if own.tell() else f"path\tlabel\n{name}\t{label}\n")
    (tmp_path / "all.csv").write_text("\n".join(table) + "\n")
    return tmp_path


def task_of(folder, *words):
    runs = f"paths.runs={folder / 'runs'}"  # has the listings
    return load("demo", "task=image_table", f"task.folder={folder}", "task.num_classes=2", runs, *words).task


def of_all(folder, *words):
    return task_of(folder, "task.table=all.csv", "+task.folders.held_out=val", *words)


def test_one_table_says_the_split_of_each_line_and_classes_are_the_labels_of_train_by_name(folder):
    task = of_all(folder)
    assert class_names(task) == ("cat", "dog")
    train, held_out = load_split(task, "train"), load_split(task, "held_out")
    assert train.labels.tolist() == [1, 0, 1, 0] and held_out.labels.tolist() == [0]
    assert [train.stored.called(i) for i in range(4)] == [f"photos/{i}.png" for i in range(4)]
    assert held_out.pil(0).getpixel((0, 0)) == (160, 160, 160)
    assert "held_out: 1 images, classes 2" in describe(task, "held_out")
    assert overlaps(task) == []
    apart, roles = task_of(folder, "+task.folders.held_out=val"), ("train", "held_out", "test")  # a table for each
    assert [load_split(apart, role).digest for role in roles] == [load_split(task, role).digest for role in roles]


def test_columns_may_have_other_names_and_labels_may_be_numbers_in_their_order(folder):
    text = (folder / "all.csv").read_text().replace("path,label,split", "file,species,set")
    (folder / "all.csv").write_text(text.replace("dog", "2").replace("cat", "10"))
    task = of_all(folder, "task.path_column=file", "task.label=species", "task.split_column=set")
    assert class_names(task) == ("2", "10") and load_split(task, "train").labels.tolist() == [0, 1, 0, 1]


def test_held_out_may_be_drawn_from_the_lines_of_train(folder):
    task = task_of(folder, "task.table=all.csv", "task.held_out_per_class=1")
    train, held_out = load_split(task, "train"), load_split(task, "held_out")
    assert sorted(held_out.labels.tolist()) == sorted(train.labels.tolist()) == [0, 1]
    assert overlaps(task) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("path,", "file,"), r"no column 'path', only file, label, split, note: type"),
        (lambda text: text.replace("photos/1.png,cat", "photos/1.png,"), "example 2 has no label"),
        (lambda text: text.replace("photos/1.png", "photos/0.png"), r"photos/0.png stands in split 'train' twice"),
        (lambda text: text.replace("photos/5", "../5"), r"\.\./5.png is not a path within"),
        (lambda text: text.replace("photos/5", "/photos/5"), r"/photos/5.png is not a path within"),
        (lambda text: text.replace("photos/5.png,dog", "photos/5.png,fox"), "'fox' is none of the 2 classes"),
        (lambda text: text.replace(",test,", ",exam,"), r"no line has split='test', only exam, train, val: type"),
        (lambda text: text.replace("photos/5", "photos/6"), r"photos/6.png is missing, and .*all.csv lists it"),
        (lambda text: text.replace("photos/1.png", "./photos/0.png"), r"photos/0.png stands in split 'train' twice"),
        (lambda text: text.replace(",", ";"), "has the one column 'path;label;split;note': a csv has commas between"),
        (lambda text: text.split("\n")[0] + "\n", "all.csv has no example"),
        (
            lambda text: text.replace(".png,", ".png,more,"),
            "all.csv cannot be read .its rows have more fields than its first",
        ),
        (lambda text: "", r"all.csv cannot be read \(No columns to parse from file\)"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(folder, change, message):
    (folder / "all.csv").write_text(change((folder / "all.csv").read_text()))
    with pytest.raises(UserError, match=message) as caught:
        load_split(of_all(folder), "train") and load_split(of_all(folder), "test")
    assert "\n" not in str(caught.value)


def test_tables_that_are_not_there_and_settings_without_an_effect_are_refused(folder):
    with pytest.raises(UserError, match=r"neither held_out.csv nor held_out.tsv"):
        load_split(task_of(folder), "held_out")
    with pytest.raises(UserError, match=r"ends neither with .csv"):
        load_split(task_of(folder, "task.table=all.xlsx"), "train")
    with pytest.raises(UserError, match=r"task.split_column needs task.table"):
        task_of(folder, "task.split_column=set")


def test_where_a_table_lies_and_what_its_columns_are_called_do_not_name_a_row(folder):
    def named(*words):
        return identity(load("demo", "task=image_table", "task.num_classes=2", *words), 0)

    first = named("task.folder=a", "task.table=all.csv")
    assert first == named("task.folder=b", "task.table=in/all.csv", "task.path_column=file", "task.split_column=set")
    assert first != named("task.folder=a", "task.table=other.csv")
