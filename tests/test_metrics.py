"""Metrics against hand-worked cases and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from eval.metrics import (
    GroupAccuracy,
    accuracy_and_f1,
    accuracy_by_group,
    correct,
    correct_in_sets,
    correct_in_top,
    label_sets,
    macro_f1,
    matthews,
    multilabel_accuracy,
    nll,
    real_accuracy,
    top1,
    topk,
    worst_group,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def random_case(seed, classes=7, n=500, dtype=torch.float64):
    """Logits that are right more often than chance; the last class never occurs, though it is predicted."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), labels] += 1
    return logits.to(dtype), labels


def predicting(*classes, of=3):
    """Logits whose largest is of these classes."""
    return torch.eye(of)[list(classes)]


def test_top1_counts_the_largest_logit():
    logits = torch.tensor([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0], [0.0, 0.0, 0.1], [3.0, 1.0, 2.0]])
    assert top1(logits, torch.tensor([1, 0, 2, 2])) == 0.75


METRICS = {
    "correct": correct,
    "topk": lambda x, y: topk(x, y, 1),
    "nll": nll,
    "real": lambda x, y: real_accuracy(x, [[0]] * len(y)),
    "multilabel": lambda x, y: multilabel_accuracy(x, [[0]] * len(y), y),
    "groups": lambda x, y: accuracy_by_group(x, y, y),
    "worst_group": lambda x, y: worst_group(x, y, y),
    "macro_f1": macro_f1,
    "matthews": matthews,
    "accuracy_and_f1": accuracy_and_f1,
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "N > 0"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.long), r"got \(2, 2\)"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), r"got \(2,\)"),
        (torch.tensor([[float("nan"), 1.0]]), torch.zeros(1, dtype=torch.long), "NaN"),
    ],
    ids=["none", "shapes", "flat", "nan"],
)
def test_what_has_no_metric_is_refused(name, logits, labels, words):
    with pytest.raises(ValueError, match=words):
        METRICS[name](logits, labels)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "real"])
@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_a_label_that_no_prediction_could_match_is_refused(name, labels):
    with pytest.raises(ValueError, match=r"class ids in \[0, 2\)"):
        METRICS[name](torch.zeros(2, 2), labels)


def test_top_k_breaks_ties_by_the_smaller_class_so_that_top_1_is_correct():
    # Class 1 leads, then 0 and 2 tie: 0 is second, 2 is third.
    logits = torch.tensor([[1.0, 2.0, 1.0]]).repeat(3, 1)
    labels = torch.tensor([0, 1, 2])
    assert correct_in_top(logits, labels, 2).tolist() == [True, True, False]
    tied = torch.zeros(4, 4)
    assert torch.equal(correct_in_top(tied, torch.arange(4), 1), correct(tied, torch.arange(4)))


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_top_k_is_that_of_scikit_learn(k):
    logits, labels = random_case(0)
    theirs = sk.top_k_accuracy_score(labels, logits, k=k, labels=range(7))
    assert topk(logits, labels, k) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("k", [0, 8])
def test_top_k_needs_k_among_the_classes(k):
    with pytest.raises(ValueError, match="between 1 and that"):
        topk(*random_case(0), k)


def test_nll_worked_out_by_hand():
    # Probabilities 3/4 and 1/4: -log(3/4) and -log(1/4).
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
    assert nll(logits, torch.tensor([0, 1])) == pytest.approx((np.log(4 / 3) + np.log(4)) / 2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nll_is_scikit_learns_log_loss_of_the_float64_softmax(dtype):
    logits, labels = random_case(1, dtype=dtype)
    theirs = sk.log_loss(labels, logits.double().softmax(dim=1), labels=range(7))
    assert nll(logits, labels) == pytest.approx(theirs, abs=1e-6)


def test_a_masked_class_takes_no_probability_and_infinities_without_softmax_are_refused():
    inf = float("inf")
    assert nll(torch.tensor([[0.0, 0.0, -inf]]), torch.tensor([0])) == pytest.approx(np.log(2))
    assert nll(torch.tensor([[0.0, 0.0, -inf]]), torch.tensor([2])) == inf
    for row in ([inf, 0.0], [-inf, -inf]):
        with pytest.raises(ValueError, match="no softmax"):
            nll(torch.tensor([row]), torch.tensor([0]))


def test_real_accuracy_counts_any_of_the_labels_and_leaves_out_images_without():
    # Right by its second label, wrong, not counted, right: 2 of 3.
    logits, sets = predicting(2, 0, 1, 1), [[0, 2], [1, 2], [], [1]]
    assert correct_in_sets(logits, sets).tolist() == [True, False, True]
    assert real_accuracy(logits, sets) == pytest.approx(2 / 3)
    assert real_accuracy(logits, label_sets(sets, 3)) == pytest.approx(2 / 3)


def test_real_accuracy_with_one_label_each_is_top1():
    logits, labels = random_case(2)
    assert real_accuracy(logits, [[label] for label in labels.tolist()]) == pytest.approx(top1(logits, labels))


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([[], []], "no image has a label"),
        ([[0], [3]], r"image 1 has label 3, which is not in \[0, 3\)"),
        ([[0], [-1]], "image 1 has label -1"),
        (torch.ones(2, 3), "bool label sets"),
        (torch.ones(2, 2, dtype=torch.bool), r"need \(N, 3\)"),
        ([[0]], "and 1"),
    ],
)
def test_label_sets_that_do_not_fit_are_refused(sets, words):
    with pytest.raises(ValueError, match=words):
        real_accuracy(predicting(0, 1), sets)


def test_multilabel_accuracy_averages_over_the_original_classes_not_over_images():
    # Class 0: 3 of 4 right, one by another label. Class 1: 0 of 1. The image without labels is no image of class 2.
    logits, labels = predicting(0, 0, 2, 1, 0, 2), torch.tensor([0, 0, 0, 0, 1, 2])
    sets = [[0], [0], [0, 2], [0], [1], []]
    assert multilabel_accuracy(logits, sets, labels) == pytest.approx((0.75 + 0) / 2)
    assert real_accuracy(logits, sets) == pytest.approx(3 / 5)


def test_multilabel_accuracy_with_one_label_each_is_scikit_learns_balanced_accuracy():
    logits, labels = random_case(3, classes=6)
    ours = multilabel_accuracy(logits, [[label] for label in labels.tolist()], labels)
    theirs = sk.recall_score(labels, logits.argmax(1), labels=labels.unique(), average="macro")
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_macro_f1_gives_no_score_to_a_class_that_is_only_predicted():
    # Class 0: tp 1, fn 1: 2/3. Class 1: tp 1: 1. Class 2 is predicted once and never right; its 0 does not count.
    assert macro_f1(predicting(0, 2, 1), torch.tensor([0, 0, 1])) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed):
    logits, labels = random_case(seed)
    predicted = logits.argmax(dim=1)
    f1 = sk.f1_score(labels, predicted, average="macro", labels=labels.unique())
    assert macro_f1(logits, labels) == pytest.approx(f1, abs=1e-6)
    assert matthews(logits, labels) == pytest.approx(sk.matthews_corrcoef(labels, predicted), abs=1e-6)
    logits, labels = random_case(seed, classes=2) if seed == 0 else random_case(seed, classes=3)
    logits, predicted = logits[:, :2], logits[:, :2].argmax(dim=1)
    both = (sk.accuracy_score(labels, predicted) + sk.f1_score(labels, predicted, zero_division=0)) / 2
    assert accuracy_and_f1(logits, labels) == pytest.approx(both, abs=1e-6)
    assert matthews(logits, labels) == pytest.approx(sk.matthews_corrcoef(labels, predicted), abs=1e-6)


def test_matthews_worked_out_by_hand():
    # tp 2, tn 1, fp 1, fn 0: (2 x 1 - 0) / sqrt(3 x 2 x 2 x 1).
    found = matthews(predicting(1, 1, 1, 0, of=2), torch.tensor([1, 1, 0, 0]))
    assert found == pytest.approx(2 / 12**0.5)
    assert matthews(predicting(1, 1, of=2), torch.tensor([0, 1])) == 0.0
    assert matthews(predicting(0, 1, of=2), torch.tensor([1, 0])) == -1.0


def test_mrpcs_metric_worked_out_by_hand():
    # 3 of 4 right; class 1 has precision 2/3 and recall 1, F1 4/5.
    logits = predicting(1, 1, 1, 0, of=2)
    assert accuracy_and_f1(logits, torch.tensor([1, 1, 0, 0])) == pytest.approx((0.75 + 0.8) / 2)
    assert accuracy_and_f1(predicting(0, of=2), torch.tensor([0])) == 0.5
    with pytest.raises(ValueError, match="logits of 3"):
        accuracy_and_f1(predicting(0), torch.tensor([0]))


def test_the_worst_group_is_named_with_its_size_and_empty_and_left_out_groups_do_not_count():
    # Group 0: 1 of 2; group 1 is empty; group 4: 0 of 1 (left out below); group 2: 1 of 2, as bad as group 0.
    logits, labels = predicting(0, 1, 2, 0, 0), torch.tensor([0, 0, 1, 0, 1])
    groups = torch.tensor([0, 0, 4, 2, 2])
    rows = (GroupAccuracy(0, 2, 0.5), GroupAccuracy(2, 2, 0.5), GroupAccuracy(4, 1, 0.0))
    assert accuracy_by_group(logits, labels, groups) == rows
    assert worst_group(logits, labels, groups) == rows[2]
    assert worst_group(logits, labels, groups, leave_out=[4]) == rows[0]
    with pytest.raises(ValueError, match="none is the worst"):
        worst_group(logits, labels, groups, leave_out=[0, 2, 4])
    with pytest.raises(ValueError, match="integer groups"):
        worst_group(logits, labels, groups[:3])
    with pytest.raises(ValueError, match="integer groups"):
        worst_group(logits, labels, groups.float())
