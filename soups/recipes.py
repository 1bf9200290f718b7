"""The paper's recipes as functions of loaders and scores; they know nothing of images, configs or files.

A model may be its weights, which makes a soup, or `{"logits": ...}` on the held-out split, which makes an ensemble:
the selection is the same (Section 3.3.2).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from soups.average import Average, Loader, mixture
from soups.files.weights import Weights
from soups.ranks import spread
from soups.selection import (
    Mixture,
    Result,
    Selection,
    Ties,
    Trial,
    add_in_order,
    add_with_replacement,
    best_first,
)

ImagesCorrect = Callable[[Weights, Tensor], Tensor]  # weights and (n,) image indices to (n,) bool
ROWS = 64  # of logits that are summed at once, so that they stay in the processor's cache


@dataclass(frozen=True)
class Soup:
    """A mixture and how it was chosen."""

    weights: dict[str, Tensor]
    ingredients: tuple[int, ...]  # in the order in which they were first added
    mixing: tuple[float, ...]  # one for each ingredient, positive, summing to 1
    trials: tuple[Trial, ...] = ()
    evaluations: int = 0  # mixtures that were scored
    rounds: int = 0  # of them, those that had to follow one another


def equal(number: int) -> tuple[float, ...]:
    """Mixing weights of `number` ingredients that weigh the same."""
    return (1 / number,) * number


def checked_order(models: Sequence[Loader], held_out: Sequence[float]) -> list[int]:
    """Indices of the models, best first; a ValueError where `held_out` is not one number a model."""
    if len(models) != len(held_out):
        raise ValueError(f"need one held-out accuracy per model, got {len(models)} and {len(held_out)}")
    return best_first(held_out)


def mean_of(models: Iterable[Loader]) -> dict[str, Tensor]:
    """The equal-weight mean; one model at a time is in memory beside the running sum."""
    average = Average()
    for load in models:
        average = average.plus(load())
    if not average.count:
        raise ValueError("a recipe needs at least one model")
    return average.weights()


def best(models: Sequence[Loader], held_out: Sequence[float], place: int = 1) -> Soup:
    """The individual model with the highest held-out accuracy (Table 2), or with place=2 the second highest."""
    order = best_first(held_out)
    if len(order) < place:
        raise ValueError(f"the second best model needs at least two, got {len(models)}")
    found = order[place - 1]
    return Soup(dict(models[found]()), (found,), (1.0,))


def subset(models: Sequence[Loader], held_out: Sequence[float], chosen: Iterable[int]) -> Soup:
    """The equal-weight mean of some models, by their indices; they are listed best first."""
    members = list(chosen)
    strange = sorted({i for i in members if not 0 <= i < len(models) or members.count(i) > 1})
    if strange:
        raise ValueError(
            f"a subset names each of models 0 to {len(models) - 1} at most once; {strange[0]} does not fit"
        )
    order = [i for i in checked_order(models, held_out) if i in members]
    return Soup(mean_of(models[i] for i in order), tuple(order), equal(len(order)))


def uniform(models: Sequence[Loader], held_out: Sequence[float]) -> Soup:
    """All models, whatever their accuracy (Table 2); they are listed best first."""
    return subset(models, held_out, range(len(models)))


def uniform_ensemble(models: Sequence[Loader], held_out: Sequence[float]) -> Soup:
    """The mean of all models' logits; they are listed best first."""
    order = tuple(checked_order(models, held_out))
    return Soup(GrowingLogits(models).mean(order), order, equal(len(order)))


class Growing:
    """Means of mixtures that grow by one model at a time: two sums are in memory, not K models.

    The same mixture has the same bits, whichever was asked for before.
    """

    def __init__(self, models: Sequence[Loader]):
        self.models = models
        self._base: tuple[Mixture, Average] = ((), Average())
        self._tried: tuple[Mixture, Average] = self._base

    def of(self, mixture: Mixture) -> Average:
        """The mean of a mixture, each model as often as it stands there."""
        for known, mean in (self._base, self._tried):
            if known == mixture:
                return mean
        begin = mixture[:-1]
        if self._tried[0] == begin:
            self._base = self._tried
        elif self._base[0] != begin[: len(self._base[0])]:
            self._base = ((), Average())
        self._tried = ((), Average())  # before another sum is made
        known, mean = self._base
        for i in begin[len(known) :]:
            mean = mean.plus(self.models[i]())
        self._base = begin, mean
        self._tried = mixture, mean.plus(self.models[mixture[-1]]())
        return self._tried[1]

    def mean(self, mixture: Mixture) -> dict[str, Tensor]:
        """The weights of that mean."""
        return self.of(mixture).weights()

    def soup(self, selection: Selection) -> "Soup":
        """What a selection comes to."""
        counts, number = Counter(selection.mixture), len(selection.mixture)
        shares = tuple(count / number for count in counts.values())
        weights = self.mean(selection.mixture)
        return Soup(weights, tuple(counts), shares, selection.trials, selection.evaluations, selection.rounds)


class GrowingLogits(Growing):
    """The same of (N, C) logits, in memory that is overwritten: about as fast as reading them."""

    def __init__(self, models: Sequence[Loader]):
        super().__init__(models)
        self._kept: Mixture = ()
        self._sum = self._mean = self._part = torch.empty(0)

    def mean(self, mixture: Mixture) -> dict[str, Tensor]:
        """The mean of a mixture, until the next is asked for."""
        begin, last = mixture[:-1], self._logits(mixture[-1])
        if not self._mean.numel():
            self._sum, self._mean = torch.zeros(last.shape, dtype=torch.float64), torch.empty_like(last)
            self._part = torch.empty_like(self._sum[:ROWS])
        if begin[: len(self._kept)] != self._kept:
            self._kept = ()
            self._sum.zero_()
        for i in begin[len(self._kept) :]:
            for total, added in zip(self._sum.split(ROWS), self._logits(i).split(ROWS), strict=True):
                total.add_(added)
        self._kept = begin
        for total, added, mean in zip(*(each.split(ROWS) for each in (self._sum, last, self._mean)), strict=True):
            part = self._part[: len(total)]
            mean.copy_(torch.add(total, added, out=part).div_(len(mixture)))
        return {"logits": self._mean}

    def _logits(self, i: int) -> Tensor:
        logits = self.models[i]()["logits"]
        if self._mean.numel() and logits.shape != self._mean.shape:  # which a sum might broadcast
            shapes = f"{tuple(logits.shape)} and not {tuple(self._mean.shape)}"
            raise ValueError(f"the logits of model {i} have the shape {shapes}")
        return logits


def greedy(
    models: Sequence[Loader],
    held_out: Sequence[float],
    accuracy: Callable[[Weights], float],
    *,
    grow: type[Growing] = Growing,
    order: Sequence[int] | None = None,
    ahead: int = 1,
    ties: Ties = "keep",
) -> Soup:
    """Add models best-first, keeping each one that does not lower held-out accuracy.

    Under torch.distributed every rank runs it and takes the same decisions: of the candidates of a round rank r scores
    every W-th, so `ahead` is best a multiple of the number W of ranks.

    Args:
        models: K loaders, called once each where `ahead` is 1, and else for each candidate that is built.
        held_out: K accuracies in [0, 1] on the held-out split, which is never a test set.
        accuracy: the same accuracy for candidate weights; called K - 1 times, with `ahead` above 1 more often.
        grow: `GrowingLogits` for an ensemble.
        order: in which models are added, as indices; None: best first. Of a random one (Table 3) the first always
            enters, so that the soup may be worse than the best model.
        ahead, ties: as in `add_in_order`.

    Raises:
        ValueError: no models, `held_out` is not one number per model, or models that do not fit together.

    Source: Wortsman et al. 2022, Recipe 1. Its test is `>=` (`keep`); the authors' released script has `>` (`drop`),
    which makes another soup only when a candidate ties exactly.
    """
    sorted_order, means = checked_order(models, held_out), grow(models)
    order, score = sorted_order if order is None else order, _scored(means, accuracy)
    return means.soup(add_in_order(order, held_out[order[0]], score, ahead=ahead, ties=ties))


def _scored(means: Growing, accuracy: Callable[[Weights], float]) -> Callable[[Sequence[Mixture], float], list[Result]]:
    def work(mixture: Mixture) -> Result:
        return Result(accuracy(means.mean(mixture)))

    return lambda mixtures, to_beat: spread(work, mixtures)


def greedy_with_replacement(
    models: Sequence[Loader],
    held_out: Sequence[float],
    accuracy: Callable[[Weights], float],
    *,
    grow: type[Growing] = Growing,
    rounds: int = 20,
) -> Soup:
    """`add_with_replacement` of models in memory: ingredients weigh as often as they were added."""
    checked_order(models, held_out)
    means = grow(models)
    return means.soup(add_with_replacement(held_out, _scored(means, accuracy), rounds=rounds))


def wise_ft(start: Loader, end: Loader, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) of the initialisation and alpha of a model or soup fine-tuned from it; at 0 and 1 to the bit.

    Source: Wortsman et al. 2021 (WiSE-FT); Figure D.1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"WiSE-FT interpolates with alpha in [0, 1], got {alpha}")
    return mixture([start(), end()], lambda name: (1 - alpha, alpha))


@dataclass(frozen=True)
class Paired:
    """Two models on the same images; only images that one of them gets wrong and the other right tell them apart."""

    gained: int  # images that the candidate gets right and the incumbent wrong
    lost: int  # the other way round

    @property
    def z(self) -> float:
        """In standard deviations of luck; 0 when nothing changed."""
        changed = self.gained + self.lost
        return (self.gained - self.lost) / sqrt(changed) if changed else 0.0


def hard_images_first(correct: Tensor, incumbent: Tensor, candidate: Tensor) -> Tensor:
    """(N,) image indices, those that a candidate most likely gets wrong first; of equals the smaller index.

    An image is harder the fewer ingredients get it right ((K, N) bool), and above that if the soup so far or the
    candidate by itself gets it wrong ((N,) bool), which are the closest to what is evaluated.

    >>> correct = torch.tensor([[True, False, True, True], [True, False, False, True]])
    >>> hard_images_first(correct, correct[0], torch.tensor([True, False, True, False]))
    tensor([1, 3, 2, 0])
    """
    return (correct.sum(dim=0) + len(correct) * (incumbent.long() + candidate.long())).argsort(stable=True)


def _correct_until_hopeless(
    weights: Weights, images_correct: ImagesCorrect, order: Tensor, to_reach: int, chunk: int
) -> tuple[Tensor, int]:
    """(N,) bool and how many images were looked at; those that were not count as right, the most they could be."""
    right = torch.ones(len(order), dtype=torch.bool)
    seen = 0
    for images in order.split(chunk):
        right[images] = images_correct(weights, images).cpu()
        seen += len(images)
        if int(right.sum()) < to_reach:
            break
    return right, seen


def greedy_counted(
    models: Sequence[Loader],
    correct: Tensor,
    images_correct: ImagesCorrect,
    *,
    ties: Ties = "keep",
    chunk: int = 256,
    significance: bool = False,
    min_sigma: float = 0.0,
) -> tuple[Soup, int]:
    """The decisions of `greedy` with fewer forward passes, for accuracies that are counts.

    A candidate looks at the held-out images in chunks, hard ones first, and is dropped once it cannot reach the soup so
    far; its score is then the most it could have reached (`exact=False`). One that is accepted has seen every image.
    A candidate is out only after more mistakes than the soup makes: with an accuracy of 0.8 the saving is at most 5 x.

    Args:
        models: K loaders; each called once.
        correct: (K, N) bool, whether ingredient k gets held-out image n right, from cached predictions.
        images_correct: the same for candidate weights on some of the images.
        chunk: images between two looks at the count; a multiple of the evaluation's batch.
        significance: compare each candidate that saw every image with the soup so far (`Trial.versus`).
        min_sigma: accept only candidates whose paired z is at least this, on top of the rule; 0 is the paper's rule.

    Returns:
        The soup, and the images on which candidates were evaluated, counted for each candidate.

    """
    if correct.ndim != 2 or len(correct) != len(models) or correct.shape[1] == 0:
        raise ValueError(f"need (K, N) results of {len(models)} models on N > 0 images, got {tuple(correct.shape)}")
    correct, n = correct.cpu(), correct.shape[1]
    order = best_first(correct.sum(dim=1).tolist())
    means, incumbent, forwards = Growing(models), correct[order[0]], 0
    last: tuple[Mixture, Tensor] = ((), incumbent)

    def score(mixtures: Sequence[Mixture], to_beat: float) -> list[Result]:
        nonlocal incumbent, last, forwards
        (mixture,) = mixtures
        if last[0] == mixture[:-1]:  # what was tried last is the soup now
            incumbent = last[1]
        images = hard_images_first(correct, incumbent, correct[mixture[-1]])
        to_reach = int(incumbent.sum()) + (ties == "drop")
        right, seen = _correct_until_hopeless(means.of(mixture).weights(), images_correct, images, to_reach, chunk)
        forwards += seen
        versus, last = Paired(int((right & ~incumbent).sum()), int((~right & incumbent).sum())), (mixture, right)
        vetoed = min_sigma != 0 and versus.z < min_sigma
        return [Result(int(right.sum()) / n, seen == n, versus if significance and seen == n else None, vetoed)]

    found = add_in_order(order, int(incumbent.sum()) / n, score, ties=ties)
    return means.soup(found), forwards
