"""Which of several models is the best, and whether a difference is more than the luck of the test images."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isnan

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from soups.scorers.metrics import score
from soups.scoring import Metric, sign_flip_p

LEVEL = 0.95  # coverage of the intervals


def best_on_held_out(scores: Sequence[float], held_out: str, reported: Collection[str]) -> int:
    """The place of the model with the highest score on the split `held_out`; a UserError where that one is reported."""
    if held_out in reported:
        raise UserError(f"{held_out!r} reports results, so models cannot be chosen on it: choose on a held-out split")
    return oracle(scores, held_out)


def oracle(scores: Sequence[float], split: str) -> int:
    """The place of the model with the highest score on any split, or average of splits; the first of equals.

    Only for rows that say so. In Table 4 each column has an oracle of its own, also that of the mean of the shifts, so
    the cells of the shifts may average to more than it. A ValueError tells of no scores, or one that is not a number.
    """
    if not scores or any(isnan(score) for score in scores):
        raise ValueError(f"the best on {split!r} needs one number per model and at least one, got {list(scores)}")
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


@dataclass(frozen=True)
class Difference:
    """A difference of scores with its percentile interval, all in [-1, 1], or [-2, 2] of correlations."""

    mean: float
    low: float
    high: float


def _check_splits(model: Sequence[Tensor], baseline: Sequence[Tensor], groups: Sequence[Tensor]) -> None:
    sizes = [[len(split) for split in splits] for splits in (model, baseline, groups)]
    if not sizes[0] or not all(sizes[0]) or not sizes[0] == sizes[1] == sizes[2]:
        raise ValueError(f"need N > 0 results and groups on each split, as many of each; got {sizes}")
    if any(torch.isnan(scores.double()).any() for scores in (*model, *baseline)):
        raise ValueError("a result is NaN, which has no difference to another")


@lru_cache(maxsize=16)
def _multinomial(groups: int, resamples: int, seed: int) -> Tensor:
    """(resamples, groups) int16: how often each group is drawn; kept, since a table compares many models on it."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(generator.multinomial(groups, np.full(groups, 1 / groups), resamples).astype(np.int16))


def _times_drawn(groups: Sequence[Tensor], resamples: int, seed: int) -> Tensor:
    """(resamples, G) int16: how often each draw takes each group; 0 for ids in [0, G) that no split has."""
    present = torch.cat(list(groups)).unique()
    drawn = torch.zeros(resamples, int(present.max()) + 1, dtype=torch.int16)
    drawn[:, present] = _multinomial(len(present), resamples, seed)
    return drawn


def _with_interval(mean: float, draws: Tensor) -> Difference:
    low, high = torch.quantile(draws, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return Difference(mean, low, high)


def paired_bootstrap(
    model: Sequence[Tensor], baseline: Sequence[Tensor], groups: Sequence[Tensor], *, resamples: int, seed: int
) -> Difference:
    """Accuracy of `model` minus that of `baseline`, averaged over splits, with a percentile bootstrap interval.

    Groups of images are resampled with both results. Groups span the splits: a class that shows up in several shifts is
    drawn, or not, in all of them at once.

    Args:
        model, baseline: one (N_s,) tensor a split: whether an image is right, or in how many of several runs.
        groups: one (N_s,) integer tensor a split, in [0, G).

    Raises:
        ValueError: no splits or images, tensors of a split differ in length, or a result is NaN.

    Source: Efron and Tibshirani 1993, chapter 13; cluster resampling as in Field and Welsh 2007.
    """
    _check_splits(model, baseline, groups)
    drawn = _times_drawn(groups, resamples, seed).double()
    mean, draws = 0.0, torch.zeros(resamples, dtype=torch.float64)
    for ours, theirs, group in zip(model, baseline, groups, strict=True):
        gain = ours.double() - theirs.double()  # (N_s,) in {-1, 0, 1}
        mean += gain.mean().item() / len(model)
        gains = torch.zeros(drawn.shape[1], dtype=torch.float64).index_add_(0, group, gain)  # (G,)
        counts = torch.zeros_like(gains).index_add_(0, group, torch.ones_like(gain))  # (G,)
        draws += (drawn @ gains) / (drawn @ counts).clamp(min=1) / len(model)
    return _with_interval(mean, draws)


@dataclass(frozen=True)
class Answers:
    """The classes that models predict on one split, beside the labels."""

    metric: Metric
    model: tuple[Tensor, ...]  # (N,) class ids of each model; several of one recipe count with their mean
    baseline: Tensor  # (N,)
    labels: Tensor  # (N,)
    units: Tensor  # (N,) images of a unit are drawn together: those of a class, or each by itself
    groups: Tensor | None = None  # (N,) for worst_group, such as regions; negative: in no group


def bootstrap_scores(splits: Sequence[Answers], *, resamples: int, seed: int) -> Difference:
    """As `paired_bootstrap`, for scores that are no mean over images: each draw computes them anew."""
    if not splits:
        raise ValueError("need the answers on at least one split")
    drawn = _times_drawn([split.units for split in splits], resamples, seed)

    def difference(split: Answers, weights: Tensor | None) -> float:
        ours = [score(split.metric, model, split.labels, split.groups, weights) for model in split.model]
        return sum(ours) / len(ours) - score(split.metric, split.baseline, split.labels, split.groups, weights)

    mean = sum(difference(split, None) for split in splits) / len(splits)
    draws = torch.zeros(resamples, dtype=torch.float64)
    for i in range(resamples):
        for split in splits:
            weights = drawn[i][split.units]
            if weights.any():
                draws[i] += difference(split, weights) / len(splits)
    return _with_interval(mean, draws)


def paired_permutation(
    model: Sequence[Tensor],
    baseline: Sequence[Tensor],
    groups: Sequence[Tensor],
    *,
    permutations: int = 100_000,
    seed: int = 0,
) -> float:
    """The two-sided p-value, in (0, 1], of `paired_bootstrap`'s difference, when each pair is swapped by a coin.

    Arguments and errors are those of `paired_bootstrap`; the images of a group are swapped together.
    """
    if permutations < 1:
        raise ValueError(f"need at least one permutation, got {permutations}")
    _check_splits(model, baseline, groups)
    effects = torch.zeros(1 + max(int(group.max()) for group in groups), dtype=torch.float64)  # (G,)
    for ours, theirs, group in zip(model, baseline, groups, strict=True):
        gains = torch.zeros_like(effects).index_add_(0, group.cpu(), ours.cpu().double() - theirs.cpu().double())
        effects += gains / (len(ours) * len(model))  # after the sum, so that equal gains of hits stay equal numbers
    return sign_flip_p(effects.numpy(), permutations=permutations, seed=seed)
