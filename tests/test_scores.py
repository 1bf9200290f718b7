"""Scores of splits agree with scikit-learn, and their intervals with the bootstrap of accuracies."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from eval.significance import Answers, bootstrap_scores, paired_bootstrap
from soups.scorers.metrics import score


def random_answers(n=400, classes=7, right=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    guesses = torch.randint(0, classes, (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < right, labels, guesses), labels


@pytest.mark.parametrize("seed", range(3))
def test_scores_agree_with_scikit_learn(seed):
    predicted, labels = random_answers(seed=seed)
    labels[labels == 6] = 5  # predicted, but never right
    assert score("top1", predicted, labels) == pytest.approx(accuracy_score(labels, predicted))
    macro = f1_score(labels, predicted, average="macro", labels=labels.unique())
    assert score("macro_f1", predicted, labels) == pytest.approx(macro, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_matthews_and_mrpcs_metric_agree_with_scikit_learn(seed):
    for classes in (2, 7):
        predicted, labels = random_answers(classes=classes, seed=seed)
        assert score("matthews", predicted, labels) == pytest.approx(matthews_corrcoef(labels, predicted), abs=1e-9)
    predicted, labels = random_answers(classes=2, seed=seed)
    both = (accuracy_score(labels, predicted) + f1_score(labels, predicted)) / 2
    assert score("accuracy_and_f1", predicted, labels) == pytest.approx(both, abs=1e-9)


def test_scores_worked_out_by_hand():
    def scored(metric, predicted, labels):
        return score(metric, torch.tensor(predicted), torch.tensor(labels))

    # Class 0: tp 1, fn 1: 2/3. Class 1: tp 1: 1. Class 2 is predicted once and never right; its 0 does not count.
    assert scored("macro_f1", [0, 2, 1], [0, 0, 1]) == pytest.approx((2 / 3 + 1) / 2)
    # tp 2, tn 1, fp 1, fn 0: (2 x 1 - 0) / sqrt(3 x 2 x 2 x 1).
    assert scored("matthews", [1, 1, 1, 0], [1, 1, 0, 0]) == pytest.approx(2 / 12**0.5)
    assert scored("matthews", [1, 1], [0, 1]) == 0.0
    assert scored("matthews", [0, 1], [1, 0]) == -1.0
    # 3 of 4 right; class 1 has precision 2/3 and recall 1, F1 4/5.
    assert scored("accuracy_and_f1", [1, 1, 1, 0], [1, 1, 0, 0]) == pytest.approx((0.75 + 0.8) / 2)
    assert scored("accuracy_and_f1", [0], [0]) == 0.5
    with pytest.raises(ValueError, match="one of two classes"):
        scored("accuracy_and_f1", [0], [2])


def test_weights_count_an_image_as_often_as_it_is_drawn():
    predicted, labels = random_answers(n=60)
    groups = torch.arange(60) % 4
    weights = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(1))
    drawn = torch.arange(60).repeat_interleave(weights)
    for metric in ("top1", "macro_f1", "worst_group"):
        expected = score(metric, predicted[drawn], labels[drawn], groups[drawn])
        assert score(metric, predicted, labels, groups, weights) == pytest.approx(expected)


def test_the_worst_group_is_the_one_with_the_lowest_accuracy_among_those_with_images():
    labels = torch.zeros(6, dtype=torch.long)
    predicted = torch.tensor([0, 1, 0, 0, 1, 1])
    assert score("worst_group", predicted, labels, torch.tensor([0, 0, 3, 3, -1, -1])) == 0.5
    assert score("worst_group", predicted, labels, torch.tensor([0, 0, 3, 3, 5, 5])) == 0
    with pytest.raises(ValueError, match="needs the group of each image"):
        score("worst_group", predicted, labels)


def test_wrong_lengths_and_no_images_are_refused():
    for predicted, labels in ((torch.zeros(2), torch.zeros(3)), (torch.zeros(0), torch.zeros(0))):
        with pytest.raises(ValueError, match="N > 0"):
            score("top1", predicted.long(), labels.long())


@pytest.mark.parametrize("by_class", [False, True])
def test_of_accuracies_the_interval_is_that_of_the_paired_bootstrap(by_class):
    ours, theirs, units, answers = [], [], [], []
    for seed, right in ((0, 0.7), (1, 0.4)):
        model, labels = random_answers(seed=seed, right=right)
        baseline = torch.where(torch.arange(400) % 3 == 0, (labels + 1) % 7, labels)
        unit = labels if by_class else torch.arange(400) + 400 * seed
        ours.append(model == labels)
        theirs.append(baseline == labels)
        units.append(unit)
        answers.append(Answers("top1", (model,), baseline, labels, unit))
    expected = paired_bootstrap(ours, theirs, units, resamples=300, seed=0)
    found = bootstrap_scores(answers, resamples=300, seed=0)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_several_soups_of_a_recipe_count_with_the_mean_of_their_scores():
    (one, labels), (two, _) = random_answers(seed=0), random_answers(seed=0, right=0.9)
    units = torch.arange(400)
    both = bootstrap_scores([Answers("macro_f1", (one, two), one, labels, units)], resamples=20, seed=0)
    alone = bootstrap_scores([Answers("macro_f1", (two,), one, labels, units)], resamples=20, seed=0)
    assert both.mean == pytest.approx(alone.mean / 2)
    assert both.low == pytest.approx(alone.low / 2)
