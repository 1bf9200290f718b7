"""Figure K.1: which pairs, what is measured of them, and what its correlations are."""

import numpy as np
import pandas as pd
import pytest

from analysis.artefacts import write_artefact
from analysis.measure.mixtures import Pair
from analysis.theory.approximation import (
    AUGMENTATION,
    LEARNING_RATE,
    SEED,
    START,
    measure_approximation,
    points,
    related_pairs,
    summary_table,
)
from configs.errors import UserError
from configs.schema import load
from eval.forward import Evaluator
from eval.metrics import nll
from soups.experiment.pool import usable_pool
from tests.pools import finished_pool, recorded_pool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]  # a pool is evaluated

TWO = ["sweep.listed=[{augment: {kind: minimal}}]", "sweep.grid.optim.lr=[1.0e-2, 1.0e-3]", "cluster.workers=1"]
TWO += ["task.shifts=[r]"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("analysis.theory.approximation.RESAMPLES", 100)


@pytest.mark.parametrize("name", ["demo_extreme_lp", "extreme_lp"])
def test_three_rates_two_augmentations_and_two_seeds_make_21_pairs(tmp_path, name):
    config = load(name, f"paths.runs={tmp_path}")
    recorded_pool(config)
    pairs = related_pairs(config, usable_pool(config))
    counts = pd.Series([differ for _, differ, _ in pairs]).value_counts().to_dict()
    assert counts == {LEARNING_RATE: 6, AUGMENTATION: 3, SEED: 6, START: 6}
    assert len({pair.mean.key for pair, _, _ in pairs}) == 21
    assert sum(lr == max(config.analysis.theory.learning_rates) for _, _, lr in pairs) == 9
    assert all(pair.first.row == 0 for pair, differ, _ in pairs if differ == START)


def test_a_sweep_without_such_rows_is_told_which_ones_are_missing(tmp_path):
    config = load("demo_seeds_only", f"paths.runs={tmp_path}")
    recorded_pool(config)
    with pytest.raises(UserError, match=r"learning rates 0\.0001"):
        related_pairs(config, usable_pool(config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_pool(tmp_path_factory.mktemp("runs"), *TWO, experiment="demo_extreme_lp", scale=0.02)


def test_losses_are_those_of_soup_and_ensemble_at_every_alpha(finished):
    config, evaluator = finished
    first, second = usable_pool(config)[1:3]
    found = points(evaluator, Pair(first, second), "test")
    assert [each["alpha"] for each in found] == pytest.approx([i / 10 for i in range(1, 10)])
    labels = evaluator.split("test").labels
    weights = {
        name: 0.7 * a + 0.3 * b for (name, a), b in zip(first.load().items(), second.load().values(), strict=True)
    }
    soup = evaluator.fresh_logits(weights, "test")
    assert found[2]["plain"]["soup_loss"] == pytest.approx(nll(soup, labels), abs=1e-4)
    one, two = (evaluator.logits(each.digest, each.load, "test").double() for each in (first, second))
    assert found[2]["plain"]["ensemble_loss"] == pytest.approx(nll(0.7 * one + 0.3 * two, labels), abs=1e-6)
    assert found[2]["calibrated"]["soup_loss"] <= found[2]["plain"]["soup_loss"] + 1e-9


def test_what_was_measured_is_not_measured_again(finished, monkeypatch):
    config, _ = finished
    files = write_artefact("figurek1", [config])
    assert [file.name for file in files] == ["figurek1.pdf", "figurek1.png", "figurek1.csv", "figurek1_summary.csv"]
    monkeypatch.setattr(Evaluator, "fresh_logits", None)
    before = files[2].read_bytes()
    assert write_artefact("figurek1", [config])[2].read_bytes() == before


def test_a_row_adds_both_terms_and_subtracts_the_ensemble(finished):
    config, _ = finished
    tidy = measure_approximation(config)
    assert (tidy["approximation"] == tidy["convexity_term"] + tidy["variance_term"]).all()
    assert (tidy["loss_difference"] == tidy["soup_loss"] - tidy["ensemble_loss"]).all()
    assert set(tidy.loc[tidy["what"] == "plain", "beta"]) == {1.0}
    assert len(tidy) == 5 * 2 * 9 * 2  # pairs of 2 rates, 1 level and 2 seeds; splits, alphas, betas


STATISTICS = ["correlation", "rank correlation", "sign agreement"]
DRAWN = load("demo_extreme_lp")


def planted(slope_of_error):
    generator = np.random.default_rng(0)
    rows = []
    for pair in range(12):
        for x in generator.normal(size=20):
            rows += [
                {
                    "first": 0,
                    "second": pair,
                    "highest_lr": 1e-3 if pair < 8 else 1e-2,
                    "what": what,
                    "approximation": x,
                    "loss_difference": 2 * x if pair < 8 else -x,
                    "error_difference": slope_of_error * x,
                }
                for what in ("calibrated", "plain")
            ]
    return pd.DataFrame(rows)


def test_correlations_are_of_the_points_of_each_panel_with_intervals_over_pairs():
    summary = summary_table(DRAWN, planted(-1.0)).set_index(["beta", "pairs", "truth", "statistic"])["value"]
    without = summary["calibrated", "without highest lr"]
    assert without["loss_difference"][STATISTICS].tolist() == pytest.approx([1, 1, 1])
    assert without["error_difference"][STATISTICS].tolist() == pytest.approx([-1, -1, 0])
    ensemble, soup = (without["loss_difference", f"always the {answer}"] for answer in ("ensemble", "soup"))
    right = (planted(1.0).query("first == 0 and highest_lr < 1e-2 and what == 'plain'")["loss_difference"] > 0).mean()
    assert (ensemble, soup) == (pytest.approx(right), pytest.approx(1 - right))
    assert summary["plain", "all", "loss_difference", "sign agreement"] == pytest.approx(8 / 12)
    whole = summary_table(DRAWN, planted(1.0)).query("pairs == 'all' and statistic == 'sign agreement'")
    assert (whole["low"] < whole["value"]).all()
    assert (whole["value"] < whole["high"]).all()


def test_points_whose_truth_is_zero_have_no_sign_to_agree_with():
    tidy = planted(0.0)
    signs = summary_table(DRAWN, tidy).query("truth == 'error_difference' and statistic == 'sign agreement'")
    assert signs["value"].isna().all()
