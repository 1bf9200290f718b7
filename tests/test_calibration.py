"""Calibration error and reliability diagrams against hand-worked cases, a slow loop and labels drawn from the model."""

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.figures.calibration import draw_reliability, reliability_rows
from configs.schema import load
from eval.calibration import calibrate, fit_beta, reliability_bins


def drawn(n, *, classes=5, seed=0, beta=1.0):
    """Logits, and labels drawn from the softmax of beta times them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    labels = torch.multinomial((beta * logits).softmax(dim=1), 1, generator=generator).flatten()
    return logits, labels


def confident(*confidences):
    """Logits of two classes that predict class 0 with these probabilities above 1/2."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p, 1 - p], dim=1).log()


def hit(*right):
    return 1 - torch.tensor(right)


def test_temperature_scaling_finds_the_temperature_that_labels_were_drawn_with():
    logits, labels = drawn(20_000, beta=0.4)
    assert fit_beta(logits, labels) == pytest.approx(0.4, rel=0.05)
    assert fit_beta(10 * logits, labels) == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize("function", [fit_beta, reliability_bins])
def test_calibration_needs_examples_and_numbers(function):
    with pytest.raises(ValueError, match="N > 0"):
        function(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(3,\)"):
        function(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="NaN"):
        function(torch.tensor([[float("nan"), 1.0]]), torch.zeros(1, dtype=torch.long))


def test_at_least_one_bin_is_needed():
    with pytest.raises(ValueError, match="at least one bin"):
        reliability_bins(*drawn(10), bins=0)


def test_equal_mass_bins_worked_out_by_hand():
    logits, labels = confident(0.9, 0.6, 0.8, 0.7, 0.95), hit(1, 0, 1, 0, 1)
    bins = reliability_bins(logits, labels, bins=2)
    assert bins.count.tolist() == [3, 2]
    np.testing.assert_allclose(bins.confidence, [0.7, 0.925])
    np.testing.assert_allclose(bins.accuracy, [1 / 3, 1])
    assert bins.ece == pytest.approx((3 * (0.7 - 1 / 3) + 2 * 0.075) / 5)


def test_equal_confidences_share_the_bin_of_their_first():
    # Sorted: 0.6 | 0.7 0.7 0.7 0.9 0.9, three bins of two. The 0.7s begin in the first bin, the 0.9s in the third.
    logits, labels = confident(0.7, 0.9, 0.6, 0.7, 0.9, 0.7), hit(0, 1, 1, 1, 1, 1)
    bins = reliability_bins(logits, labels, bins=3)
    assert bins.count.tolist() == [4, 0, 2]
    shuffled = torch.tensor([5, 3, 4, 2, 1, 0])
    # In the first bin confidences add up to 2.7 with 3 right, in the last to 1.8 with 2 right.
    assert bins.ece == pytest.approx((0.3 + 0.2) / 6)
    assert reliability_bins(logits[shuffled], labels[shuffled], bins=3).ece == pytest.approx(bins.ece)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "bins"), [(1000, 15), (7, 15), (100, 1)])
def test_the_error_is_that_of_the_slow_loop(dtype, n, bins):
    logits, labels = drawn(n, seed=n)
    logits = logits.to(dtype)
    gaps = [0.0] * bins
    probabilities = logits.double().softmax(dim=1).numpy()
    confidences = probabilities.max(axis=1)
    for confidence, row, label in zip(confidences, probabilities, labels.tolist(), strict=True):
        gaps[int((confidences < confidence).sum()) * bins // n] += confidence - (row.argmax() == label)
    assert reliability_bins(logits, labels, bins=bins).ece == pytest.approx(sum(map(abs, gaps)) / n, abs=1e-6)


def test_the_temperature_is_fitted_on_held_out_and_mends_the_test():
    held_out, test = drawn(5000, seed=1, beta=0.4), drawn(5000, seed=2, beta=0.4)
    found = calibrate(held_out, test)
    assert found.beta == fit_beta(*held_out) != fit_beta(*test)
    assert found.before.ece > 0.1
    assert found.after.ece < 0.03
    mean = [(bins.count * bins.accuracy).sum().item() / 5000 for bins in (found.before, found.after)]
    assert mean[0] == pytest.approx(mean[1])


@pytest.fixture(scope="module")
def models():
    cases = {"Best individual": 0.4, "Greedy soup": 1.5}
    return {name: calibrate(drawn(400, seed=1, beta=b), drawn(400, seed=2, beta=b)) for name, b in cases.items()}


def test_a_diagram_shows_each_model_before_and_after_with_bars_gaps_counts_and_error(models):
    figure = draw_reliability(load("demo"), reliability_rows(models))
    diagrams = [axes for axes in figure.axes if axes.texts]
    assert len(diagrams) == 4
    for axes, bins in zip(
        diagrams, [models[name].before for name in models] + [models[name].after for name in models], strict=True
    ):
        accuracy, gap = axes.containers
        np.testing.assert_allclose([bar.get_height() for bar in accuracy], 100 * bins.accuracy)
        np.testing.assert_allclose([bar.get_y() + bar.get_height() for bar in gap], 100 * bins.confidence)
        assert axes.texts[0].get_text() == f"ECE {100 * bins.ece:.1f} %\nn = 400"
    counts = [axes for axes in figure.axes if axes not in diagrams]
    assert [sum(bar.get_height() for bar in axes.containers[0]) for axes in counts] == [400] * 4
    titles = [axes.get_title() for axes in diagrams]
    assert titles[:2] == ["Best individual\nas trained", "Greedy soup\nas trained"]
    assert titles[2] == f"β = {models['Best individual'].beta:.2f}"


def test_the_numbers_behind_a_diagram_have_a_row_for_each_bin(models):
    rows = reliability_rows(models)
    assert len(rows) == 2 * 2 * 15
    soup = rows[(rows["model"] == "Greedy soup") & (rows["stage"] == "after")]
    found = models["Greedy soup"]
    assert set(soup["beta"]) == {found.beta}
    assert set(rows.loc[rows["stage"] == "before", "beta"]) == {1.0}
    pd.testing.assert_series_equal(
        soup["accuracy"], pd.Series(found.after.accuracy.numpy()), check_names=False, check_index=False
    )
    assert (soup["count"] * (soup["accuracy"] - soup["confidence"]).abs()).sum() / 400 == pytest.approx(found.after.ece)
