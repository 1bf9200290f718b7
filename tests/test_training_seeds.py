"""Seeds only: soups of weights, ensembles of logits, and temperatures before and after them."""

import pytest
import torch

from analysis.artefacts import write_artefact
from analysis.figures.calibration import (
    answering,
    scaled_head,
    seed_group,
    seeds_table,
)
from analysis.measure.calibration import debiased_error
from analysis.measure.methods import SHIFT_MEAN
from configs.errors import UserError
from configs.schema import load
from eval.calibration import fit_beta, reliability_bins
from eval.metrics import nll
from soups.experiment.pool import usable_pool
from store.runs import Ingredient
from tests.pools import finished_pool

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = ("sweep.grid.optim.seed=[0,1,2]", "cluster.workers=1")
    return finished_pool(tmp_path_factory.mktemp("runs"), *settings, experiment="demo_seeds_only")


@pytest.fixture(scope="module")
def members(finished):
    return seed_group(finished[0], usable_pool(finished[0]))


@pytest.fixture(scope="module")
def table(finished, members):
    return seeds_table(finished[1], members, calibrated=True)


def cell(table, what, k, temperature="none", column="test"):
    rows = table[(table["what"] == what) & (table["k"] == k) & (table["temperature"] == temperature)]
    return rows[rows["column"] == column].iloc[0]


def rows(config, *numbers):
    return [Ingredient(row, None, f"{row}", {}, {}, "done", 0) for row in numbers]


def test_seeds_are_the_largest_group_of_rows_with_the_same_settings():
    config = load("demo_imagenet_init")
    assert [each.row for each in seed_group(config, rows(config, *range(16)))] == [7, 8, 9, 10, 11]
    with pytest.raises(UserError, match="no two models differ"):
        seed_group(load("demo_grid_lp"), rows(None, *range(13)))


@pytest.mark.slow
def test_soup_and_ensemble_of_k_seeds_are_the_means_of_weights_and_of_logits(finished, members, table):
    _, evaluator = finished
    assert [each.row for each in members] == [1, 2, 3]
    loaded = [each.load() for each in members[:2]]
    mean = {name: torch.stack([each[name].double() for each in loaded]).mean(0).float() for name in loaded[0]}
    labels = evaluator.split("test").labels
    logits = evaluator.fresh_logits(mean, "test")
    assert cell(table, "soup", 2)["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert cell(table, "soup", 2)["ece"] == pytest.approx(reliability_bins(logits, labels, bins=15).ece)
    logits = torch.stack([evaluator.fresh_logits(each, "test").double() for each in loaded]).mean(0)
    assert cell(table, "ensemble", 2)["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert cell(table, "ensemble", 2)["ece"] == pytest.approx(reliability_bins(logits, labels, bins=15).ece)
    assert (cell(table, "ensemble", 2)["models"], cell(table, "soup", 2)["models"]) == (2, 1)


@pytest.mark.slow
def test_temperatures_come_from_held_out_and_leave_accuracy_alone_when_fitted_afterwards(finished, members, table):
    _, evaluator = finished
    weights = members[1].load()
    beta = fit_beta(evaluator.fresh_logits(weights, "held_out"), evaluator.split("held_out").labels)
    after = cell(table, "individual", 2, "after")
    assert after["beta"] == pytest.approx(beta)
    scaled = beta * evaluator.fresh_logits(weights, "test").double()
    assert after["ece"] == pytest.approx(reliability_bins(scaled, evaluator.split("test").labels, bins=15).ece)
    for what in ("individual", "soup", "ensemble"):
        assert cell(table, what, 3)["accuracy"] == cell(table, what, 3, "after")["accuracy"]


@pytest.mark.slow
def test_a_scaled_head_gives_logits_times_beta_and_calibrated_members_are_averaged_so(finished, members, table):
    _, evaluator = finished
    weights = members[0].load()
    ours = evaluator.fresh_logits(scaled_head(weights, 3.0), "held_out")
    torch.testing.assert_close(ours, 3 * evaluator.fresh_logits(weights, "held_out"), rtol=1e-4, atol=1e-4)
    made = answering(evaluator, members, calibrated=True)
    first = {(what, k): logits for what, k, temperature, logits, _ in made if temperature == "first"}
    betas = [cell(table, "individual", k, "after")["beta"] for k in (1, 2)]
    own = [evaluator.fresh_logits(each.load(), "test").double() for each in members[:2]]
    torch.testing.assert_close(first["ensemble", 2]("test"), (betas[0] * own[0] + betas[1] * own[1]) / 2)
    scaled = [scaled_head(each.load(), beta) for each, beta in zip(members[:2], betas, strict=True)]
    mean = {
        name: ((scaled[0][name].double() + scaled[1][name].double()) / 2).to(scaled[0][name].dtype) for name in weights
    }
    torch.testing.assert_close(first["soup", 2]("test"), evaluator.fresh_logits(mean, "test"))
    with pytest.raises(UserError, match="linear head"):
        scaled_head({"lm_head.weight": torch.ones(1)}, 2.0)


@pytest.mark.slow
def test_calibration_is_also_told_by_nll_brier_score_and_a_debiased_error(finished, members, table):
    _, evaluator = finished
    logits, labels = evaluator.fresh_logits(members[0].load(), "test"), evaluator.split("test").labels
    chances = logits.double().softmax(1)
    row = cell(table, "individual", 1)
    assert row["nll"] == pytest.approx(nll(logits, labels), abs=1e-6)
    assert row["brier"] == pytest.approx((chances - torch.eye(chances.shape[1])[labels]).square().sum(1).mean().item())
    for name in ("nll", "brier"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    sure = torch.tensor([[5.0, 0.0]]).repeat(400, 1)  # 99.3 % sure
    half = torch.arange(400) % 2
    assert debiased_error(sure, half, 2) == pytest.approx(0.4933, abs=2e-3)
    fair = torch.tensor([[0.0, 1e-9]]).repeat(400, 1)
    assert debiased_error(fair, half, 2) == 0 == pytest.approx(reliability_bins(fair, half).ece, abs=1e-6)


@pytest.mark.slow
def test_differences_are_to_the_mean_of_the_individuals_so_far(table):
    for column in ("test", SHIFT_MEAN):
        base = sum(cell(table, "individual", k, column=column)["accuracy"] for k in (1, 2)) / 2
        row = cell(table, "soup", 2, column=column)
        assert row["difference"] == pytest.approx(row["accuracy"] - base)
        assert row["low"] <= row["difference"] <= row["high"]


@pytest.mark.slow
def test_both_artefacts_are_written(finished):
    for stem in ("figureb2", "figureg4"):
        files = write_artefact(stem, [finished[0]])
        assert [file.name for file in files] == [f"{stem}.pdf", f"{stem}.png", f"{stem}.csv"]
