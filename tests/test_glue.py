"""GLUE's files are read whole: no row lost, no quote or odd character taken for what it is not."""

from pathlib import Path

import miniatures
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from configs.errors import UserError
from configs.schema import load
from tasks.load import class_names, load_split
from tasks.texts import read_local

SHARED = Path(__file__).resolve().parents[2] / "shared/reference/glue"
REAL = pytest.mark.skipif(not SHARED.exists(), reason="GLUE's files are not here")
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"  # as the download has it: a mark, Windows line ends


def settings(subset, folder, **changes):
    values = {"template": "{sentence}", "options": ("x", "y"), "folders": {"test": "validation"}}
    return miniatures.settings("glue", folder, 2, subset=subset, held_out_share=0.25, **(values | changes))


def written(folder, name, text, file="train.tsv"):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / file).write_bytes(text.encode())
    return folder


@REAL
def test_the_real_files_have_every_row_and_label():
    known = {("rte", "train"): (2490, 1241), ("rte", "validation"): (277, 131)}
    known |= {("cola", "train"): (8551, 6023), ("cola", "validation"): (1043, 721)}
    for which, counts in known.items():
        rows = read_local(SHARED, *which)
        assert (len(rows.labels), sum(rows.labels)) == counts
        assert all(text.strip() for row in rows.fields for text in row)
    rte, cola = read_local(SHARED, "rte", "train"), read_local(SHARED, "cola", "validation")
    lines = (SHARED / "RTE/train.tsv").read_bytes().decode().split("\n")[1:]
    for number in (0, 1000, 2489):
        _, premise, hypothesis, label = lines[number].rstrip("\r").split("\t")
        assert rte.fields[number] == (premise, hypothesis)
        assert ["entailment", "not_entailment"][rte.labels[number]] == label
    first = (SHARED / "CoLA/dev.tsv").read_bytes().decode().split("\n")[0].split("\t")
    assert (cola.fields[0], str(cola.labels[0])) == ((first[3],), first[1])


@REAL
@pytest.mark.parametrize("experiment", ["tablej1_bert_base_rte", "tablej1_t5_base_cola"])
def test_the_paper_s_experiments_load_the_real_files_and_check_their_counts(experiment):
    task = load(experiment, f"task.folder={SHARED}").task
    train, held_out, test = (load_split(task, name) for name in ("train", "held_out", "test"))
    assert len(train) + len(held_out) == task.counts["train"]
    assert len(test) == task.counts["test"]
    shares = [torch.bincount(split.labels).double() / len(split) for split in (train, held_out)]
    torch.testing.assert_close(*shares, atol=0.05, rtol=0)  # held-out has the classes of train, as far as draws do
    assert len(held_out) / task.counts["train"] == pytest.approx(0.1, abs=0.01)


def test_quotes_and_characters_that_end_lines_elsewhere_are_part_of_a_sentence(tmp_path):
    odd = 'He said "no\u2028 and\x85 left\x0b\x1c.'
    text = f"{MRPC}1\t1\t2\t{odd}\tA second 'one\"\r\n0\t3\t4\tc\td\r\n"
    rows = read_local(written(tmp_path, "MRPC", text), "mrpc", "train")
    assert rows.columns == ("sentence1", "sentence2")
    assert rows.fields == [(odd, "A second 'one\""), ("c", "d")]
    assert rows.labels == [1, 0]


def test_a_file_may_end_without_a_line_end_and_a_word_may_be_null_or_na(tmp_path):
    rows = read_local(written(tmp_path, "SST-2", "sentence\tlabel\nnull\t1\nNA\t0"), "sst2", "train")
    assert (rows.fields, rows.labels) == ([("null",), ("NA",)], [1, 0])


@pytest.mark.parametrize(
    ("subset", "name", "text", "message"),
    [
        ("sst2", "SST-2", "sentence\tlabel\ngood\t1\nbad 0\n", r"train\.tsv, line 3: 1 fields"),
        ("sst2", "SST-2", "sentence\tlabel\ngood\t1\nbad\tworse\t0\n", r"train\.tsv, line 3: 3 fields"),
        ("sst2", "SST-2", "sentence\tlabel\ngood\t1\n\nbad\t0\n", r"train\.tsv, line 3: 1 fields"),
        ("sst2", "SST-2", "sentence\tlabel\ngood\t-1\n", r"train\.tsv, line 2: label '-1' is none of 0, 1"),
        ("sst2", "SST-2", "sentence\tlabel\n \t1\n", r"train\.tsv, line 2: no text"),
        ("sst2", "SST-2", "sentence\tlabel\n", "has no example"),
        ("sst2", "SST-2", "", "has no example"),
        ("sst2", "SST-2", "text\tlabel\na\t1\n", "has no column 'sentence', only text, label"),
        ("cola", "CoLA", "gj04\t1\t\tGood.\ngj04\tx\t*\tBad.\n", r"train\.tsv, line 2: label 'x'"),
        ("rte", "RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n", r"line 2: label 'neutral'"),
    ],
)
def test_a_broken_file_is_refused_by_its_line(tmp_path, subset, name, text, message):
    with pytest.raises(UserError, match=message):
        read_local(written(tmp_path, name, text), subset, "train")


def test_other_bytes_missing_files_rows_and_splits_without_labels_are_refused(tmp_path):
    written(tmp_path, "SST-2", "sentence\tlabel\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(8)))
    with pytest.raises(UserError, match=r"has 8 texts, but split 'train' has 9"):
        load_split(settings("sst2", tmp_path, counts={"train": 9}), "train")
    path = tmp_path / "SST-2/train.tsv"
    path.write_bytes(b"sentence\tlabel\ngood\t1\ncaf\xe9\t0\n")
    with pytest.raises(UserError, match=r"train\.tsv, line 3: not UTF-8"):
        read_local(tmp_path, "sst2", "train")
    with pytest.raises(UserError, match=r"dev\.tsv is missing"):
        read_local(tmp_path, "sst2", "validation")
    with pytest.raises(UserError, match="not for 'test'"):
        read_local(tmp_path, "sst2", "test")


def test_held_out_is_a_share_of_each_class_and_the_rest_of_train(tmp_path):
    text = "sentence\tlabel\n" + "".join(f"text {i}\t{int(i < 100)}\n" for i in range(400))
    task = settings("sst2", written(tmp_path, "SST-2", text))
    train, held_out = (load_split(task, name) for name in ("train", "held_out"))
    shares = held_out.labels.bincount() / torch.tensor([300, 100])
    assert ((shares > 0.15) & (shares < 0.35)).all()
    assert sorted(row[0] for row in train.stored.fields + held_out.stored.fields) == sorted(
        f"text {i}" for i in range(400)
    )
    assert class_names(task) == ("x", "y")


def test_the_hub_s_tables_say_the_same_as_the_files(tmp_path):
    texts = [(f"a {i}", f"b {i}", int(i % 3 == 0)) for i in range(9)]
    first, second, labels = zip(*texts, strict=True)
    text = Value("string")
    features = Features({"sentence1": text, "sentence2": text, "label": ClassLabel(2), "idx": Value("int32")})
    columns = {"sentence1": first, "sentence2": second, "label": labels, "idx": range(9)}
    hub, local = tmp_path / "hub", tmp_path / "local"
    (hub / "mrpc").mkdir(parents=True)
    local.mkdir()
    Dataset.from_dict(columns, features).to_parquet(hub / "mrpc/train-00000-of-00001.parquet")
    written(local, "MRPC", MRPC + "".join(f"{label}\t0\t0\t{a}\t{b}\r\n" for a, b, label in texts))
    template = "{sentence1} | {sentence2}"
    splits = [load_split(settings("mrpc", folder, template=template), "train") for folder in (hub, local)]
    assert len(splits[0]) == 9 - 1 - 2  # a quarter of each class is held out, rounded
    assert splits[0].stored.fields == splits[1].stored.fields
    assert splits[0].labels.tolist() == splits[1].labels.tolist()
    assert splits[0].digest == splits[1].digest


def test_data_that_are_nowhere_are_one_line(tmp_path):
    with pytest.raises(UserError, match="neither a folder with GLUE's files nor a data set that can be had"):
        load_split(settings("rte", tmp_path), "train")
