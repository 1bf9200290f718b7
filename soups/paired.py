"""Two models on the same images: is one better by more than luck?"""

from dataclasses import dataclass
from math import sqrt

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

    @property
    def mid_p(self) -> float:
        """The same where outcomes exactly as extreme as this one count half, which is less cautious; 1 as `p`.

        Source: Fagerland et al. 2013, Section 2.

        >>> Paired(gained=5, lost=0).mid_p
        0.03125
        """
        import scipy.stats  # noqa: PLC0415

        changed = self.gained + self.lost
        if not changed:
            return 1.0
        sides = 1 if self.gained == self.lost else 2
        return self.p - sides * float(scipy.stats.binom.pmf(self.gained, changed, 0.5)) / 2


def paired(candidate: Tensor, incumbent: Tensor) -> Paired:
    """Compare two (N,) bool tensors of which images were classified correctly: McNemar's test is its `p`.

    Raises:
        ValueError: they are of different lengths.
    """
    if candidate.shape != incumbent.shape:
        raise ValueError(f"need the same images; got {tuple(candidate.shape)} and {tuple(incumbent.shape)}")
    return Paired(int((candidate & ~incumbent).sum()), int((~candidate & incumbent).sum()))
