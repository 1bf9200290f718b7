"""Rows of a sweep are keyed: the same for ever, whatever is added beside them."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.chance import seed, uniform
from configs.errors import UserError
from configs.schema import load
from configs.training import Choice, Integers, LogUniform, ZeroOrUniform
from finetune.listing import differing, print_rows
from finetune.rows import draw, identity, inverse, row_config


def test_the_keyed_numbers_are_the_ones_of_every_earlier_run():
    # blake2b-64 of "0/17/optim.lr", its top 53 bits over 2**53.
    assert uniform(0, 17, "optim.lr") == 0.6014784406838153
    assert seed(0, 17, "run") == 7219473067861316596


def test_keyed_numbers_are_uniform_and_independent_of_their_neighbours():
    grid = np.array([[uniform(s, row, "field") for row in range(200)] for s in range(20)])
    assert abs(grid.mean() - 0.5) < 0.02
    assert abs(grid.std() - 12**-0.5) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.05


def test_each_distribution_is_the_inverse_of_its_definition():
    assert inverse(LogUniform(kind="log10_uniform", low=-6, high=-4), 0.5) == pytest.approx(1e-5)
    half = ZeroOrUniform(kind="zero_or_uniform", zero=0.5, low=0.2, high=0.4)
    assert [inverse(half, u) for u in (0.0, 0.49, 0.5, 0.75)] == [0, 0, 0.2, pytest.approx(0.3)]
    assert [inverse(Integers(kind="integers", low=4, high=7), u) for u in (0, 0.25, 0.5, 0.99)] == [4, 5, 6, 7]
    weighted = Choice(kind="choice", values=("minimal", "rand", "rand"))
    assert [inverse(weighted, u) for u in (0.3, 0.34, 0.99)] == ["minimal", "rand", "rand"]


def test_adding_a_field_or_a_row_moves_no_other_draw():
    config = load("demo")
    added = {"model": {"frozen_stages": Integers(kind="integers", low=1, high=2)}}
    more = replace(config.sweep, rows=100, draw=added | config.sweep.draw)
    grown = replace(config, sweep=more)
    for row in (1, 2, 12):
        old, new = draw(config, row), draw(grown, row)
        assert {field: new[field] for field in old} == old


def test_rows_and_seeds_differ_and_row_0_is_the_initialisation():
    config = load("demo")
    other = replace(config, sweep=replace(config.sweep, seed=1))
    assert draw(config, 0) == {}
    assert draw(config, 1) != draw(config, 2)
    assert draw(config, 1) != draw(other, 1)


def test_drawn_values_land_in_the_row_and_within_the_sweeps_bounds():
    config = load("demo", "sweep.rows=40")
    for row in range(1, 41):
        optim = row_config(config, row).optim
        law = config.sweep.draw["optim"]["lr"]
        assert 10**law.low <= optim.lr < 10**law.high
        assert optim.lr == draw(config, row)["optim.lr"]


def test_a_row_is_identified_by_what_changes_its_weights_and_by_nothing_else():
    config = load("demo")
    assert identity(config, 3) == identity(load("demo", "sweep.rows=40", "cluster.workers=1", "recipes=[best]"), 3)
    assert identity(config, 3) != identity(config, 4)
    assert identity(config, 3) != identity(load("demo", "optim.clip_norm=2"), 3)
    assert identity(config, 0) == identity(load("demo", "optim.clip_norm=2"), 0)
    assert identity(config, 3) != identity(load("demo", "sweep.seed=5"), 3)
    assert identity(config, 3) == identity(load("demo", "task.shifts=[v2]", "+task.metrics.test=macro_f1"), 3)
    assert identity(config, 3) != identity(load("demo", "task.held_out=v2", "task.shifts=[r]"), 3)
    texts = load("demo_text")
    assert identity(texts, 3) == identity(load("demo_text", "task.take.nyt=50", "task.take.test=90"), 3)
    assert identity(texts, 3) != identity(load("demo_text", "task.take.train=1500"), 3)


def test_a_sweep_over_a_field_that_does_not_exist_is_refused():
    config = load("demo")
    sweep = replace(config.sweep, draw={"optim": {"learning_rate": Integers(kind="integers", low=1, high=2)}})
    with pytest.raises(UserError, match=r"the sweep varies optim.learning_rate"):
        row_config(replace(config, sweep=sweep), 1)


def test_a_draw_outside_a_fields_limits_is_refused():
    config = load("demo")
    sweep = replace(config.sweep, draw={"optim": {"lr": Integers(kind="integers", low=-1, high=-1)}})
    with pytest.raises(UserError, match=r"optim.lr: Input should be greater than 0"):
        row_config(replace(config, sweep=sweep), 1)


def test_the_list_of_rows_has_the_settings_that_differ_and_no_others():
    names, values = differing(load("demo_sam"))
    assert names == ["optim.seed", "regularizer.sam"]
    sam = {"rho": 0.05, "synchronised": True}
    assert values == [[0, None], [1, None], [0, sam], [1, sam]]


def test_the_list_of_rows_is_not_cut_in_a_log_and_starts_with_the_initialisation():
    log = io.StringIO()
    print_rows(load("demo"), "experiment=demo", Console(file=log, width=40))
    lines = [line.split() for line in log.getvalue().splitlines()]
    head, *rows = [words for words in lines if words and (words[0] == "row" or words[0].isdigit())]
    assert head[1:] == differing(load("demo"))[0]
    assert rows[0] == ["0", "initialisation"]
    assert [row[0] for row in rows] == [str(number) for number in range(13)]
    assert rows[3][1] == f"{draw(load('demo'), 3)['optim.lr']:.4g}"


def test_rows_of_each_replicate_are_listed():
    log = io.StringIO()
    print_rows(load("demo_seeds"), "experiment=demo_seeds", Console(file=log))
    for number in range(3):
        assert f"demo_seeds/seed{number}" in log.getvalue()


def test_the_command_lists_rows_and_says_what_to_run_next():
    command = [sys.executable, "-m", "finetune.rows", "experiment=demo", "optim.clip_norm=2"]
    root = Path(__file__).resolve().parents[1]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "python -m finetune experiment=demo optim.clip_norm=2 sweep.index=1" in answer.stdout
    assert max(map(len, answer.stdout.splitlines())) > 80
