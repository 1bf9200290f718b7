"""Folders of one's own images and a network of timm go through every stage by settings alone."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import reproduce
from configs.errors import UserError
from configs.schema import load
from tests.commands import here

COLOURS = {"blue sky": (60, 90, 220), "grass": (50, 180, 60), "red-brick": (200, 60, 40)}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 14), ("val", 6), ("night", 5)):
        for name, colour in COLOURS.items():
            shade = 0.5 if split == "night" else 1.0
            for i in range(count):
                wrong = split == "val" and name == "grass" and i < 3  # what nobody gets right, so that scores differ
                shown = shade * np.array(COLOURS["blue sky"] if wrong else colour)
                path = folder / "data" / split / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(i + 100 * (split == "val")).normal(shown, 25, (200, 180 + 7 * i, 3))
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit.r160_in1k").state_dict(), folder / "model.safetensors")
    data = ["task.num_classes=3", "task.shifts=[night]", "+task.folders.test=val", "task.held_out_per_class=4"]
    network = ["model=timm", "model.name=test_vit.r160_in1k", "model.image_size=160", "model.probe_c=[1]"]
    small = ["optim.batch_size=6", "~sweep.draw.optim.epochs", "optim.epochs=1", "sweep.rows=2", "compute=cpu"]
    small += ["cluster=local", "cluster.workers=1"]  # the shipped eight threads wait for each other on two cores
    small += ["recipes=[best,uniform,greedy,learned,greedy_ensemble]", "analysis.resamples=200"]
    places = [f"task.folder={folder / 'data'}", f"model.weights={folder / 'model.safetensors'}"]
    return ["experiment=own_images", *places, f"paths.runs={folder / 'runs'}", *data, *network, *small], folder


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_folders_of_images_go_through_every_stage(settings):
    arguments, folder = settings
    cache = [f"compute.decoded={folder / 'decoded'}", "compute.loader_workers=1"]
    ended = here(["reproduce.py", *arguments, *cache])
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    table = pd.read_csv(folder / "runs/own_images/analysis/table3.csv")
    assert set(table["column"]) == {"test", "night", "shift_mean"}
    assert table.loc[table["column"] == "test", "n"].eq(18).all()
    done = json.loads((folder / "runs/own_images/ingredients/001/done.json").read_text())
    assert done["held_out"]["n"] == 12
    assert not (folder / "runs/own_images/zero_shot").exists()
    assert list((folder / "decoded").rglob("*.arrow"))

    by_f1 = [*arguments, "+task.metrics.test=macro_f1", "task.shifts=[]", "recipes=[best,uniform,greedy]"]
    ended = here(["-m", "analysis", *by_f1])
    assert ended.returncode == 0, ended.stderr
    assert "figure1.pdf" not in ended.stdout
    assert "over the best single model: " in ended.stdout.splitlines()[-1]
    other = pd.read_csv(folder / "runs/own_images/analysis/table3.csv").set_index(["method", "column"])
    assert set(other.index.get_level_values("column")) == {"test"}
    accuracy = table.set_index(["method", "column"]).loc[other.index, "accuracy"]
    assert (other["accuracy"] != accuracy).any()
    assert other["accuracy"].between(0, 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("task.num_classes=4", "task.num_classes=4"),
        ("task.shifts=[fog]", "fog"),
        ("model.weights=nowhere.safetensors", "model.weights=nowhere.safetensors: no such file or folder"),
    ],
)
def test_what_is_wrong_with_data_or_weights_is_said_in_one_line_before_training(change, words, settings):
    arguments, folder = settings
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        reproduce.run(load("own_images", *arguments[1:], change, f"paths.runs={folder / 'wrong'}"))
    assert "\n" not in str(refused.value)
    assert not list((folder / "wrong").rglob("weights.safetensors"))
