"""Two models on the same examples: is one better by more than luck?"""

from dataclasses import dataclass
from itertools import product
from math import comb, prod, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Paired:
    """Two models on the same images; only images that one of them gets wrong and the other right tell them apart."""

    gained: int  # images that the candidate gets right and the incumbent wrong
    lost: int  # the other way round

    @property
    def z(self) -> float:
        """(gained - lost) / sqrt(gained + lost), in standard deviations of luck; 0 when nothing changed.

        >>> Paired(gained=12, lost=4).z
        2.0
        """
        changed = self.gained + self.lost
        return (self.gained - self.lost) / sqrt(changed) if changed else 0.0

    @property
    def p(self) -> float:
        """Two-sided p-value of the exact McNemar test, in (0, 1]; 1 when nothing changed.

        Source: McNemar 1947; under the null each change is a gain with probability 1/2.

        >>> Paired(gained=5, lost=0).p
        0.0625
        """
        import scipy.stats  # noqa: PLC0415  # greedy asks for z alone, which needs none of it

        changed = self.gained + self.lost
        return float(scipy.stats.binomtest(self.gained, changed).pvalue) if changed else 1.0


def paired(candidate: "Tensor", incumbent: "Tensor") -> Paired:
    """Compare two (N,) bool tensors of which images were classified correctly: McNemar's test is its `p`.

    Raises:
        ValueError: they are of different lengths.
    """
    if candidate.shape != incumbent.shape:
        raise ValueError(f"need the same images; got {tuple(candidate.shape)} and {tuple(incumbent.shape)}")
    return Paired(int((candidate & ~incumbent).sum()), int((~candidate & incumbent).sum()))


def sign_flip_p(effects: NDArray[Any], *, permutations: int = 100_000, seed: int = 0) -> float:
    """The two-sided p-value, in (0, 1], of a sum of effects, when a coin says the sign of each.

    Of differences of paired answers the coin swaps the two models on that example, so for hits it is McNemar's test.

    Args:
        effects: (N,) what each example adds to the difference of two models.
        permutations: how many are drawn. Where no more outcomes than that can come up, all are gone through, with
            their probabilities, and the test is exact; effects of one size are counted, not listed.
        seed: of the draws, with which p is at least 1 / (permutations + 1).

    Source: Good 2005, chapter 3; the count of the observed one among those drawn is Phipson and Smyth 2010, eq. 2.

    >>> sign_flip_p(np.array([1.0, 1.0, 1.0, 0.0]))
    0.25
    """
    sizes, counts = np.unique(np.abs(effects[effects != 0]), return_counts=True)
    # Sums that are equal on paper differ in the last digits; they count as equally extreme.
    to_reach = abs(float(effects.sum())) - 1e-9 * float(sizes @ counts)
    if len(counts) < 2 or prod(int(count) + 1 for count in counts) <= permutations:
        return min(1.0, _chance_of_all(sizes, counts, to_reach))
    return (1 + _drawn_as_extreme(sizes, counts, to_reach, permutations, seed)) / (1 + permutations)


def _chance_of_all(sizes: NDArray[Any], counts: NDArray[Any], to_reach: float) -> float:
    """The chance that counts[v] of each sizes[v], with random signs, add up to at least so far from 0."""
    # Of each number of heads among so many coins.
    chances = [[comb(count, heads) / 2**count for heads in range(count + 1)] for count in counts.tolist()]
    p = 0.0
    for plus in product(*(range(count + 1) for count in counts)):  # how many of each have a plus
        total = sum(size * (2 * k - count) for size, k, count in zip(sizes, plus, counts, strict=True))
        if abs(total) >= to_reach:
            p += prod(chance[k] for chance, k in zip(chances, plus, strict=True))
    return float(p)


def _drawn_as_extreme(sizes: NDArray[Any], counts: NDArray[Any], to_reach: float, draws: int, seed: int) -> int:
    """How many of so many random sums are at least so far from 0; in blocks, so that memory does not grow."""
    generator = np.random.Generator(np.random.PCG64(seed))
    block = max(1, 2**20 // len(counts))
    reached, total, repeated = 0, float(counts @ sizes), counts.max() > 1
    for start in range(0, draws, block):
        shape = (min(block, draws - start), len(counts))
        # Of scores that never repeat each sign is a coin, which is drawn faster than a binomial.
        plus = generator.binomial(counts, 0.5, shape) if repeated else generator.integers(2, size=shape, dtype=np.int8)
        reached += int((np.abs(2 * (plus.astype(np.float64) @ sizes) - total) >= to_reach).sum())
    return reached
