"""The benchmark of curvatures asks all contenders the same, and measures each."""

import sys
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.curvature import CONTENDERS, differences, double_backward, measured, ours, problem
from tests.commands import python

pytestmark = pytest.mark.slow  # a benchmark runs


def test_ours_and_double_backward_answer_alike_and_differences_nearly():
    p = problem("test_vit", 2)
    exact = double_backward(p)
    assert ours(p) == pytest.approx(exact, rel=1e-4)
    assert differences(p) == pytest.approx(exact, rel=0.2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_every_contender_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "executable", python())  # of the processes whose memory is measured
    options = Namespace(network="test_resnet", batch=2, rounds=1, threads=1)
    rows = pd.DataFrame(measured(options)).set_index("contender")
    assert list(rows.index) == list(CONTENDERS)
    assert rows.times_double_backward["double_backward"] == 1
    assert (rows.seconds > 0).all()
    assert rows.off_percent["curvlinops"] == pytest.approx(0, abs=0.1)  # without a layer norm it is right
