"""Examples that stand in two splits are found by their content and refused."""

import shutil
from pathlib import Path

import miniatures
import pytest
import torch
from pictures import save_tree, task

from configs.errors import UserError
from configs.schema import load
from eval.forward import Evaluator
from tasks import check as module
from tasks.check import check, overlaps, refuse_overlaps, refused
from tasks.files import scanned
from tasks.load import load_split
from tasks.split import ImageSplit, Pixels
from tasks.texts import Rows, text_split


@pytest.fixture
def tree(tmp_path):
    """Three images of each of four classes in each split, no two alike."""
    return save_tree(tmp_path / "data", splits=("train", "held_out", "test", "night"))


def images(root, **own):
    for cached in (load_split, scanned, refuse_overlaps):
        cached.cache_clear()
    return task(root, shifts=("night",), **own)


def found(task):
    return [(each.first, each.second, each.count, each.n) for each in overlaps(task)]


def test_an_image_in_two_splits_is_found_under_any_name_and_class(tree):
    assert found(images(tree)) == []
    shutil.copy(tree / "train/a b/0.jpg", tree / "test/Öl/other.jpg")
    shutil.copy(tree / "held_out/Öl/1.jpg", tree / "night/a b/7.jpg")
    shutil.copy(tree / "held_out/Öl/1.jpg", tree / "night/a b/8.jpg")
    settings = images(tree)
    assert found(settings) == [("train", "test", 1, 13), ("held_out", "night", 2, 14)]
    one, two = refused(settings, overlaps(settings))
    assert "1 of the 13 images of split 'test' stand in split 'train' too" in one
    assert "train/a b/0.jpg of train is test/Öl/other.jpg of test" in one
    assert one.endswith("task.overlap_allowed=0.077")
    assert "2 of the 14 images of split 'night' stand in split 'held_out' too" in two
    assert len(refused(images(tree, overlap_allowed=0.077), overlaps(settings))) == 1
    assert refused(images(tree, overlap_allowed=0.15), overlaps(settings)) == []


def test_equal_sizes_and_equal_ends_are_not_equal_images(tree, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 16)
    content = (tree / "train/a b/0.jpg").read_bytes()
    (tree / "test/a b/same_size.jpg").write_bytes(content[::-1])
    (tree / "test/a b/same_end.jpg").write_bytes(b"other" + content[5:])
    assert found(images(tree)) == []


def test_only_what_can_be_equal_is_read(tree, monkeypatch):
    """Sizes of all; ends of those with a size of another split; all bytes of those with its end too."""
    read = []
    monkeypatch.setattr("tasks.files.read_file", lambda path, last=None: read.append(last) or path.read_bytes())
    settings = images(tree)
    sizes = [set(load_split(settings, name).stored.sizes.tolist()) for name in ("train", "held_out", "test", "night")]
    read.clear()
    shared = {size for i, own in enumerate(sizes) for j, other in enumerate(sizes) if i != j for size in own & other}
    assert overlaps(settings) == []
    assert len(read) < 12 if not shared else len(read) < 48
    assert None not in read


def test_every_stage_and_the_check_refuse_and_splits_that_report_may_share(tree, tmp_path, capsys):
    shutil.copy(tree / "test/a b/0.jpg", tree / "night/a b/copy.jpg")
    settings = images(tree)
    refuse_overlaps(settings, tmp_path / "runs")
    check(settings)
    assert "test and night: 1 of the latter's 13 images stand in both" in capsys.readouterr().out
    shutil.copy(tree / "train/a b/0.jpg", tree / "test/a b/copy.jpg")
    typed = ["task.folder=" + str(tree), "task.num_classes=4", "task.shifts=[night]", f"paths.runs={tmp_path / 'runs'}"]
    config = load("own_images", *typed)
    images(tree)
    words = r"1 of the 13 images of split 'test' stand in split 'train' too"
    for read in (lambda: Evaluator(config).split("held_out"), lambda: Evaluator(config).inputs("train")):
        with pytest.raises(UserError, match=words):
            read()
    with pytest.raises(UserError, match=words):
        check(config.task)


def test_what_was_compared_is_not_compared_again(tree, tmp_path, monkeypatch):
    shutil.copy(tree / "train/a b/0.jpg", tree / "test/a b/copy.jpg")
    with pytest.raises(UserError, match="1 of the 13"):
        refuse_overlaps(images(tree), tmp_path)
    monkeypatch.setattr(module, "overlaps", lambda task, names: pytest.fail("compared again"))
    with pytest.raises(UserError, match="1 of the 13"):
        refuse_overlaps(images(tree), tmp_path)
    moved = Path(shutil.copytree(tree, tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="1 of the 13"):  # the same content at another place
        refuse_overlaps(images(moved), tmp_path)


def test_training_needs_no_test_set_that_is_not_there_yet(tree, tmp_path):
    shutil.move(tree / "night", tmp_path / "night")
    refuse_overlaps(images(tree), tmp_path / "runs")
    shutil.copy(tree / "train/a b/0.jpg", tmp_path / "night/a b/copy.jpg")
    shutil.move(tmp_path / "night", tree / "night")
    with pytest.raises(UserError, match="1 of the 13 images of split 'night'"):
        refuse_overlaps(images(tree), tmp_path / "runs")


def test_images_in_memory_are_compared_by_their_pixels(monkeypatch):
    pixels = torch.randint(0, 256, (8, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    parts = {"train": pixels[:5], "held_out": pixels[5:7], "test": pixels[[7, 2]]}

    def split(task, name):
        return ImageSplit(name, Pixels(parts[name]), torch.zeros(len(parts[name]), dtype=torch.int64), name)

    monkeypatch.setattr(module, "load_split", split)
    assert found(task("x")) == [("train", "test", 1, 2)]


def texts(folder="x", **own):
    return miniatures.settings("sentences", folder, 2, **({"template": "{t}", "options": ("no", "yes")} | own))


def parted(task, contents, labels=None):
    labels = labels or [0, 1] * (len(contents) // 2)
    rows = Rows(("id", "t"), [(str(i), text) for i, text in enumerate(contents)], labels, Path("x"))
    return [{field for (field,) in text_split(task, name, rows).stored.fields} for name in ("held_out", "train")]


@pytest.mark.parametrize("rule", [{"held_out_share": 0.25}, {"held_out_per_class": 10}], ids=str)
def test_texts_that_stand_twice_are_in_one_split_whatever_their_labels_lines_and_white_space(rule):
    contents = [f"text {i // 3}" + " " * (i % 3 == 1) for i in range(120)]
    held_out, train = parted(texts(**rule), contents, [int(i % 9 > 3) for i in range(120)])
    assert held_out and train
    left = {text.strip() for text in train}
    assert left.isdisjoint(text.strip() for text in held_out)
    if "held_out_per_class" in rule:  # texts of two classes stay in train
        assert {f"text {i}" for i in range(1, 40, 3)} <= left


def test_a_text_keeps_its_split_when_others_are_added():
    distinct = [f"text {i}" for i in range(40)]
    before, _ = parted(texts(held_out_share=0.25), distinct)
    after, _ = parted(texts(held_out_share=0.25), distinct + [f"extra {i}" for i in range(400)])
    assert before == {text for text in after if text in distinct}
    assert 0.18 < len(after) / 440 < 0.32


def test_a_class_without_a_low_draw_still_has_a_text_held_out_and_one_to_train():
    held_out, train = parted(texts(held_out_share=0.001), [f"text {i}" for i in range(12)])
    assert (len(held_out), len(train)) == (2, 10)
    with pytest.raises(UserError, match=r"leaves none of the 1 texts of class 'yes'"):
        parted(texts(held_out_share=0.001), ["a", "b", "c"], [0, 0, 1])


def test_texts_of_two_splits_are_compared_by_what_the_template_reads(tmp_path):
    lines = {"train": "1\tgood  film\t1\n2\tbad\t0\n", "held_out": "3\tfine\t1\n", "test": "4\tgood film\t0\n"}
    for name, text in lines.items():
        (tmp_path / f"{name}.tsv").write_text("id\tt\tlabel\n" + text)
    load_split.cache_clear()
    assert found(texts(tmp_path)) == [("train", "test", 1, 1)]
    with pytest.raises(UserError, match=r"1 of the 1 texts of split 'test' .*'good  film' of train is 'good film' of"):
        refuse_overlaps(texts(tmp_path), tmp_path / "runs")
    with pytest.raises(UserError, match="reads no column"):
        load_split(texts(tmp_path, template="yes or no?"), "train")
    (tmp_path / "held_out.tsv").unlink()
    load_split.cache_clear()
    with pytest.raises(UserError, match=r"held_out.tsv is missing: .* task.held_out_share=0.1 takes some of train's"):
        load_split(texts(tmp_path), "held_out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "demo_text"])
def test_the_embedded_benchmarks_have_no_example_in_two_splits_but_two_in_two_shifts(name):
    settings = load(name).task
    assert module.is_embedded(settings)
    expected = {"demo": [("sketch", "a", 2, 761)], "demo_text": []}
    assert found(settings) == expected[name]
    assert refused(settings, overlaps(settings)) == []
