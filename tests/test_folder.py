"""Soups as folders that the ingredients' library loads, with a card that says how good they are."""

import json
from dataclasses import dataclass, field

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForSequenceClassification, GenerationConfig, LlamaConfig, LlamaForCausalLM

from soups.folder import complete, interval
from soups.made_up import make_open_clip
from soups.mean import average_files
from soups.soup import Report
from soups.verify import record_of

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass
class Gain:
    mean: float
    low: float | None
    high: float | None


@dataclass
class Soup:
    recipe: str = "greedy"
    names: list = field(default_factory=lambda: ["m0", "m1", "m2"])
    shares: dict = field(default_factory=lambda: {"m1": 0.5, "m2": 0.5})
    alone: dict = field(default_factory=lambda: {"m0": 0.7, "m1": 0.8})
    score: float | None = 0.9
    metric: str = "top1"
    n: int | None = 10
    gain: Gain | None = field(default_factory=lambda: Gain(0.1, -0.05, 0.25))
    report: Report | None = field(default_factory=lambda: Report(0.85, 2000))


def written(paths, folder, **settings):
    folder.mkdir()
    average_files(paths, folder / "model.safetensors", **settings)
    complete(folder, paths[0], Soup())
    return folder


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """Three language models in shards, with generation settings and a trainer's files beside them."""
    folder = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16)
    model.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i in range(2):
        moved = {name: t + 0.01 * torch.randn_like(t) for name, t in start.items()}
        model.load_state_dict(moved)
        model.save_pretrained(folder / f"m{i}", max_shard_size="20KB")
        for name in ("trainer_state.json", "training_args.bin", "optimizer.pt", "README.md"):
            (folder / f"m{i}" / name).write_text("{}")
    return [folder / "m0", folder / "m1"]


def test_a_language_model_in_shards_becomes_one_that_generates(llamas, tmp_path):
    out = written(llamas, tmp_path / "soup")
    shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert shards.keys() == {file.name for file in llamas[0].glob("*.safetensors")} and len(shards) > 2
    average_files(llamas, tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    assert sum(map(len, shards.values())) == len(one)
    assert all(torch.equal(tensor, one[name]) for shard in shards.values() for name, tensor in shard.items())
    soup = LlamaForCausalLM.from_pretrained(out)  # whose numbers tests/test_kinds.py looks at
    assert soup.generation_config.max_new_tokens == 7
    assert {file.name for file in out.iterdir() if file.suffix != ".safetensors"} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in soup.state_dict().values())
    assert [part.file for part in record_of(out).ingredients] != []


def test_the_config_names_the_kind_of_number_that_was_written(llamas, tmp_path):
    out = written(llamas, tmp_path / "soup", dtype="F32")
    assert LlamaForCausalLM.from_pretrained(out).dtype == torch.float32
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_a_classifier_keeps_its_tokenizer_and_labels(hugging_face, tmp_path):
    out = written([hugging_face / f"texts/checkpoint-{i}" for i in range(2)], tmp_path / "soup")
    assert BertForSequenceClassification.from_pretrained(out).config.id2label == {0: "no", 1: "yes"}
    assert AutoTokenizer.from_pretrained(out)("good film")["input_ids"]
    card = (out / "README.md").read_text()
    assert 'pipeline_tag: "text-classification"' in card
    assert "BertForSequenceClassification.from_pretrained" in card


def test_open_clip_finds_its_own_name(tmp_path):
    torch.manual_seed(0)
    make_open_clip(tmp_path / "pool")
    out = written([tmp_path / f"pool/run{i}" for i in range(2)], tmp_path / "soup")
    clip = open_clip.create_model(f"local-dir:{out}")
    soup = load_file(out / "open_clip_model.safetensors")
    assert all(torch.equal(clip.state_dict()[name], tensor) for name, tensor in soup.items())


def test_the_card_says_score_n_and_intervals(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    out = written([tmp_path / "a.safetensors"], tmp_path / "soup")
    card = (out / "README.md").read_text()
    assert "top1 0.9 on n = 10 examples (95 % interval 0.5958 to 0.9821" in card
    assert "Over the best single model: +0.1 (95 % interval -0.05 to +0.25, paired)." in card
    assert "On examples of n = 2,000 that selected nothing: top1 0.85." in card
    assert "| m1 | 0.5 | 0.8 |\n| m2 | 0.5 |  |\n| m0 | left out | 0.7 |" in card
    assert 'load_file("FOLDER/model.safetensors")' in card
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "model.safetensors"]


def test_an_interval_is_wilsons_and_that_of_all_right_ends_at_one():
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with z = 1.959964, p = 9 / 10, n = 10
    assert interval(9, 10) == pytest.approx((0.59585, 0.98212), abs=1e-5)
    assert 1 - 1e-6 < interval(10, 10)[1] <= 1.0
