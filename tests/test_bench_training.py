"""The benchmark of the training loop compares two loops that do the same, and runs from end to end."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.training import Step, one_round, settings
from tasks.load import load_split
from tests.commands import here

pytestmark = pytest.mark.slow  # a benchmark runs

ROOT = Path(__file__).resolve().parents[1]


def test_overhead_is_what_ours_takes_longer_in_shares_of_a_step_without_its_batch():
    assert Step(ours=1.3, bare=1.0, batch=0.2).overhead == pytest.approx(0.1)


def test_both_loops_end_with_the_same_weights():
    config = settings("demo_tiny", 4)
    found = one_round(config, load_split(config.task, config.task.train))
    assert len(found.steps) == 2
    ours, bare = (model.state_dict() for model in found.models)
    start = one_round(settings("demo_tiny", 3), load_split(config.task, config.task.train)).models[0].state_dict()
    moved = max((ours[name] - start[name]).abs().max() for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], bare[name], rtol=0, atol=float(moved) / 10)


def test_the_benchmark_measures_and_writes_its_table(tmp_path):
    options = ["--experiment", "demo_tiny", "--rounds", "1", "--steps", "4", "--out", tmp_path / "bench.csv"]
    answer = here(["-m", "benchmarks.training", *map(str, options)])
    assert answer.returncode == 0, answer.stderr
    (row,) = pd.read_csv(tmp_path / "bench.csv").to_dict("records")
    assert row["steps"] == 2
    assert row["ours_seconds"] > row["batch_seconds"] > 0
    assert row["bare_seconds"] > row["batch_seconds"]
