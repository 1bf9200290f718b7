"""The benchmark of averaging runs from end to end on files of a few kilobytes, and has the shapes it speaks of."""

import subprocess
from math import prod
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.all import BARS
from benchmarks.large import config, parameters, room, width_of
from benchmarks.large import shapes as llama
from benchmarks.soups import shapes
from soups.errors import UserError
from tests.commands import python

pytestmark = pytest.mark.slow  # a benchmark runs

ROOT = Path(__file__).resolve().parents[1]


def test_the_synthetic_checkpoints_are_of_vit_b_32():
    found = shapes(768)
    assert (len(found), sum(map(prod, found.values()))) == (154, 87_849_216 + 513_000)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_every_contender_averages_and_is_measured(tmp_path):
    options = [
        "--folder",
        tmp_path,
        "--models",
        "3",
        "--files",
        "2",
        "--width",
        "12",
        "--rounds",
        "1",
        "--out",
        tmp_path / "bench.csv",
    ]
    command = [python(), "-m", "benchmarks.soups", *map(str, options)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "mergekit is left out: no environment that has it was named" in answer.stdout
    rows = pd.read_csv(tmp_path / "bench.csv").set_index("contender")
    assert list(rows.index) == ["read", "loop", "timm", "ours"]
    assert rows.times_read["read"] == 1
    assert (rows.peak_anonymous_mib > 1).all()
    assert (rows.seconds > 0).all()
    ours = load_file(tmp_path / "out_ours.safetensors")
    for other in ("loop", "timm"):
        theirs = torch.load(tmp_path / f"out_{other}.pt", weights_only=True)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_greedy_soups_are_measured_beside_their_forward_passes(tmp_path):
    small = ["--network", "test_resnet", "--models", "2", "--pictures", "12", "--rounds", "1"]
    large = ["--large-models", "2", "--large-width", "12"]
    options = ["--folder", tmp_path, *small, *large, "--out", tmp_path / "bench.csv"]
    command = [python(), "-m", "benchmarks.greedy", *map(str, options)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    (row,) = pd.read_csv(tmp_path / "bench.csv").to_dict("records")
    assert row["times_forward_passes"] > 1
    assert row["large_peak_anonymous_mib"] > 1


def test_large_checkpoints_have_the_shapes_of_llama_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    assert (width_of(7e9), parameters(4096)) == (4096, 6_738_415_616)
    with torch.device("meta"):
        for width in (128, 4096):
            network = LlamaForCausalLM(LlamaConfig(**config(width)))
            assert {name: tuple(each.shape) for name, each in network.state_dict().items()} == llama(width)


def test_a_large_benchmark_without_room_is_refused_and_leaves_nothing(tmp_path):
    width = width_of(1e15)
    with (
        pytest.raises(UserError, match=r"799\d{4}\.\d GB are needed and .* GB are free: name another disk"),
        room(tmp_path / "bench_large", width, keep=True),
    ):
        pytest.fail("there is no such disk")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_soups_of_sharded_checkpoints_are_measured_cold_and_warm_and_the_folder_goes(tmp_path):
    (tmp_path / "mine").mkdir()
    options = ["--folder", tmp_path / "mine", "--parameters", "1", "--no-mergekit", "--cold", "posix_fadvise"]
    command = [python(), "-m", "benchmarks.large", *map(str, options), "--out", str(tmp_path / "bench_large.csv")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "mergekit: not measured, since it is left out" in answer.stdout
    rows = pd.read_csv(tmp_path / "bench_large.csv")
    recipes = ["uniform", "uniform", "arithmetic", "arithmetic", "greedy", "greedy"]
    assert list(zip(rows.recipe, rows.state, strict=True)) == list(zip(recipes, ["cold", "warm"] * 3, strict=True))
    assert (rows.seconds > 0).all() and rows.peak_anonymous_mib.between(1, 300).all()
    assert rows.cold_by[0] == "posix_fadvise" and rows.commit.nunique() == 1
    assert list((tmp_path / "mine").iterdir()) == []
    (bar,) = [bar for bar in BARS if bar.benchmark == "large"]
    assert bar.ours(rows.set_index("contender")) == rows.peak_anonymous_mib.max()
