"""Greedy on files of one's own: a real network of timm, real pictures in folders, the real command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow  # commands are started

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "test_vit"  # timm's smallest vision transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, black and white pictures; three models: right, inverted, and right with larger logits."""
    root = tmp_path_factory.mktemp("own")
    for name, shade in (("black", 0), ("white", 255)):
        (root / "held_out" / name).mkdir(parents=True)
        for i in range(6):
            image = np.clip(shade + np.random.default_rng(i).integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "held_out" / name / f"{i}.png")
    torch.manual_seed(0)
    network = timm.create_model(NETWORK, num_classes=2).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    ends = torch.stack([transform(Image.new("RGB", (32, 32), (shade,) * 3)) for shade in (0, 255)])
    with torch.no_grad():
        black, white = network.forward_head(network.forward_features(ends), pre_logits=True)
        network.head.weight.copy_(torch.stack([black - white, white - black]))
        network.head.bias.copy_(-(network.head.weight @ ((black + white) / 2)))
    right = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    inverted = right | {name: -right[name] * 3 for name in ("head.weight", "head.bias")}
    louder = right | {name: right[name] * 1.5 for name in ("head.weight", "head.bias")}
    for name, state in (("a", right), ("b", inverted), ("c", louder)):
        save_file(state, root / f"{name}.safetensors")
    return root


def cook(folder, *overrides):
    command = [sys.executable, "-m", "soups", "recipe=greedy", f"ingredients=[{folder}/?.safetensors]"]
    command += [f"out={folder}/soup.safetensors", "task=image_folder", f"task.root={folder}/held_out", "model=timm"]
    return subprocess.run(
        [*command, f"model.name={NETWORK}", *overrides], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_greedy_keeps_the_models_that_agree_and_records_every_decision(folder):
    answer = cook(folder)
    assert answer.returncode == 0, answer.stderr
    assert "2 models" in answer.stdout
    with safe_open(folder / "soup.safetensors", "pt") as file:
        record = json.loads(file.metadata()["soup"])
    assert {ingredient["file"] for ingredient in record["ingredients"]} == {"a.safetensors", "c.safetensors"}
    decisions = {d["file"]: (d["score"], d["accepted"]) for d in record["note"]["decisions"]}
    assert decisions["a.safetensors"] == (1.0, True)
    assert decisions["c.safetensors"] == (1.0, True)
    assert decisions["b.safetensors"] == (0.0, False)
    soup, one, other = (load_file(folder / f"{name}.safetensors") for name in ("soup", "a", "c"))
    torch.testing.assert_close(soup["head.weight"], (one["head.weight"] + other["head.weight"]) / 2)
    assert not list(folder.glob("*.journal.jsonl"))
    again = subprocess.run(
        [sys.executable, "-m", "soups.verify", folder / "soup.safetensors"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.root=nowhere", "task.root=nowhere: "),
        ("model.name=no_such_network", "model.name=no_such_network: "),
        ("model.name=test_resnet", "is not of this network"),
        ("recipe=uniform", "recipe=greedy needs held-out images and a network"),
    ],
)
def test_what_does_not_fit_is_answered_in_one_line(folder, override, words):
    answer = cook(folder, override)
    assert answer.returncode == 2
    assert words in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_a_folder_with_another_number_of_classes_is_refused_by_shape(folder):
    (folder / "held_out" / "grey").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "held_out/grey/0.png")
    answer = cook(folder)
    assert answer.returncode == 2
    assert "the network with a class for each folder of task.root has (3, 64)" in answer.stderr
