"""The benchmark of averages along a run measures what the callbacks do."""

from argparse import Namespace

import pandas as pd
import pytest

from benchmarks.along import measured

pytestmark = pytest.mark.slow  # a benchmark runs


def test_every_contender_is_measured():
    options = Namespace(width=32, layers=1, batch=1, tokens=8, rounds=5, every=4, threads=1)
    rows = pd.DataFrame(measured(options)).set_index("contender")
    assert (rows.seconds > 0).all() and rows.parameters.nunique() == 1
    share = 25 * rows.seconds["update"] / rows.seconds["step"]  # of four steps, in percent
    assert rows.percent_of_step["update"] == pytest.approx(share, rel=0.2)  # seconds are rounded
    assert rows.times_floor["update"] > 0.2  # it does not move fewer bytes
