"""Metrics and intervals against hand-worked cases and simulation."""

import numpy as np
import pytest
import torch

from eval.calibration import fit_beta
from eval.metrics import correct, top1
from eval.significance import paired_bootstrap


def hits(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_top1_counts_the_largest_logit():
    logits = torch.tensor([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0], [0.0, 0.0, 0.1], [3.0, 1.0, 2.0]])
    assert top1(logits, torch.tensor([1, 0, 2, 2])) == 0.75


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "N > 0"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"got \(2, 3\), \(3,\)"),
        (torch.tensor([[float("nan"), 1.0]]), torch.zeros(1, dtype=torch.long), "NaN"),
    ],
)
def test_top1_refuses_what_has_no_accuracy(logits, labels, words):
    with pytest.raises(ValueError, match=words):
        correct(logits, labels)


def test_a_paired_difference_is_the_mean_over_splits_of_differences():
    # Split 1: 2/4 against 1/4; split 2: 2/2 against 1/2. Differences 0.25 and 0.5, unweighted mean 0.375.
    ours = [hits(1, 1, 0, 0), hits(1, 1)]
    theirs = [hits(1, 0, 0, 0), hits(1, 0)]
    groups = [torch.arange(4), torch.arange(4, 6)]
    result = paired_bootstrap(ours, theirs, groups, resamples=100, seed=0)
    assert result.mean == pytest.approx(0.375)
    assert result.low <= result.mean <= result.high


def test_equal_models_have_an_interval_of_no_width():
    same = hits(1, 0, 1, 1)
    result = paired_bootstrap([same], [same], [torch.arange(4)], resamples=50, seed=0)
    assert (result.mean, result.low, result.high) == (0, 0, 0)


def test_the_interval_is_that_of_the_slow_loop():
    generator = np.random.default_rng(0)
    ours, theirs = (torch.from_numpy(generator.random(300) < p) for p in (0.6, 0.5))
    result = paired_bootstrap([ours], [theirs], [torch.arange(300)], resamples=4000, seed=1)
    gain = ours.double().numpy() - theirs.double().numpy()
    slow = [gain[generator.integers(0, 300, 300)].mean() for _ in range(4000)]
    assert result.low == pytest.approx(np.quantile(slow, 0.025), abs=0.006)
    assert result.high == pytest.approx(np.quantile(slow, 0.975), abs=0.006)


def test_images_of_one_group_are_drawn_together_and_widen_the_interval():
    # Each class has 10 images with the same outcome: 1,000 images, but only 100 independent ones.
    generator = np.random.default_rng(0)
    gain = torch.from_numpy(generator.random(100) < 0.5).repeat_interleave(10)
    nothing = torch.zeros(1000, dtype=torch.bool)
    classes = torch.arange(100).repeat_interleave(10)
    by_class = paired_bootstrap([gain], [nothing], [classes], resamples=2000, seed=0)
    by_image = paired_bootstrap([gain], [nothing], [torch.arange(1000)], resamples=2000, seed=0)
    ratio = (by_class.high - by_class.low) / (by_image.high - by_image.low)
    assert ratio == pytest.approx(10**0.5, rel=0.1)


def test_a_class_in_two_shifts_is_drawn_in_both_at_once():
    # The gain in one split is the loss in the other, class by class: the mean over both never moves.
    generator = np.random.default_rng(0)
    up = torch.from_numpy(generator.random(100) < 0.5)
    nothing, classes = torch.zeros(100, dtype=torch.bool), torch.arange(100)
    result = paired_bootstrap([up, nothing], [nothing, up], [classes, classes], resamples=200, seed=0)
    assert result.low == pytest.approx(0)
    assert result.high == pytest.approx(0)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        ours = torch.from_numpy(generator.random(200) < 0.6)
        theirs = torch.from_numpy(generator.random(200) < 0.5)
        result = paired_bootstrap([ours], [theirs], [torch.arange(200)], resamples=400, seed=trial)
        covered += result.low <= 0.1 <= result.high
    assert 0.90 <= covered / 200 <= 0.99


def test_results_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        paired_bootstrap([hits(1, 0)], [hits(1)], [torch.arange(2)], resamples=10, seed=0)
    with pytest.raises(ValueError, match="as many splits"):
        paired_bootstrap([], [], [], resamples=10, seed=0)


def test_temperature_scaling_finds_the_temperature_that_labels_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial((0.4 * logits).softmax(dim=1), 1, generator=generator).flatten()
    assert fit_beta(logits, labels) == pytest.approx(0.4, rel=0.05)
    assert fit_beta(10 * logits, labels) == pytest.approx(0.04, rel=0.05)


def test_temperature_scaling_needs_examples():
    with pytest.raises(ValueError, match="N > 0"):
        fit_beta(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
