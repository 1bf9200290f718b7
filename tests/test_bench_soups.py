"""The benchmarks of averaging run on files of a few kilobytes, and have the shapes they speak of."""

import sys
from argparse import Namespace
from math import prod
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import greedy, large, soups
from benchmarks.all import BARS
from soups.errors import UserError
from tests.commands import python

pytestmark = pytest.mark.slow  # a benchmark runs
reads_memory = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it is read from Linux's /proc")


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    """Those that are measured start at once."""
    monkeypatch.setattr(sys, "executable", python())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a benchmark sets it, and it is put back


def test_the_synthetic_checkpoints_are_of_vit_b_32():
    found = soups.shapes(768)
    assert (len(found), sum(map(prod, found.values()))) == (154, 87_849_216 + 513_000)


@reads_memory
def test_every_contender_averages_and_is_measured(tmp_path, capsys):
    options = Namespace(folder=tmp_path, models=3, files=2, width=12, rounds=1, mergekit_python=None)
    rows = pd.DataFrame(soups.measured(options)).set_index("contender")
    assert "mergekit is left out: no environment that has it was named" in capsys.readouterr().out
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


@reads_memory
def test_greedy_soups_are_measured_beside_their_forward_passes(tmp_path):
    small = {"network": "test_resnet", "models": 2, "pictures": 12, "threads": 1, "rounds": 1}
    (row,) = greedy.measured(Namespace(folder=tmp_path, **small, large_models=2, large_width=12))
    assert row["times_forward_passes"] > 1
    assert row["large_peak_anonymous_mib"] > 1


def test_large_checkpoints_are_of_llama_7b():
    assert (large.width_of(7e9), large.parameters(4096)) == (4096, 6_738_415_616)


def test_a_large_benchmark_without_room_is_refused_and_leaves_nothing(tmp_path):
    width = large.width_of(1e15)
    with (
        pytest.raises(UserError, match=r"799\d{4}\.\d GB are needed and .* GB are free: name another disk"),
        large.room(tmp_path / "bench_large", width, keep=True),
    ):
        pytest.fail("there is no such disk")
    assert list(tmp_path.iterdir()) == []


@reads_memory
def test_soups_of_sharded_checkpoints_are_measured_cold_and_warm_and_the_folder_goes(tmp_path, capsys, monkeypatch):
    for name in ("TMPDIR", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # it sets them, and they are put back
    given = {"parameters": 1, "mergekit_python": None, "cold": "posix_fadvise", "keep": False}
    rows = pd.DataFrame(large.measured(Namespace(folder=tmp_path, **given)))
    assert "mergekit is left out: no environment that has it was named" in capsys.readouterr().out
    recipes = ["uniform", "uniform", "arithmetic", "arithmetic", "greedy", "greedy"]
    assert list(zip(rows.recipe, rows.state, strict=True)) == list(zip(recipes, ["cold", "warm"] * 3, strict=True))
    assert (rows.seconds > 0).all() and rows.peak_anonymous_mib.between(1, 300).all()
    assert rows.cold_by[0] == "posix_fadvise"
    assert list(tmp_path.iterdir()) == []
    (bar,) = [bar for bar in BARS.values() if bar.benchmark == "large"]
    assert bar.ours(rows.set_index("contender")) == rows.peak_anonymous_mib.max()
