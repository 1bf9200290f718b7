"""Figures 2 and J.1: the plane by hand, its three models where they belong, and a grid that survives a kill."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rich
import torch
from safetensors.torch import save_file

from analysis.artefacts import write_artefact
from analysis.figures.landscape import (
    LEVELS,
    axes_of,
    draw_landscape,
    levels,
    plane_through,
    set_between,
    shares_at,
    slices,
    training_rows,
)
from configs.errors import UserError
from configs.schema import load
from eval.forward import Evaluator
from eval.metrics import nll
from soups.conformance import common_layout
from soups.files.opening import opened
from soups.geometry import geometry
from store.runs import RunFolder
from tests.pools import moved_pool, recorded_pool, small_network

pytestmark = pytest.mark.usefixtures("in_process")

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "cluster.workers=1",
    "task.classes=10",
    "analysis.plane.rows=[[1,2]]",
    "analysis.plane.size=3",
    "analysis.plane.longest=3",
    "analysis.plane.train_examples=15",
    "analysis.plane.chunk=8",
)


def three_models():
    generator = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(30, 7, generator=generator), "b": torch.randn(5, generator=generator)}
    return [start] + [
        {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in start.items()} for _ in range(2)
    ]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Three models and their plane, measured from files."""
    folder, models = tmp_path_factory.mktemp("toy"), three_models()
    files = [folder / f"{i}.safetensors" for i in range(3)]
    for file, model in zip(files, models, strict=True):
        save_file(model, file)
    with opened(files) as (start, *tuned):
        return models, plane_through(geometry(tuned, common_layout([start, *tuned]), start).products)


def flat(model):
    return torch.cat([tensor.double().flatten() for tensor in model.values()])


def mixed(models, shares):
    state = {name: torch.full_like(tensor, 7.0) for name, tensor in models[0].items()}
    set_between(state, models, shares)
    return state


def test_two_parameters_by_hand():
    # From (1, 1) to (4, 5) and to (1, 6): u1 = (3, 4) / 5, and (0, 5) is 4 along it and 3 across.
    one, two = np.array([3.0, 4.0]), np.array([0.0, 5.0])
    plane = plane_through(np.array([[one @ one, one @ two], [one @ two, two @ two]]))
    assert plane[:2] == ((0, 0), (5, 0))
    assert plane[2] == pytest.approx((4, 3))
    assert shares_at(plane, 9, 3) == pytest.approx((-1, 1, 1))


def test_the_basis_is_orthonormal_and_points_are_where_their_coordinates_say(toy):
    models, plane = toy
    start, *_ = vectors = [flat(model) for model in models]

    def at(x, y):
        return sum(share * vector for share, vector in zip(shares_at(plane, x, y), vectors, strict=True))

    u1, u2 = at(1, 0) - start, at(0, 1) - start
    products = torch.stack([torch.stack([a @ b for a in (u1, u2)]) for b in (u1, u2)])
    torch.testing.assert_close(products, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(at(-0.7, 2.5), start - 0.7 * u1 + 2.5 * u2, rtol=0, atol=1e-12)
    assert (vectors[1] - start) @ u1 > 0
    assert (vectors[2] - start) @ u2 > 0


def test_the_three_models_are_at_their_coordinates_to_the_bit(toy):
    models, plane = toy
    for (x, y), model in zip(plane, models, strict=True):
        found = mixed(models, shares_at(plane, x, y))
        assert all(torch.equal(found[name], model[name]) for name in model)


def test_between_models_weights_are_summed_in_float64_and_rounded_once():
    models = [{"w": torch.tensor([1.0, 2**-30])}, {"w": torch.tensor([1.0 + 2**-23, 2**-30])}]
    # A third of the smallest step above 1 rounds down and two thirds up; in float32 both products round first.
    assert mixed(models, (2 / 3, 1 / 3))["w"][0] == 1.0
    assert mixed(models, (1 / 3, 2 / 3))["w"][0] == 1.0 + 2**-23
    assert mixed(models, (2.0, -1.0))["w"][0] == 1.0 - 2**-23
    # What the first adds, the third takes away, and the small one in between is not lost.
    small = [{"w": torch.tensor([value])} for value in (1.0, 2**-30, 1.0)]
    assert mixed(small, (1.0, 1.0, -1.0))["w"][0] == 2**-30


@pytest.mark.parametrize("products", [[[4.0, 8.0], [8.0, 16.0]], [[0.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
def test_three_models_on_a_line_make_no_plane(products):
    with pytest.raises(ValueError, match="one line"):
        plane_through(np.array(products))


def test_the_grid_reaches_beyond_the_models_by_the_margin():
    xs, ys = axes_of(((0, 0), (10, 0), (-2, 4)), 4, 4, 0.5)
    assert xs.tolist() == pytest.approx([-8, 0, 8, 16])
    assert ys.tolist() == pytest.approx([-2, 0.6666667, 3.3333333, 6])


def test_a_model_far_away_gets_more_points_at_the_same_spacing_up_to_the_longest():
    far = (0, 0), (10, 0), (2, 60)  # reaches 10 along x and 60 along y
    xs, ys = axes_of(far, 5, 100, 0.5)
    assert len(xs) == 5
    assert np.diff(ys) == pytest.approx(np.full(24, np.diff(xs)[0]))
    assert [len(axis) for axis in axes_of(far, 5, 9, 0.5)] == [5, 9]
    assert [len(axis) for axis in axes_of(far, 5, 3, 0.5)] == [5, 5]  # never fewer than the other
    assert [len(axis) for axis in axes_of(((0, 0), (60, 0), (2, 10)), 5, 9, 0.5)] == [9, 5]


def test_more_training_examples_keep_those_there_were():
    few, more = (set(training_rows(500, count, 0).tolist()) for count in (20, 60))
    assert len(few) == 20
    assert few < more
    assert few != set(training_rows(500, 20, 1).tolist())
    assert training_rows(30, 60, 0).tolist() == list(range(30))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def configured(network):
    """Settings of a pool in a folder, with others on request."""
    return lambda runs, *settings: load("demo_tiny", f"paths.runs={runs}", *SETTINGS, *network, *settings)


@pytest.fixture(scope="module")
def measured(configured, tmp_path_factory):
    config = configured(tmp_path_factory.mktemp("runs"))
    weights = moved_pool(config)
    log = StringIO()
    rich.reconfigure(file=log, width=200)
    files = write_artefact("figure2", [config])
    rich.reconfigure()
    assert re.match(r"\d+ planes? of \d+ points: [\d,]+ forward passes, about \d+ s", log.getvalue())
    return config, weights, files


@pytest.mark.slow
def test_the_three_models_have_their_own_loss_and_errors(measured):
    config, weights, files = measured
    assert [file.name for file in files] == ["figure2.pdf", "figure2.png", "figure2.csv"]
    tidy, evaluator = pd.read_csv(files[-1]), Evaluator(config)
    assert tidy["point"].tolist() == ["initialisation", "first", "second"] + ["grid"] * 9
    rows = training_rows(len(evaluator.split("train")), 15, 0)
    for row, point in enumerate(tidy.iloc[:3].itertuples()):
        evaluator.model.load_state_dict(weights[row])
        logits = evaluator.fresh_logits(weights[row], "train", rows)
        assert point.train_loss == pytest.approx(nll(logits, evaluator.split("train").labels[rows]), rel=1e-5)
        errors = []
        for split in config.task.reported:
            errors.append(1 - evaluator.score(evaluator.fresh_logits(weights[row], split), split))
            assert getattr(point, f"error_{split}") == pytest.approx(errors[-1])
        assert point.error_shift_mean == pytest.approx(sum(errors[1:]) / 5)
    assert (tidy["train_n"] == 15).all()
    assert tidy[["share_0", "share_1", "share_2"]].sum(axis=1).tolist() == pytest.approx([1] * 12)


@pytest.mark.slow
def test_a_point_of_the_grid_is_evaluated_with_the_sum_of_its_shares(measured):
    config, weights, files = measured
    evaluator, point = Evaluator(config), pd.read_csv(files[-1]).iloc[7]  # the middle of the grid
    shares = [point[f"share_{i}"] for i in range(3)]
    found = {
        name: sum(s * weights[i][name].double() for i, s in enumerate(shares)).float() if t.is_floating_point() else t
        for name, t in weights[0].items()
    }
    assert 1 - evaluator.score(evaluator.fresh_logits(found, "test"), "test") == pytest.approx(point["error_test"])


@pytest.mark.slow
def test_figure_j1_draws_the_same_numbers_and_evaluates_nothing_again(measured):
    config, _, files = measured
    before = {path: path.stat().st_mtime_ns for path in RunFolder.of(config).root.rglob("*.npy")}
    again = write_artefact("figurej1", [config])
    assert [file.name for file in again] == ["figurej1.pdf", "figurej1.png", "figurej1.csv"]
    assert again[-1].read_bytes() == files[-1].read_bytes()
    assert {path: path.stat().st_mtime_ns for path in RunFolder.of(config).root.rglob("*.npy")} == before


@pytest.mark.slow
def test_a_grid_that_was_cut_off_continues_to_the_same_csv(measured):
    config, _, files = measured
    csv, pieces = files[-1].read_bytes(), sorted((RunFolder.of(config).root / "landscape").rglob("*.npy"))
    for path in pieces[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in pieces[1::2]}
    assert kept and write_artefact("figure2", [config])[-1].read_bytes() == csv
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and all(path.exists() for path in pieces)


@pytest.mark.slow
def test_other_weights_or_points_are_evaluated_anew(measured, configured):
    config, _, _ = measured
    piece, *_ = slices(config)
    start, one, two = piece.models
    names = {piece.name, replace(piece, models=(start, one, replace(two, digest="0" * 32))).name}
    names.add(slices(configured(config.paths.runs, "analysis.plane.margin=0.3"))[0].name)
    assert len(names) == 3
    assert slices(config)[0].name == piece.name


@pytest.mark.slow
def test_rows_that_make_no_plane_name_the_setting(measured, configured, tmp_path):
    config, _, _ = measured
    with pytest.raises(UserError, match=r"analysis\.plane\.rows: demo_tiny has no row 7.*\[1, 2, 3\]"):
        slices(configured(config.paths.runs, "analysis.plane.rows=[[1,7]]"))
    with pytest.raises(UserError, match=r"analysis\.plane\.rows=\[2, 2\]: .*one line"):
        slices(configured(config.paths.runs, "analysis.plane.rows=[[2,2]]"))
    recorded_pool(configured(tmp_path), diverged=[2])
    with pytest.raises(UserError, match="no row 2"):
        slices(configured(tmp_path))


def test_levels_are_equal_steps_or_equal_factors_above_the_least():
    values = np.array([[1.0, np.nan], [3.0, 2.0]])
    steps, factors = levels(values, log=False), levels(values, log=True)
    assert len(steps) == len(factors) == LEVELS
    assert np.diff(steps) == pytest.approx(np.full(LEVELS - 1, 2 / (LEVELS - 1)))
    assert (factors[0], factors[-1]) == (1, pytest.approx(3))
    ratios = (factors[2:] - 1) / (factors[1:-1] - 1)
    assert ratios == pytest.approx(np.full(LEVELS - 2, ratios[0]))
    assert (np.diff(levels(np.ones(4), log=True)) > 0).all()


@pytest.mark.parametrize(("height", "scale"), [(20.0, "linear"), (2.0, "linear"), (50.0, "linear"), (100.0, "asinh")])
def test_a_plane_has_one_scale_unless_it_would_be_a_strip(height, scale):
    x, y = np.meshgrid(np.linspace(0, 20, 3), np.linspace(0, height, 3))
    grid = pd.DataFrame({"point": "grid", "x": x.ravel(), "y": y.ravel()})
    models = pd.DataFrame({"point": ["initialisation", "first", "second"], "x": [0, 20, 0], "y": [0, 0, height]})
    plane = pd.concat([models, grid], ignore_index=True).assign(first=1, second=2)
    for column in ("train_loss", "error_test"):
        plane[column] = 0.1 + np.arange(len(plane)) / 20
    axes = draw_landscape(load("demo_landscape", "task.shifts=[]"), plane, log=False).axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_ylabel().endswith("(asinh)") == (scale == "asinh")
    if scale == "linear":
        assert axes.get_aspect() == pytest.approx(max(1, 0.7 * 20 / height))
