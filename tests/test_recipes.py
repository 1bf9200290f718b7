"""Recipes on models of one weight, whose soups can be worked out by hand."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.average import Average
from soups.errors import UserError
from soups.recipes import (
    Growing,
    GrowingLogits,
    best,
    greedy,
    greedy_with_replacement,
    mean_of,
    subset,
    uniform,
    uniform_ensemble,
    wise_ft,
)
from soups.selection import Result, add_in_order, add_with_replacement, best_first, random_order

RELEASED = Path(__file__).resolve().parents[2] / "shared/reference/released"
QUICK = settings(max_examples=25, deadline=None)


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


def test_a_tie_is_dropped_on_request_as_in_the_authors_script():
    soup = greedy([model(1.0), model(1.0), model(0.9)], [0.8, 0.8, 0.7], lambda weights: 0.8, ties="drop")
    assert soup.ingredients == (0,)
    better = greedy([model(0.8), model(1.2)], [0.8, 0.8], closeness_to_one, ties="drop")
    assert better.ingredients == (0, 1)


def test_greedy_averages_with_equal_weights_and_not_half_and_half():
    # Accepting everything: (0.6 + 0.9 + 1.2) / 3 = 0.9; halving each time would give (0.75 + 1.2) / 2 = 0.975.
    soup = greedy([model(0.6), model(0.9), model(1.2)], [0.9, 0.8, 0.7], lambda weights: 0.9)
    torch.testing.assert_close(soup.weights["w"], torch.tensor([0.9]))


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


def test_second_best_takes_the_second_highest_held_out_score_and_needs_two():
    models = [model(1.0), model(2.0), model(6.0)]
    assert best(models, [0.1, 0.3, 0.2], place=2).ingredients == (2,)
    assert best(models, [0.3, 0.1, 0.3], place=2).weights["w"].item() == 6
    with pytest.raises(ValueError, match="needs at least two, got 1"):
        best(models[:1], [0.1], place=2)


def test_a_subset_averages_the_chosen_models_and_reads_no_other():
    def unread():
        raise AssertionError("read a model that was not chosen")

    soup = subset([model(1.0), unread, model(6.0)], [0.1, 0.3, 0.2], chosen=[0, 2])
    assert soup.ingredients == (2, 0)
    assert soup.mixing == (0.5, 0.5)
    assert soup.weights["w"].item() == 3.5


@pytest.mark.parametrize("chosen", [[0, 3], [-1], [1, 1]])
def test_a_subset_of_models_that_are_not_there_or_stand_twice_is_refused(chosen):
    with pytest.raises(ValueError, match="at most once"):
        subset([model(1.0)] * 3, [0.1, 0.2, 0.3], chosen)


def test_greedy_in_random_order_follows_its_order_and_not_the_held_out_scores():
    values, held_out = [0.7, 1.2, 0.9, 1.4], [0.7, 0.8, 0.9, 0.6]
    models = [model(v) for v in values]
    soups = [greedy(models, held_out, closeness_to_one, order=random_order(len(models), j, 0)) for j in range(3)]
    orders = [random_order(4, j, 0) for j in range(3)]
    assert len({tuple(order) for order in orders}) > 1
    for soup, order in zip(soups, orders, strict=True):
        assert [trial.candidate for trial in soup.trials] == order
        assert soup.trials[0].score == held_out[order[0]]
        kept = [order[0]]
        for i in order[1:]:  # the slow obvious way
            together = closeness_to_one(mean_of(model(values[k]) for k in [*kept, i]))
            alone = held_out[kept[0]] if len(kept) == 1 else closeness_to_one(mean_of(model(values[k]) for k in kept))
            kept += [i] if together >= alone else []
        assert soup.ingredients == tuple(kept)


def test_a_random_order_is_a_permutation_that_another_model_in_the_pool_leaves_as_it_was():
    order = random_order(20, 7, 1)
    assert sorted(order) == list(range(20))
    assert [i for i in random_order(30, 7, 1) if i < 20] == order
    assert order != random_order(20, 7, 2) != random_order(20, 8, 2)


def test_greedy_with_replacement_weighs_a_model_as_often_as_it_was_added():
    # From 0.7 (0.70) the best addition is 1.6: 1.15 (0.85); then 0.7 again: (0.7 + 0.7 + 1.6) / 3 = 1 (1.00).
    # Nothing improves on that, though 1.0 alone leaves it as it is.
    soup = greedy_with_replacement([model(1.6), model(0.7), model(1.0)], [0.4, 0.99, 0.5], closeness_to_one)
    assert soup.ingredients == (1,)  # 0.99 is what was recorded for the first, and no mixture but 1 beats it
    soup = greedy_with_replacement([model(1.6), model(0.7)], [0.4, 0.7], closeness_to_one)
    assert soup.ingredients == (1, 0)
    assert soup.mixing == (2 / 3, 1 / 3)
    torch.testing.assert_close(soup.weights["w"], torch.tensor([1.0]))
    # Best first in each round: 0.7 again changes nothing, 1.6 wins; 0.7 wins; neither.
    tried = [(trial.candidate, trial.accepted) for trial in soup.trials]
    assert tried == [(1, True), (1, False), (0, True), (1, True), (0, False), (1, False), (0, False)]


def test_greedy_with_replacement_ends_though_adding_the_only_ingredient_again_is_always_a_tie():
    soup = greedy_with_replacement([model(1.0), model(3.0)], [1.0, 0.1], closeness_to_one)
    assert soup.ingredients == (0,)
    assert len(soup.trials) == 3


def test_greedy_with_replacement_adds_at_most_as_many_models_as_it_has_rounds():
    scores = count(1)
    soup = greedy_with_replacement([model(0.0), model(1.0)], [0.5, 0.4], lambda weights: float(next(scores)), rounds=3)
    assert len(soup.trials) == 1 + 3 * 2
    assert soup.mixing == (1 / 4, 3 / 4)  # the second of each round scores higher here


def test_greedy_with_replacement_takes_the_model_that_is_better_alone_when_two_help_as_much():
    soup = greedy_with_replacement([model(2.0), model(1.0), model(3.0)], [0.2, 0.5, 0.3], lambda w: 0.9, rounds=1)
    assert soup.ingredients == (1,)
    assert soup.mixing == (1.0,)


@QUICK
@given(st.lists(st.floats(0.5, 1.5, width=32), min_size=1, max_size=6))
def test_greedy_with_replacement_is_never_below_the_best_model(values):
    held_out = [closeness_to_one({"w": torch.tensor([v])}) for v in values]
    soup = greedy_with_replacement([model(v) for v in values], held_out, closeness_to_one, rounds=4)
    assert closeness_to_one(soup.weights) >= max(held_out)
    assert sum(soup.mixing) == pytest.approx(1)


def test_wise_ft_goes_in_a_straight_line_from_the_start_to_the_end():
    start = {"w": torch.tensor([1.0, 0.1]), "half": torch.tensor([2.0]).half(), "n": torch.tensor(5)}
    end = {"w": torch.tensor([3.0, 0.3]), "half": torch.tensor([4.0]).half(), "n": torch.tensor(5)}
    quarter = wise_ft(lambda: start, lambda: end, 0.25)
    torch.testing.assert_close(quarter["w"], torch.tensor([1.5, 0.15]))
    assert (quarter["half"].dtype, quarter["half"].item(), quarter["n"].item()) == (torch.float16, 2.5, 5)
    assert torch.equal(wise_ft(lambda: start, lambda: end, 0)["w"], start["w"])
    assert torch.equal(wise_ft(lambda: start, lambda: end, 1)["w"], end["w"])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_wise_ft_does_not_extrapolate(alpha):
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\]"):
        wise_ft(model(0.0), model(1.0), alpha)


@pytest.mark.parametrize(
    "recipe",
    [
        best,
        uniform,
        lambda models, held_out: greedy(models, held_out, lambda w: 0),
        lambda models, held_out: greedy(models, held_out, lambda w: 0, order=random_order(len(models), 0, 0)),
        lambda models, held_out: greedy_with_replacement(models, held_out, lambda w: 0),
        lambda models, held_out: subset([model(1.0)], [0.1], []),
    ],
)
def test_a_recipe_without_models_is_refused(recipe):
    with pytest.raises(ValueError, match="at least one model"):
        recipe([], [])


def test_greedy_refuses_scores_that_do_not_belong_to_the_models():
    with pytest.raises(ValueError, match="one held-out accuracy per model, got 1 and 2"):
        greedy([model(1.0)], [0.5, 0.5], closeness_to_one)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"v": torch.zeros(2)}, "model 1: tensor 'v' is not in the models before"),
        ({"w": torch.zeros(3)}, r"model 1: tensor 'w' is F32 \(3,\), but F64 \(2,\)"),
        ({"w": torch.tensor([1.0, float("nan")])}, "'w' holds NaN or infinity"),
        ({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, "model 1: tensor 'w' is .*, which cannot be averaged"),
    ],
)
def test_models_that_do_not_fit_together_are_refused_by_name(other, words):
    with pytest.raises(UserError, match=words):
        Average().plus({"w": torch.zeros(2)}).plus(other)


@pytest.mark.skipif(not RELEASED.exists(), reason="needs the authors' published results, which are not shipped")
def test_the_authors_published_scores_and_decisions_give_their_soup():
    rows = [json.loads(line) for line in (RELEASED / "individual_model_results.jsonl").read_text().splitlines()]
    names = [int(row["model_name"].removeprefix("model_").removesuffix(".pt")) for row in rows]
    held_out = [row["ImageNet2p"] for row in rows]
    scores = iter(d["held_out_top1"] for d in json.loads((RELEASED / "greedy_trace.json").read_text())["decisions"])
    soup = greedy([model(0.0)] * 72, held_out, lambda weights: next(scores))
    assert {names[i] for i in soup.ingredients} == {43, 44, 32, 47, 50}
    assert next(scores, None) is None


def test_a_score_that_is_nan_is_refused_by_number_and_not_sorted():
    with pytest.raises(ValueError, match="the score of model 1 is NaN"):
        best_first([0.5, float("nan"), 0.9])
    with pytest.raises(ValueError, match="mixture is NaN"):
        add_in_order([0, 1], 0.5, lambda mixtures, to_beat: [Result(float("nan"))])


LOSSES = {(0,): 3.0, (1,): 2.0, (2,): 4.0, (1, 0): 1.5, (1, 2): 2.5, (1, 0, 2): 1.5, (1, 1): 2.0}


def test_a_score_that_is_to_be_low_turns_every_decision_around():
    def score(mixtures, to_beat):
        return [Result(LOSSES[mixture]) for mixture in mixtures]

    order = best_first([3.0, 2.0, 4.0], "min")
    assert order == [1, 0, 2]
    for ahead in (1, 2, 5):
        kept = add_in_order(order, 2.0, score, ahead=ahead, goal="min")
        assert kept.mixture == (1, 0, 2)  # the tie is kept
        assert add_in_order(order, 2.0, score, ahead=ahead, goal="min", ties="drop").mixture == (1, 0)
    assert add_with_replacement([3.0, 2.0, 4.0], score, rounds=1, goal="min").mixture == (1, 0)


def test_a_round_says_what_its_mixtures_have_to_reach():
    asked = []

    def score(mixtures, to_beat):
        asked.append((list(mixtures), to_beat))
        return [Result(0.9 if mixture == (0, 1) else 0.1) for mixture in mixtures]

    assert add_in_order([0, 1, 2, 3], 0.5, score, ahead=2).mixture == (0, 1)
    assert asked == [([(0, 1), (0, 2)], 0.5), ([(0, 1, 2), (0, 1, 3)], 0.9)]


@QUICK
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=6))
def test_means_of_logits_are_those_of_any_tensors_in_whatever_order_they_are_asked_for(mixtures):
    generator = torch.Generator().manual_seed(0)
    logits = [10 * torch.randn(300, 7, generator=generator) for _ in range(5)]  # more rows than are summed at once
    models = [lambda i=i: {"logits": logits[i]} for i in range(5)]
    plain, fast = Growing(models), GrowingLogits(models)
    for mixture in map(tuple, mixtures):
        assert torch.equal(fast.mean(mixture)["logits"], plain.mean(mixture)["logits"])


def test_ensembles_choose_as_soups_of_their_logits_do():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(400) % 5
    logits = [torch.randn(400, 5, generator=generator) + (1 + i / 9) * torch.eye(5)[labels] for i in range(8)]
    models = [lambda each=each: {"logits": each} for each in logits]

    def accuracy(weights):
        return (weights["logits"].argmax(dim=1) == labels).double().mean().item()

    alone = [accuracy(load()) for load in models]
    for recipe in (greedy, greedy_with_replacement):
        plain, fast = recipe(models, alone, accuracy), recipe(models, alone, accuracy, grow=GrowingLogits)
        assert torch.equal(plain.weights["logits"], fast.weights["logits"]) and len(fast.ingredients) > 1
        assert (plain.ingredients, plain.mixing, plain.trials) == (fast.ingredients, fast.mixing, fast.trials)
    assert torch.equal(uniform_ensemble(models, alone).weights["logits"], uniform(models, alone).weights["logits"])


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (4, 6)])
def test_logits_of_another_shape_are_refused_and_not_broadcast(shape):
    models = [lambda: {"logits": torch.zeros(4, 5)}, lambda: {"logits": torch.zeros(shape)}]
    for order in ([0.9, 0.8], [0.8, 0.9]):
        with pytest.raises(ValueError, match=r"the logits of model \d have the shape"):
            greedy(models, order, lambda weights: 1.0, grow=GrowingLogits)
        with pytest.raises(ValueError, match=r"the logits of model \d have the shape"):
            uniform_ensemble(models, order)
