"""Metrics against hand-worked cases and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from eval.metrics import correct, correct_in_sets, mean_by_group, nll, top1, topk

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


METRICS = {"correct": correct, "topk": lambda x, y: topk(x, y, 1), "nll": nll}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "N > 0"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.long), r"got \(2, 2\)"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), r"got \(2,\)"),
        (torch.tensor([[float("nan"), 1.0]]), torch.zeros(1, dtype=torch.long), "NaN"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"class ids in \[0, 2\)"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), r"class ids in \[0, 2\)"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), r"class ids in \[0, 2\)"),
    ],
)
def test_what_has_no_metric_is_refused(name, logits, labels, words):
    with pytest.raises(ValueError, match=words):
        METRICS[name](logits, labels)


def test_top_k_breaks_ties_by_the_smaller_class_so_that_top_1_is_correct():
    # Class 1 leads, then 0 and 2 tie: 0 is second, 2 is third.
    logits = torch.tensor([[1.0, 2.0, 1.0]])
    assert [topk(logits, torch.tensor([label]), 2) for label in range(3)] == [1, 1, 0]
    tied, labels = torch.zeros(4, 4), torch.arange(4)
    assert topk(tied, labels, 1) == top1(tied, labels) == 1 / 4
    assert topk(tied, labels, 3) == 3 / 4


def test_top_k_is_that_of_scikit_learn_for_every_k_among_the_classes():
    logits, labels = random_case(0)
    for k in (1, 2, 5, 6):
        theirs = sk.top_k_accuracy_score(labels, logits, k=k, labels=range(7))
        assert topk(logits, labels, k) == pytest.approx(theirs, abs=1e-6)
    for k in (0, 8):
        with pytest.raises(ValueError, match="between 1 and that"):
            topk(logits, labels, k)


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


def label_sets(*sets, classes=3):
    """(N, C) bool of lists of class ids."""
    return torch.tensor([[label in ids for label in range(classes)] for ids in sets])


def test_any_of_an_images_labels_is_right_and_images_without_are_left_out():
    # Right by its second label, wrong, not counted, right.
    sets = label_sets([0, 2], [1, 2], [], [1])
    assert correct_in_sets(predicting(2, 0, 1, 1), sets).tolist() == [True, False, True]


def test_with_one_label_each_sets_are_labels():
    logits, labels = random_case(2)
    sets = torch.nn.functional.one_hot(labels, 7).bool()
    assert torch.equal(correct_in_sets(logits, sets), correct(logits, labels))


@pytest.mark.parametrize(
    ("logits", "sets", "words"),
    [
        (predicting(0, 1), label_sets([], []), "no image has a label"),
        (predicting(0, 1), torch.ones(2, 3), "bool label sets"),
        (predicting(0, 1), torch.ones(2, 2, dtype=torch.bool), r"\(2, 3\), \(2, 2\)"),
        (predicting(0, 1), label_sets([0]), r"\(2, 3\), \(1, 3\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), "N > 0"),
        (torch.tensor([[float("nan"), 1.0, 0.0]]), label_sets([0]), "NaN"),
    ],
)
def test_label_sets_that_do_not_fit_are_refused(logits, sets, words):
    with pytest.raises(ValueError, match=words):
        correct_in_sets(logits, sets)


def test_a_mean_by_group_leaves_out_groups_without_members_and_is_scikit_learns_balanced_accuracy():
    # Group 1 is empty.
    found = mean_by_group(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]))
    assert found.tolist() == [0.5, 1.0]
    logits, labels = random_case(3, classes=6)
    theirs = sk.recall_score(labels, logits.argmax(1), labels=labels.unique(), average="macro")
    assert mean_by_group(correct(logits, labels), labels).mean().item() == pytest.approx(theirs, abs=1e-6)
