"""Held-out selects, an oracle is labelled, and the two never meet."""

import math

import pytest
import torch

from analysis.measure.methods import Method, oracle_of
from analysis.tables.cells import NAMES
from configs.errors import UserError
from configs.schema import load
from eval.forward import Annotated
from eval.significance import best_on_held_out, oracle

REPORTED = ("test", "v2", "sketch")


def test_the_highest_score_is_chosen_and_of_equals_the_first():
    assert best_on_held_out([0.5, 0.7, 0.7, 0.1], "held_out", REPORTED) == 1
    assert oracle([0.9, 0.7, 0.9], "sketch") == 0


def test_a_split_that_reports_cannot_pass_as_held_out():
    with pytest.raises(UserError, match="'test' reports"):
        best_on_held_out([0.1, 0.2], "test", REPORTED)


@pytest.mark.parametrize("scores", [[], [0.1, float("nan")]])
def test_no_scores_and_nan_have_no_best(scores):
    with pytest.raises(ValueError, match="one number per model"):
        oracle(scores, "test")
    with pytest.raises(ValueError, match="one number per model"):
        best_on_held_out(scores, "held_out", REPORTED)


def test_the_oracle_of_a_table_is_the_best_of_each_column_and_of_the_mean_another_one():
    config = load("demo", "task.shifts=[v2,r]")

    def model(name, **accuracies):
        hits = {split: torch.arange(10) < 10 * accuracy for split, accuracy in accuracies.items()}
        return Method(name, 1, hits, 0.5)

    pool = [
        model("a", test=0.9, v2=0.1, r=0.1),
        model("b", test=0.2, v2=0.9, r=0.2),
        model("c", test=0.3, v2=0.6, r=0.6),
    ]
    found = oracle_of(config, pool)
    assert {split: found.accuracy(split) for split in ("test", "v2", "r")} == {"test": 0.9, "v2": 0.9, "r": 0.6}
    assert found.of("shift_mean").accuracy("v2", "r") == pytest.approx(0.6)  # of c, not the mean of 0.9 and 0.6
    assert "(oracle)" in NAMES[found.name]
    assert math.isnan(found.held_out)  # it was not chosen there


def test_the_oracle_of_other_labels_is_the_model_with_the_most_answers_among_them():
    config = load("demo", "task.shifts=[]")
    hits = {"test": torch.ones(4, dtype=torch.bool)}
    pool = [
        Method(str(right), 1, hits, 0.5, annotated={"real": Annotated(torch.arange(8) < right, None)})
        for right in (3, 7, 5)
    ]
    assert oracle_of(config, pool).of("real").name == "7"
