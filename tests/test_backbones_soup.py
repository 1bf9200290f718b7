"""Soups of towers that were trained on other classes: zero-shot, as the experiment's own uniform soup."""

import json

import pandas as pd
import pytest
import torch

from analysis.measure import methods as results
from analysis.tables.cells import table3
from configs.errors import UserError
from configs.schema import load
from eval.forward import Evaluator
from finetune.train import train_row
from soups.experiment.backbones import measure, run
from soups.experiment.soups import make_soup
from soups.files.weights import load_weights

pytestmark = pytest.mark.slow  # rows are trained
SMALL = ["recipes=[best]", "optim.epochs=1", "optim.warmup_steps=2", "optim.batch_size=8", "analysis.resamples=100"]
SMALL += [
    "cluster.workers=1",
    "task.classes=12",
    "task.shifts=[v2]",
    "sweep.listed=[{task:{parts:6,part:0}},{task:{parts:6,part:1}}]",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    config = load("demo_cross_dataset", *SMALL, f"paths.runs={tmp_path_factory.mktemp('runs')}")
    for row in range(3):
        train_row(config, row)
    return config


def towers(config, rows):
    root = config.paths.runs / config.name / "ingredients"
    listed = ",".join(str(root / f"{row:03d}") for row in rows)
    return load("demo_cross_dataset", *SMALL, f"paths.runs={config.paths.runs}", "name=mine", f"towers=[{listed}]")


def test_rows_of_other_tasks_end_with_the_head_of_the_experiments_task(config):
    root = config.paths.runs / config.name / "ingredients"
    start, *tuned = (load_weights(root / f"{row:03d}" / "weights.safetensors") for row in range(3))
    for weights in tuned:
        assert torch.equal(weights["head.weight"], start["head.weight"])
        assert any(not torch.equal(weights[name], start[name]) for name in weights)
    held_out = json.loads((root / "001/done.json").read_text())["held_out"]["n"]
    assert held_out == len(Evaluator(config).split("held_out"))


def test_each_average_is_the_uniform_soup_of_the_pretrained_model_and_the_towers_so_far(config, tmp_path):
    table = measure(towers(config, [1, 2]))
    assert list(table["pool"].unique())[::2] == ["zero-shot", "zero-shot + 1 towers", "zero-shot + 2 towers"]
    models = [
        load_weights(config.paths.runs / config.name / f"ingredients/00{row}/weights.safetensors") for row in range(3)
    ]
    mean = {name: torch.stack([m[name].double() for m in models]).mean(0).float() for name in models[0]}
    evaluator = Evaluator(config)
    right = int(evaluator.hits(evaluator.fresh_logits(mean, "test"), "test").sum())
    last = table[(table["pool"] == "zero-shot + 2 towers") & (table["split"] == "test")].iloc[0]
    assert last["correct"] == right
    first = table[table["pool"] == "zero-shot"]
    assert first["difference"].eq(0).all()


def test_the_command_writes_its_table_and_says_where(config, capsys):
    run(towers(config, [2]))
    path = config.paths.runs / "mine/backbones.csv"
    assert str(path) in capsys.readouterr().out
    assert set(pd.read_csv(path)["split"]) == set(config.task.reported)


def test_what_is_no_row_or_no_tower_of_this_network_is_named(config, tmp_path):
    with pytest.raises(UserError, match="holds no finished row"):
        measure(towers(config, [9]))
    with pytest.raises(UserError, match="name rows in towers"):
        measure(config)


def test_a_zero_shot_initialisation_stands_in_a_table_once_and_under_its_name(config):
    evaluator = Evaluator(config)
    make_soup("best", evaluator)
    _, methods = results.measure(evaluator)
    assert [method.name for method in methods] == ["initialisation", "best"]
    table = table3(results.tidy(methods, evaluator), config.task, config.model.head)
    assert list(table["Method"]) == ["Initialisation (zero-shot)", "Best individual model"]
