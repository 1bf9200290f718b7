"""Accuracy half way between two models: where it drops, they are not in one basin and their soup is bad."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from soups.average import Average
from soups.files.weights import Weights


@dataclass(frozen=True)
class Barrier:
    """Two models and what lies between them."""

    first: int
    second: int
    ends: tuple[float, float]  # accuracies in [0, 1]
    midpoint: float  # of the equal mean of both

    @property
    def height(self) -> float:
        """How far the midpoint is below the mean of the ends; negative where averaging helps."""
        return sum(self.ends) / 2 - self.midpoint


def midpoint_barriers(
    models: Sequence[Callable[[], Weights]], accuracy: Callable[[Weights], float]
) -> tuple[Barrier, ...]:
    """The barrier between each pair of models, highest first.

    Args:
        models: K loaders; each is called K times, and two models are in memory.
        accuracy: on the held-out split, in [0, 1]; called K (K + 1) / 2 times.

    Raises:
        ValueError: models that do not fit together.
    """
    ends = [accuracy(load()) for load in models]
    found = []
    for i, j in combinations(range(len(models)), 2):
        middle = accuracy(Average.of(models[i]()).plus(models[j]()).weights())
        found.append(Barrier(i, j, (ends[i], ends[j]), middle))
    return tuple(sorted(found, key=lambda barrier: (-barrier.height, barrier.first, barrier.second)))
