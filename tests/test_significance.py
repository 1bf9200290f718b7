"""Intervals and tests against hand-worked cases, the slow way, SciPy and simulation."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from eval.significance import paired_bootstrap, paired_permutation


def hits(*values):
    return torch.tensor(values, dtype=torch.bool)


def p_of(ours, theirs, **more):
    """The p-value of the permutation test where each image is a group of its own."""
    images = torch.arange(sum(map(len, ours))).split([len(split) for split in ours])
    return paired_permutation(ours, theirs, images, **more)


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
    # Of 300 images both models get right 0.5, only ours 0.15, only theirs 0.07: the true difference is 0.08.
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        outcome = torch.from_numpy(generator.choice(4, 300, p=[0.5, 0.15, 0.07, 0.28]))
        result = paired_bootstrap(
            [outcome <= 1], [(outcome == 0) | (outcome == 2)], [torch.arange(300)], resamples=1000, seed=0
        )
        covered += result.low <= 0.08 <= result.high
    assert 0.92 <= covered / 400 <= 0.98


def test_scores_without_a_difference_are_refused():
    none = torch.zeros(0, dtype=torch.bool)
    for compare in (lambda *x: paired_bootstrap(*x, resamples=10, seed=0), paired_permutation):
        for refused in (
            ([none], [none], [torch.arange(0)]),
            ([hits(1, 0)], [hits(1)], [torch.arange(2)]),
            ([], [], []),
        ):
            with pytest.raises(ValueError, match="N > 0"):
                compare(*refused)
        with pytest.raises(ValueError, match="NaN"):
            compare([torch.tensor([float("nan")])], [torch.tensor([1.0])], [torch.arange(1)])


def test_nothing_changed_is_no_evidence():
    assert p_of([hits(1, 0)], [hits(1, 0)]) == 1


def test_three_gains_and_no_loss_come_up_twice_in_eight_permutations():
    assert p_of([hits(1, 1, 1, 0)], [hits(0, 0, 0, 0)]) == 0.25


@pytest.mark.parametrize(("gained", "lost"), [(4, 1), (3, 3), (0, 1), (60, 31), (700, 600)])
def test_for_hits_on_one_split_the_permutation_test_is_mcnemars(gained, lost):
    ours, theirs = hits(*[1] * gained, *[0] * lost, 1, 0), hits(*[0] * gained, *[1] * lost, 1, 0)
    assert p_of([ours], [theirs]) == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)


def test_for_scores_that_are_no_hits_it_is_scipys():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(0.4, 1, 11), generator.normal(0, 1, 11)
    scipys = stats.permutation_test(
        (ours, theirs), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=np.inf
    )
    assert p_of([torch.from_numpy(ours)], [torch.from_numpy(theirs)]) == pytest.approx(scipys.pvalue)


def test_splits_count_equally_however_many_images_they_have():
    # Differences over 4, 2 and 3 images, against all signs of all pairs.
    gains = [[1, 1, -1, 0], [1, 0], [1, 1, 1]]
    ours = [torch.tensor(gain) > 0 for gain in gains]
    theirs = [torch.tensor(gain) < 0 for gain in gains]
    weighted = [g / len(gain) / 3 for gain in gains for g in gain if g]
    totals = [abs(sum(s * w for s, w in zip(signs, weighted, strict=True))) for signs in product((-1, 1), repeat=7)]
    slow = sum(total >= sum(weighted) - 1e-9 for total in totals) / 2**7
    assert p_of(ours, theirs) == pytest.approx(slow)


def test_images_of_a_group_are_swapped_together():
    # Ten gains of one class are one coin, not ten; three classes can come up alike in 2 of 8 ways.
    classes = torch.arange(3).repeat_interleave(10)
    assert paired_permutation([hits(*[1] * 30)], [hits(*[0] * 30)], [classes]) == 0.25


SCORES = torch.linspace(-0.7, 1.3, 12, dtype=torch.float64)  # no two differ from 0 by as much
HITS = [hits(*[1] * 32, *[0] * 8), hits(*[1] * 8, *[0] * 4), hits(*[1] * 24, *[0] * 30)]


@pytest.mark.parametrize(
    ("ours", "theirs"), [([SCORES], [torch.zeros(12)]), (HITS, [~right for right in HITS])], ids=["scores", "hits"]
)
def test_drawn_permutations_come_close_to_all_of_them_and_are_the_seeds(ours, theirs):
    exact = p_of(ours, theirs)
    drawn = p_of(ours, theirs, permutations=4000, seed=1)
    assert 0.001 < exact < 0.4
    assert exact == p_of(ours, theirs, seed=2)
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5 + 1 / 4000)
    assert drawn == p_of(ours, theirs, permutations=4000, seed=1)
    assert drawn != p_of(ours, theirs, permutations=4000, seed=2)


def test_a_drawn_p_value_is_never_zero():
    gains = torch.linspace(1, 2, 40)
    assert p_of([gains], [torch.zeros(40)], permutations=999) == pytest.approx(1 / 1000)
    with pytest.raises(ValueError, match="at least one permutation"):
        p_of([gains], [torch.zeros(40)], permutations=0)


def test_models_that_are_equally_good_are_called_different_no_more_often_than_alpha():
    generator = np.random.default_rng(0)
    found = 0
    for trial in range(400):
        ours, theirs = (torch.from_numpy(generator.normal(size=30)) for _ in range(2))
        found += p_of([ours], [theirs], permutations=199, seed=trial) <= 0.05
    assert 0.02 <= found / 400 <= 0.08
