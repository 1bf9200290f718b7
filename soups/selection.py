"""The greedy recipes as one loop over mixtures of model numbers; weights, files and examples are the caller's.

A mixture is a tuple of indices into the pool, in the order in which models were added; one that stands twice weighs
twice. `score` gets the mixtures of one round and the score that they have to reach, and answers with one result each:
it may give them to several processes, or stop early on one that cannot reach it any more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Literal

from soups.chance import uniform as chance

Goal = Literal["max", "min"]
Ties = Literal["keep", "drop"]
Mixture = tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """The score of one mixture."""

    score: float
    exact: bool = True  # False: evaluation stopped early, and this is the best that it could still have reached
    versus: Any = None  # the comparison with the mixture to beat, where it is known
    vetoed: bool = False  # not accepted, whatever its score, such as a gain that is not significant


Score = Callable[[Sequence[Mixture], float], Sequence[Result]]


@dataclass(frozen=True)
class Trial:
    """One decision of a greedy recipe."""

    candidate: int
    score: float  # held-out score with the candidate added; of accuracies in [0, 1]
    accepted: bool
    exact: bool = True  # False: evaluation stopped early, and the score is the most it could still have reached
    versus: Any = None  # the comparison with the soup so far, where `score` knew it


@dataclass(frozen=True)
class Selection:
    """What was chosen and every decision."""

    mixture: Mixture
    trials: tuple[Trial, ...]
    evaluations: int = 0  # mixtures scored
    rounds: int = 0  # calls of `score`, which had to follow one another


def best_first(scores: Sequence[float], goal: Goal = "max") -> list[int]:
    """Indices from the best score to the worst; of equals the one with the smaller index stands first.

    >>> best_first([0.5, 0.9, 0.9]), best_first([3.0, 2.0], "min")
    ([1, 2, 0], [1, 0])
    """
    if not scores:
        raise ValueError("a recipe needs at least one model")
    strange = [i for i, score in enumerate(scores) if isnan(score)]
    if strange:
        raise ValueError(f"the score of model {strange[0]} is NaN, which is neither better nor worse than another")
    sign = -1 if goal == "max" else 1
    return sorted(range(len(scores)), key=lambda i: (sign * scores[i], i))


def random_order(number: int, seed: int, order: int) -> list[int]:
    """A keyed shuffle of 0 to number - 1: another model in the pool leaves the others in the order they had."""
    return sorted(range(number), key=lambda i: chance(seed, "greedy random order", order, i))


def accepts(score: float, incumbent: float, ties: Ties = "keep", goal: Goal = "max") -> bool:
    """Whether a candidate replaces the soup so far: `>=` as in Recipe 1, or `>` as in the authors' script."""
    if isnan(score):
        raise ValueError("the score of a mixture is NaN, which is neither better nor worse than another")
    ours, theirs = (score, incumbent) if goal == "max" else (incumbent, score)
    return ours >= theirs if ties == "keep" else ours > theirs


def add_in_order(
    order: Sequence[int], first: float, score: Score, *, ahead: int = 1, ties: Ties = "keep", goal: Goal = "max"
) -> Selection:
    """Begin with the first model of an order and add each of the others that does not make the score worse.

    Most candidates are rejected and leave the soup as it was, so what was found about the next ones holds: a round
    tries `ahead` of them. Results count up to the first that is accepted; those after it belong to a soup that is no
    more, and are tried again. Decisions do not depend on `ahead`.

    Args:
        order: indices of the models, each once.
        first: the score of the first one alone.
        ahead: candidates a round.
        ties: what becomes of a candidate that leaves the score exactly as it was.

    Raises:
        ValueError: no models, `ahead` below 1, a NaN, or another number of scores than asked for.

    Source: Wortsman et al. 2022, Recipe 1.
    """
    if not order:
        raise ValueError("a recipe needs at least one model")
    if ahead < 1:
        raise ValueError(f"speculative greedy tries at least one candidate ahead, got {ahead}")
    kept: Mixture = (order[0],)
    rest, to_beat = list(order[1:]), first
    trials, evaluations, rounds = [Trial(order[0], first, True)], 0, 0
    while rest:
        tried = rest[:ahead]
        results = score([(*kept, i) for i in tried], to_beat)
        evaluations, rounds = evaluations + len(tried), rounds + 1
        for i, found in zip(tried, results, strict=True):
            accepted = accepts(found.score, to_beat, ties, goal) and not found.vetoed
            trials.append(Trial(i, found.score, accepted, found.exact, found.versus))
            rest.remove(i)
            if accepted:
                kept, to_beat = (*kept, i), found.score
                break
    return Selection(kept, tuple(trials), evaluations, rounds)


def add_with_replacement(scores: Sequence[float], score: Score, *, rounds: int = 20, goal: Goal = "max") -> Selection:
    """Add, again and again, the one model of the whole pool that helps most; a model added twice weighs twice.

    A round tries the soup so far, at first the best model, with each of the K models added once more. The best, of
    equals the model that is better alone, enters if it is strictly better than the soup: with `>=` the only ingredient,
    added to itself, would tie for ever. The first round without such a winner is the last. Stopping there
    (Caruana et al. take the best of a fixed number) keeps a soup that is never below the best model and selects less.

    Returns:
        Trials are the first model's, then K for each round in the order they were tried, best model first.

    Raises:
        ValueError: no models, a NaN, or `rounds`, the most models that are added to the first, less than 1.

    Source: the paper names it as another way to coefficients that differ (Appendix I), without a procedure; the
    rounds are those of Caruana et al. 2004, Section 2.2, from their sorted initialisation with N = 1.
    """
    if rounds < 1:
        raise ValueError(f"greedy with replacement needs at least one round, got {rounds}")
    order = best_first(scores, goal)
    kept: Mixture = (order[0],)
    to_beat = scores[order[0]]
    trials, done = [Trial(order[0], to_beat, True)], 0
    for _ in range(rounds):
        results = score([(*kept, i) for i in order], to_beat)
        winner = best_first([result.score for result in results], goal)[0]
        done += 1
        improves = accepts(results[winner].score, to_beat, "drop", goal) and not results[winner].vetoed
        trials += [
            Trial(i, result.score, improves and place == winner, versus=result.versus)
            for place, (i, result) in enumerate(zip(order, results, strict=True))
        ]
        if not improves:
            break
        kept, to_beat = (*kept, order[winner]), results[winner].score
    return Selection(kept, tuple(trials), done * len(order), done)
