"""The paper's recipes as functions of loaders and scores; they know nothing of images, configs or files.

A model may be its weights, which makes a soup, or `{"logits": ...}` on the held-out split, which makes an ensemble:
the selection is the same (Section 3.3.2).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from configs.chance import uniform as chance
from eval.significance import Paired
from soups.average import Average
from soups.mixture import Loader, mixture
from store.weights import Weights

Ties = Literal["keep", "drop"]


@dataclass(frozen=True)
class Trial:
    """One decision of a greedy recipe."""

    candidate: int
    score: float  # held-out accuracy in [0, 1] with the candidate added
    accepted: bool
    exact: bool = True  # False: evaluation stopped early, and the score is the most it could still have reached
    versus: Paired | None = None  # against the soup that it replaced; given for accepted candidates, on request


@dataclass(frozen=True)
class Soup:
    """The mixture, its ingredients in the order they were first added, what each weighs, and every decision."""

    weights: dict[str, Tensor]
    ingredients: tuple[int, ...]
    mixing: tuple[float, ...]  # one for each ingredient, positive, summing to 1
    trials: tuple[Trial, ...] = ()


def equal(number: int) -> tuple[float, ...]:
    """Mixing weights of `number` ingredients that weigh the same."""
    return (1 / number,) * number


def best_first(held_out: Sequence[float]) -> list[int]:
    """Indices by decreasing held-out accuracy; of equals the one with the smaller index stands first.

    Raises:
        ValueError: no models.

    >>> best_first([0.5, 0.9, 0.9])
    [1, 2, 0]
    """
    if not held_out:
        raise ValueError("a recipe needs at least one model")
    return sorted(range(len(held_out)), key=lambda i: (-held_out[i], i))


def checked_order(models: Sequence[Loader], held_out: Sequence[float]) -> list[int]:
    """`best_first`, of as many models as scores.

    Raises:
        ValueError: no models, or `held_out` is not one number per model.
    """
    if len(models) != len(held_out):
        raise ValueError(f"need one held-out accuracy per model, got {len(models)} and {len(held_out)}")
    return best_first(held_out)


def mean_of(models: Iterable[Loader]) -> dict[str, Tensor]:
    """The equal-weight mean; one model at a time is in memory beside the running sum.

    Raises:
        ValueError: no models, or models that do not fit together.
    """
    average: Average | None = None
    for load in models:
        average = Average.of(load()) if average is None else average.plus(load())
    if average is None:
        raise ValueError("a recipe needs at least one model")
    return average.weights()


def best(models: Sequence[Loader], held_out: Sequence[float]) -> Soup:
    """The individual model with the highest held-out accuracy (Table 2, first row)."""
    first = best_first(held_out)[0]
    return Soup(dict(models[first]()), (first,), (1.0,))


def second_best(models: Sequence[Loader], held_out: Sequence[float]) -> Soup:
    """The individual model with the second highest held-out accuracy (Table 3).

    Raises:
        ValueError: fewer than two models.
    """
    if len(models) < 2:
        raise ValueError(f"the second best model needs at least two, got {len(models)}")
    second = best_first(held_out)[1]
    return Soup(dict(models[second]()), (second,), (1.0,))


def subset(models: Sequence[Loader], held_out: Sequence[float], chosen: Iterable[int]) -> Soup:
    """The equal-weight mean of some models, listed best first.

    Args:
        models: K loaders; only the chosen ones are called.
        held_out: K accuracies, which here only order the list.
        chosen: indices in [0, K), each once.

    Raises:
        ValueError: nothing chosen, an index that is not there or stands twice, or models that do not fit together.
    """
    members = list(chosen)
    strange = sorted({i for i in members if not 0 <= i < len(models) or members.count(i) > 1})
    if strange:
        raise ValueError(
            f"a subset names each of models 0 to {len(models) - 1} at most once; {strange[0]} does not fit"
        )
    order = [i for i in checked_order(models, held_out) if i in members]
    mean = mean_of(models[i] for i in order)
    return Soup(mean, tuple(order), equal(len(order)))


def uniform(models: Sequence[Loader], held_out: Sequence[float]) -> Soup:
    """All models, whatever their accuracy (Table 2); they are listed best first."""
    return subset(models, held_out, range(len(models)))


def accepts(score: float, incumbent: float, ties: Ties) -> bool:
    """Whether a candidate replaces the soup so far: `>=` as in Recipe 1, or `>` as in the authors' script."""
    return score >= incumbent if ties == "keep" else score > incumbent


def greedy(
    models: Sequence[Loader],
    held_out: Sequence[float],
    accuracy: Callable[[Weights], float],
    *,
    ties: Ties = "keep",
) -> Soup:
    """Add models best-first, keeping each one that does not lower held-out accuracy.

    Args:
        models: K loaders, one per fine-tuned model. Called once each; two sums are in memory, not K models.
        held_out: K accuracies in [0, 1] on the held-out split, which is never a test set.
        accuracy: the same accuracy for candidate weights; called K - 1 times.
        ties: what becomes of a candidate that leaves the accuracy exactly as it was.

    Raises:
        ValueError: no models, `held_out` is not one number per model, or models that do not fit together.

    Source: Wortsman et al. 2022, Recipe 1. Its test is `>=` (`keep`); the authors' released script has `>` (`drop`),
    which cooks another soup only when a candidate ties exactly.
    """
    return _add_in_order(checked_order(models, held_out), models, held_out, accuracy, ties)


def _add_in_order(
    order: Sequence[int],
    models: Sequence[Loader],
    held_out: Sequence[float],
    accuracy: Callable[[Weights], float],
    ties: Ties,
) -> Soup:
    first, *rest = order
    soup, score_to_keep = Average.of(models[first]()), held_out[first]
    kept, trials = [first], [Trial(first, held_out[first], True)]
    for i in rest:
        candidate = soup.plus(models[i]())  # a new Average; dropping it costs nothing
        score = accuracy(candidate.weights())
        accepted = accepts(score, score_to_keep, ties)
        trials.append(Trial(i, score, accepted))
        if accepted:
            soup, score_to_keep = candidate, score
            kept.append(i)
    return Soup(soup.weights(), tuple(kept), equal(len(kept)), tuple(trials))


def random_order(number: int, seed: int, order: int) -> list[int]:
    """A keyed shuffle of 0 to number - 1: another model in the pool leaves the others in the order they had."""
    return sorted(range(number), key=lambda i: chance(seed, "greedy random order", order, i))


def greedy_random_order(
    models: Sequence[Loader],
    held_out: Sequence[float],
    accuracy: Callable[[Weights], float],
    *,
    seed: int,
    orders: int = 3,
    ties: Ties = "keep",
) -> tuple[Soup, ...]:
    """Greedy soups from a pool that was not sorted, one for each of several random orders (Table 3).

    The first model of an order always enters, as it does from a sorted list, so the soup may be worse than the best
    model. The paper reports mean and standard deviation over 3 orders.

    Args:
        models: K loaders; each called once an order.
        held_out: K accuracies; only that of an order's first model is used.
        accuracy: called K - 1 times an order.
        seed: of the orders; order j is a function of seed and j alone.
        orders: how many.
        ties: as in `greedy`.

    Raises:
        ValueError: as in `greedy`; or `orders` is less than 1.
    """
    if orders < 1:
        raise ValueError(f"greedy in random order needs at least one order, got {orders}")
    checked_order(models, held_out)
    return tuple(
        _add_in_order(random_order(len(models), seed, j), models, held_out, accuracy, ties) for j in range(orders)
    )


def greedy_with_replacement(
    models: Sequence[Loader],
    held_out: Sequence[float],
    accuracy: Callable[[Weights], float],
    *,
    rounds: int = 20,
) -> Soup:
    """Add, again and again, the one model of the whole pool that helps most; a model added twice weighs twice.

    It starts from the best model. A round tries the soup with each of the K models added once more and takes the
    highest accuracy, of equals the model that is better alone. The round's winner enters only if it is strictly
    better than the soup so far; the first round without such a winner ends the recipe, and `rounds` does at the
    latest. Strictly, since adding the only ingredient to itself changes nothing: with `>=` there is always a tie and
    the recipe would never end. Stopping there rather than after a fixed number of rounds (Caruana et al. take the
    best of the path) keeps a soup that is never below the best model and selects less on the held-out split.

    It costs K evaluations and K reads for every ingredient it adds, and K more to see that none helps; Recipe 1
    costs K - 1 in all.

    Args:
        models: K loaders.
        held_out: K accuracies in [0, 1] on the held-out split.
        accuracy: the same for candidate weights; called at most K x `rounds` times.
        rounds: the most models that are added to the first.

    Returns:
        Ingredients in the order of their first addition, weighing as often as they were added. Trials are the first
        model's, then K for each round in the order they were tried, best model first.

    Raises:
        ValueError: as in `greedy`; or `rounds` is less than 1.

    Source: the paper names it as another way to coefficients that differ (Appendix I), without a procedure; the
    rounds are those of Caruana et al. 2004, Section 2.2, from their sorted initialisation with N = 1.
    """
    if rounds < 1:
        raise ValueError(f"greedy with replacement needs at least one round, got {rounds}")
    order = checked_order(models, held_out)
    first = order[0]
    soup, score_to_keep = Average.of(models[first]()), held_out[first]
    added, trials = [first], [Trial(first, held_out[first], True)]
    for _ in range(rounds):
        scores: dict[int, float] = {}
        winner, candidate = order[0], soup
        for i in order:
            tried = soup.plus(models[i]())
            scores[i] = accuracy(tried.weights())
            if i == order[0] or scores[i] > scores[winner]:
                winner, candidate = i, tried
        improves = scores[winner] > score_to_keep
        trials += [Trial(i, scores[i], improves and i == winner) for i in order]
        if not improves:
            break
        soup, score_to_keep = candidate, scores[winner]
        added.append(winner)
    counts = Counter(added)
    return Soup(soup.weights(), tuple(counts), tuple(n / len(added) for n in counts.values()), tuple(trials))


def wise_ft(start: Loader, end: Loader, alpha: float) -> dict[str, Tensor]:
    """The point between the initialisation and a fine-tuned model or soup: (1 - alpha) start + alpha end.

    Args:
        start: the initialisation.
        end: any model or soup fine-tuned from it.
        alpha: in [0, 1]; 0 gives the start and 1 the end, to the bit.

    Raises:
        ValueError: alpha is outside [0, 1], or the two do not fit together.

    Source: Wortsman et al. 2021 (WiSE-FT); Figure D.1 draws it for every model and both soups.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"WiSE-FT interpolates with alpha in [0, 1], got {alpha}")
    return mixture([start(), end()], lambda name: (1 - alpha, alpha))
