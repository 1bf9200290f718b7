"""Shortcuts for greedy: every decision is that of the plain loop, for less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soups.recipes import Paired, greedy, greedy_counted, hard_images_first


def model(value):
    return lambda: {"w": torch.tensor([value])}


class Problem:
    """Models of one weight; image n is right when the weight is in its interval, so averages help and hurt."""

    def __init__(self, seed, models=8, images=40):
        generator = torch.Generator().manual_seed(seed)
        self.values = torch.rand(models, generator=generator)
        self.low = torch.rand(images, generator=generator) * 0.7
        self.high = self.low + 0.1 + torch.rand(images, generator=generator) * 0.6
        self.models = [model(value) for value in self.values.tolist()]
        self.correct = torch.stack([self.right(load()) for load in self.models])
        self.held_out = [row.sum().item() / images for row in self.correct]
        self.evaluated_rows = 0

    def right(self, weights):
        return (weights["w"] >= self.low) & (weights["w"] < self.high)

    def images_correct(self, weights, images):
        self.evaluated_rows += len(images)
        return self.right(weights)[images]

    def accuracy(self, weights):
        return self.right(weights).sum().item() / len(self.low)

    def plain(self, ties):
        return greedy(self.models, self.held_out, self.accuracy, ties=ties)


def decisions(soup):
    return [(trial.candidate, trial.accepted) for trial in soup.trials]


TIES = st.sampled_from(["keep", "drop"])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), TIES, st.integers(1, 50))
def test_early_rejection_takes_every_decision_of_the_plain_loop(seed, ties, chunk):
    problem = Problem(seed)
    plain = problem.plain(ties)
    soup, forwards = greedy_counted(problem.models, problem.correct, problem.images_correct, ties=ties, chunk=chunk)
    assert decisions(soup) == decisions(plain)
    assert torch.equal(soup.weights["w"], plain.weights["w"])
    assert forwards == problem.evaluated_rows <= 7 * 40
    for quick, slow in zip(soup.trials, plain.trials, strict=True):
        assert quick.score == slow.score if quick.exact else quick.score > slow.score - 1e-12
        assert quick.exact or not quick.accepted


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), TIES, st.integers(1, 10))
def test_speculation_takes_every_decision_of_the_plain_loop(seed, ties, ahead):
    problem = Problem(seed)
    plain = problem.plain(ties)
    soup = greedy(problem.models, problem.held_out, problem.accuracy, ahead=ahead, ties=ties)
    assert soup.trials == plain.trials
    assert torch.equal(soup.weights["w"], plain.weights["w"])
    assert soup.rounds <= 7 <= soup.evaluations
    if ahead == 1:
        assert soup.rounds == soup.evaluations == 7


def test_hard_images_are_those_that_few_get_right_and_neither_the_soup_nor_the_candidate():
    # Three models on five images, right 3, 0, 2, 1 and 0 times.
    correct = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    nobody, everybody = torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    assert hard_images_first(correct, nobody, everybody).tolist() == [1, 4, 3, 2, 0]
    incumbent = torch.tensor([0, 1, 1, 1, 1], dtype=torch.bool)
    assert hard_images_first(correct, incumbent, correct[2]).tolist() == [1, 4, 3, 2, 0]
    assert hard_images_first(correct, incumbent, everybody).tolist() == [0, 1, 4, 3, 2]
    assert hard_images_first(correct, everybody, incumbent).tolist() == [0, 1, 4, 3, 2]


def test_a_candidate_is_dropped_at_the_first_chunk_from_which_it_cannot_reach_the_soup():
    # The first model gets 6 of 8 right. The candidate is wrong on images 0, 1 and 2, the hardest: after the second
    # chunk of two it can reach 5 at most.
    correct = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    asked = []

    def images_correct(weights, images):
        asked.append(images.tolist())
        return correct[1][images]

    soup, forwards = greedy_counted([model(0.0), model(1.0)], correct, images_correct, chunk=2)
    assert asked == [[0, 1], [2, 3]]
    assert forwards == 4
    assert (soup.trials[1].score, soup.trials[1].exact, soup.trials[1].accepted) == (5 / 8, False, False)


def test_a_tie_is_seen_to_the_end_when_kept_and_not_when_dropped():
    correct = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    kept, forwards = greedy_counted([model(0.0)] * 2, correct, lambda w, images: correct[1][images], chunk=1)
    assert (kept.ingredients, forwards) == ((0, 1), 4)
    arguments = ([model(0.0)] * 2, correct, lambda w, images: correct[1][images])
    dropped, forwards = greedy_counted(*arguments, chunk=1, ties="drop")
    assert (dropped.ingredients, forwards) == ((0,), 1)


def test_an_accept_reports_gains_losses_and_z_against_the_soup_it_replaced_and_may_need_a_minimum_of_sigma():
    # Against the first model the candidate gains images 0 to 3 and loses image 4.
    correct = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    candidate = torch.tensor([1, 1, 1, 1, 0, 1], dtype=torch.bool)
    arguments = ([model(0.0), model(1.0)], correct, lambda w, images: candidate[images])
    soup, _ = greedy_counted(*arguments, significance=True)
    assert soup.trials[1].versus == Paired(gained=4, lost=1)
    assert soup.trials[1].versus.z == pytest.approx(3 / 5**0.5)
    assert soup.trials[0].versus is None
    assert greedy_counted(*arguments)[0].trials[1].versus is None
    assert greedy_counted(*arguments, min_sigma=1.3)[0].ingredients == (0, 1)
    assert greedy_counted(*arguments, min_sigma=1.4)[0].ingredients == (0,)


def test_speculation_throws_away_what_came_after_an_accept_and_tries_it_again():
    # 0.9 first; 1.2 and 0.7 at once: 1.2 is accepted, so what 0.7 would have done to 0.9 alone is no answer.
    tried = []

    def accuracy(weights):
        tried.append(weights["w"].item())
        return 1 - abs(tried[-1] - 1)

    soup = greedy([model(0.9), model(1.2), model(0.7)], [0.9, 0.8, 0.7], accuracy, ahead=2)
    assert tried == pytest.approx([1.05, 0.8, 2.8 / 3])
    assert soup.ingredients == (0, 1)
    assert (soup.evaluations, soup.rounds) == (3, 2)


def test_shortcuts_refuse_what_does_not_belong_together():
    with pytest.raises(ValueError, match="at least one candidate ahead"):
        greedy([model(0.0)] * 2, [0.5, 0.4], lambda weights: 0.0, ahead=0)
    for correct in (torch.zeros(1, 4, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool)):
        with pytest.raises(ValueError, match="of 2 models on N > 0 images"):
            greedy_counted([model(0.0)] * 2, correct, lambda w, images: images > 0)
