"""The paper's recipes as functions of loaders and scores; they know nothing of images, configs or files.

A model may be its weights, which makes a soup, or `{"logits": ...}` on the held-out split, which makes an ensemble:
the selection is the same (Section 3.3.2).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from soups.average import Average
from store.weights import Weights

Loader = Callable[[], Weights]


@dataclass(frozen=True)
class Trial:
    """One decision of a greedy recipe."""

    candidate: int
    score: float  # held-out accuracy in [0, 1] with the candidate added
    accepted: bool


@dataclass(frozen=True)
class Soup:
    """The mixture, its ingredients in the order they were added (each weighs the same), and every decision."""

    weights: dict[str, Tensor]
    ingredients: tuple[int, ...]
    trials: tuple[Trial, ...] = ()


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
    return Soup(dict(models[first]()), (first,))


def uniform(models: Sequence[Loader], held_out: Sequence[float]) -> Soup:
    """All models, whatever their accuracy (Table 2); they are listed best first."""
    return Soup(mean_of(models), tuple(best_first(held_out)))


def greedy(models: Sequence[Loader], held_out: Sequence[float], accuracy: Callable[[Weights], float]) -> Soup:
    """Add models best-first, keeping each one that does not lower held-out accuracy.

    Args:
        models: K loaders, one per fine-tuned model. Called once each; two sums are in memory, not K models.
        held_out: K accuracies in [0, 1] on the held-out split, which is never a test set.
        accuracy: the same accuracy for candidate weights; called K - 1 times.

    Raises:
        ValueError: no models, `held_out` is not one number per model, or models that do not fit together.

    Source: Wortsman et al. 2022, Recipe 1. Its test is `>=`; the authors' released script has `>`, which
    cooks another soup only when a candidate ties exactly.
    """
    if len(models) != len(held_out):
        raise ValueError(f"need one held-out accuracy per model, got {len(models)} and {len(held_out)}")
    first, *rest = best_first(held_out)
    soup, score_to_keep = Average.of(models[first]()), held_out[first]
    kept, trials = [first], [Trial(first, held_out[first], True)]
    for i in rest:
        candidate = soup.plus(models[i]())  # a new Average; dropping it costs nothing
        score = accuracy(candidate.weights())
        accepted = score >= score_to_keep
        trials.append(Trial(i, score, accepted))
        if accepted:
            soup, score_to_keep = candidate, score
            kept.append(i)
    return Soup(soup.weights(), tuple(kept), tuple(trials))
