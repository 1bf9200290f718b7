"""Recipes on models of one weight, whose soups can be worked out by hand."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soups.average import Average
from soups.recipes import best, greedy, mean_of, uniform

RELEASED = Path(__file__).resolve().parents[2] / "shared/reference/released"


def model(value):
    return lambda: {"w": torch.tensor([value])}


def closeness_to_one(weights):
    return 1 - abs(weights["w"].item() - 1)


def test_greedy_keeps_a_model_only_if_the_average_is_no_worse_than_the_soup_so_far():
    # Best first: 0.9 scores 0.90; with 1.2 the mean is 1.05, scoring 0.95; with 0.7 the mean is 0.93, scoring 0.93:
    # better than the first model, worse than the soup so far.
    soup = greedy([model(0.7), model(1.2), model(0.9)], [0.7, 0.8, 0.9], closeness_to_one)
    assert soup.ingredients == (2, 1)
    assert [(trial.candidate, trial.accepted) for trial in soup.trials] == [(2, True), (1, True), (0, False)]
    assert soup.trials[2].score == pytest.approx(0.9333, abs=1e-4)
    torch.testing.assert_close(soup.weights["w"], torch.tensor([1.05]))


def test_a_tie_is_kept_as_recipe_1_says():
    soup = greedy([model(1.0), model(1.0)], [1.0, 1.0], closeness_to_one)
    assert soup.ingredients == (0, 1)


def test_greedy_averages_with_equal_weights_and_not_half_and_half():
    # Accepting everything: (0.6 + 0.9 + 1.2) / 3 = 0.9; halving each time would give (0.75 + 1.2) / 2 = 0.975.
    soup = greedy([model(0.6), model(0.9), model(1.2)], [0.9, 0.8, 0.7], lambda weights: 0.9)
    torch.testing.assert_close(soup.weights["w"], torch.tensor([0.9]))


def test_greedy_is_never_below_the_best_model_on_the_split_it_selects_on():
    scores = [0.61, 0.73, 0.55, 0.73, 0.2]
    values = iter([0.7, 0.74, 0.1, 0.74])
    soup = greedy([model(float(i)) for i in range(5)], scores, lambda weights: next(values))
    assert soup.ingredients[0] == 1
    assert max(trial.score for trial in soup.trials if trial.accepted) >= max(scores)
    assert [trial.accepted for trial in soup.trials] == [True, False, True, False, True]


def test_greedy_evaluates_each_candidate_once_and_reads_each_model_once():
    reads, evaluations = count(), count()

    def load(value):
        next(reads)
        return {"w": torch.tensor([value])}

    def score(weights):
        next(evaluations)
        return 0.0

    greedy([lambda v=v: load(v) for v in (0.1, 0.2, 0.3, 0.4)], [0.4, 0.3, 0.2, 0.1], score)
    assert (next(reads), next(evaluations)) == (4, 3)


def test_best_takes_the_highest_held_out_score_and_uniform_takes_all():
    models, held_out = [model(1.0), model(2.0), model(6.0)], [0.1, 0.3, 0.2]
    assert best(models, held_out).ingredients == (1,)
    assert best(models, held_out).weights["w"].item() == 2
    everything = uniform(models, held_out)
    assert everything.ingredients == (1, 2, 0)
    assert everything.weights["w"].item() == 3


def test_the_same_recipes_make_ensembles_of_logits():
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 6.0]]])
    ensemble = uniform([lambda i=i: {"logits": logits[i]} for i in range(2)], [0.5, 0.5])
    torch.testing.assert_close(ensemble.weights["logits"], torch.tensor([[1.0, 3.0]]))


@pytest.mark.parametrize("recipe", [best, uniform, lambda models, held_out: greedy(models, held_out, lambda w: 0)])
def test_a_recipe_without_models_is_refused(recipe):
    with pytest.raises(ValueError, match="at least one model"):
        recipe([], [])


def test_greedy_refuses_scores_that_do_not_belong_to_the_models():
    with pytest.raises(ValueError, match="one held-out accuracy per model, got 1 and 2"):
        greedy([model(1.0)], [0.5, 0.5], closeness_to_one)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.randoms())
def test_the_mean_is_the_float64_mean_rounded_once_in_any_order(values, random):
    expected = torch.tensor(values, dtype=torch.float64).mean()
    shuffled = random.sample(values, len(values))
    for order in (values, shuffled):
        mean = mean_of([model(value) for value in order])["w"]
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double()[0], expected, rtol=2**-23, atol=1e-12)


def test_bfloat16_models_are_summed_in_float64():
    # 256 + 71 x 1 stays 256 when summed in bfloat16, whose neighbours of 256 are 2 apart.
    values = [256.0] + [1.0] * 71
    mean = mean_of([lambda v=v: {"w": torch.tensor([v], dtype=torch.bfloat16)} for v in values])["w"]
    assert mean.dtype == torch.bfloat16
    assert mean.item() == torch.tensor((256 + 71) / 72, dtype=torch.bfloat16).item()


def test_integer_buffers_are_kept_when_equal_and_refused_when_not():
    def counter(value):
        return lambda: {"n": torch.tensor(value), "mask": torch.tensor([True])}

    assert mean_of([counter(3), counter(3)])["n"].item() == 3
    with pytest.raises(ValueError, match="integer buffer 'n' differs"):
        mean_of([counter(3), counter(4)])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"v": torch.zeros(2)}, "'v' is not in all of them"),
        ({"w": torch.zeros(3)}, r"'w': \(2,\) torch.float32 and \(3,\) torch.float32"),
        ({"w": torch.zeros(2).half()}, r"torch.float32 and \(2,\) torch.float16"),
        ({"w": torch.tensor([1.0, float("nan")])}, "'w' holds NaN or infinity"),
    ],
)
def test_models_that_do_not_fit_together_are_refused_by_name(other, words):
    with pytest.raises(ValueError, match=words):
        Average.of({"w": torch.zeros(2)}).plus(other)


def test_trying_a_candidate_leaves_the_soup_as_it_was():
    soup = Average.of({"w": torch.tensor([1.0])})
    soup.plus({"w": torch.tensor([5.0])})
    assert soup.weights()["w"].item() == 1


@pytest.mark.skipif(not RELEASED.exists(), reason="needs the authors' published results, which are not shipped")
def test_the_authors_published_scores_and_decisions_give_their_soup():
    rows = [json.loads(line) for line in (RELEASED / "individual_model_results.jsonl").read_text().splitlines()]
    names = [int(row["model_name"].removeprefix("model_").removesuffix(".pt")) for row in rows]
    held_out = [row["ImageNet2p"] for row in rows]
    scores = iter(d["held_out_top1"] for d in json.loads((RELEASED / "greedy_trace.json").read_text())["decisions"])
    soup = greedy([model(0.0)] * 72, held_out, lambda weights: next(scores))
    assert {names[i] for i in soup.ingredients} == {43, 44, 32, 47, 50}
    assert next(scores, None) is None
