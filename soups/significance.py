"""Is a candidate better than the soup it replaces by more than the luck of the images?"""

from dataclasses import dataclass
from math import sqrt

from scipy.stats import binomtest
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
        changed = self.gained + self.lost
        return float(binomtest(self.gained, changed).pvalue) if changed else 1.0


def paired(candidate: Tensor, incumbent: Tensor) -> Paired:
    """Compare two (N,) bool tensors of which images were classified correctly.

    Raises:
        ValueError: they are of different lengths.
    """
    if candidate.shape != incumbent.shape:
        raise ValueError(f"need the same images; got {tuple(candidate.shape)} and {tuple(incumbent.shape)}")
    return Paired(int((candidate & ~incumbent).sum()), int((~candidate & incumbent).sum()))
