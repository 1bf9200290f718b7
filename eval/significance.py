"""Is the difference between two models more than the luck of the test images?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies with its percentile interval, all in [-1, 1]."""

    mean: float
    low: float
    high: float


@lru_cache(maxsize=16)
def times_drawn(groups: int, resamples: int, seed: int) -> Tensor:
    """(resamples, groups) int16: how often each group is drawn; kept, since a table compares many models on it."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(generator.multinomial(groups, np.full(groups, 1 / groups), resamples).astype(np.int16))


def paired_bootstrap(
    model: Sequence[Tensor],
    baseline: Sequence[Tensor],
    groups: Sequence[Tensor],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Difference:
    """Accuracy of `model` minus that of `baseline`, averaged over splits, with a percentile bootstrap interval.

    Both are measured on the same images, so what is resampled are groups of images with both results. Groups
    span the splits: a class that shows up in several shifts is drawn, or not, in all of them at once.

    Args:
        model: one (N_s,) bool tensor per split: whether each image was classified correctly.
        baseline: the same for the model compared with.
        groups: one (N_s,) integer tensor per split, in [0, G); `arange` offsets make each image its own group.
        resamples: number of bootstrap draws.
        seed: of those draws.
        level: coverage of the interval.

    Returns:
        The mean difference and the interval of its unweighted mean over splits.

    Raises:
        ValueError: no splits, or tensors of a split differ in length.

    Source: Efron and Tibshirani 1993, chapter 13; cluster resampling as in Field and Welsh 2007.
    """
    if not model or not (len(model) == len(baseline) == len(groups)):
        raise ValueError(f"need as many splits of each; got {len(model)}, {len(baseline)}, {len(groups)}")
    if any(not len(m) == len(b) == len(g) for m, b, g in zip(model, baseline, groups, strict=True)):
        raise ValueError("results and groups of a split differ in length")
    size = 1 + max(int(group.max()) for group in groups)
    present = torch.zeros(size, dtype=torch.bool)
    for group in groups:
        present[group] = True
    # (resamples, G) how often each group that occurs is drawn
    drawn = torch.zeros(resamples, size, dtype=torch.float64)
    drawn[:, present] = times_drawn(int(present.sum()), resamples, seed).double()

    mean, draws = 0.0, torch.zeros(resamples, dtype=torch.float64)
    for ours, theirs, group in zip(model, baseline, groups, strict=True):
        gain = ours.double() - theirs.double()  # (N_s,) in {-1, 0, 1}
        mean += gain.mean().item() / len(model)
        gains = torch.zeros(size, dtype=torch.float64).index_add_(0, group, gain)  # (G,)
        counts = torch.zeros(size, dtype=torch.float64).index_add_(0, group, torch.ones_like(gain))  # (G,)
        draws += (drawn @ gains) / (drawn @ counts).clamp(min=1) / len(model)
    low, high = torch.quantile(draws, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Difference(mean, low, high)
