"""Where models lie: distances to a reference and angles between task vectors, streamed from files in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soups.conformance import Layout
from soups.files.checkpoints import BLOCK, Checkpoint
from soups.files.dtypes import FLOATS, widen
from soups.mean import STATISTICS

ANOTHER_ORIGIN = 0.5  # fine-tuned weights keep a cosine near 1 with where they started; unrelated ones are near 0
PARALLEL = 0.9995  # a cosine past which two tensors are interpolated on a line
SHORT = 1e-8  # a length that has no direction; both as in mergekit
NUMBERS_AT_ONCE = 4 * BLOCK  # float64, over all models: 4 MiB


@dataclass(frozen=True)
class Geometry:
    """Inner products of K models; differences are taken before products, so that near models keep their digits."""

    products: NDArray[np.float64]  # (K, K) of task vectors, which are differences to the reference
    crossed: NDArray[np.float64]  # (K,) of task vectors with the reference
    reference: float  # the reference's squared length

    @property
    def distances(self) -> NDArray[np.float64]:
        """(K,) L2 distances to the reference."""
        return np.sqrt(self.products.diagonal())

    @property
    def relative(self) -> NDArray[np.float64]:
        """(K,) distances in lengths of the reference."""
        return _divide(self.distances, np.sqrt(self.reference))

    @property
    def task_cosines(self) -> NDArray[np.float64]:
        """(K, K) cosines between task vectors; NaN where one has no length."""
        return _divide(self.products, np.outer(self.distances, self.distances))

    @property
    def weight_cosines(self) -> NDArray[np.float64]:
        """(K, K) cosines between the models' weights themselves."""
        weights = self.products + self.crossed + self.crossed[:, None] + self.reference
        lengths = np.sqrt(weights.diagonal())
        return _divide(weights, np.outer(lengths, lengths))

    @property
    def reference_cosines(self) -> NDArray[np.float64]:
        """(K,) cosines between each model's weights and the reference."""
        lengths = np.sqrt(self.products.diagonal() + 2 * self.crossed + self.reference)
        return _divide(self.crossed + self.reference, lengths * np.sqrt(self.reference))


def _divide(above: NDArray[Any], below: NDArray[Any] | float) -> NDArray[Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def geometry(checkpoints: Sequence[Checkpoint], layout: Layout, init: Checkpoint | None = None) -> Geometry:
    """Inner products of K models, tied tensors once; integers, batch-norm statistics and what is not averaged left out.

    The reference is `init`, or without it the mean of the models. Memory: K x K numbers and 16 MiB.
    """
    count = len(checkpoints)
    products, crossed, reference = np.zeros((count, count)), np.zeros(count), 0.0
    width = max(1, NUMBERS_AT_ONCE // (count + 1))
    for name, entry in layout.entries.items():
        if entry.dtype not in FLOATS or name.endswith(STATISTICS) or name in layout.kept:
            continue
        for start in range(0, entry.size, width):
            rows = np.empty((count + 1, min(width, entry.size - start)))
            for row, checkpoint in zip(rows, [*checkpoints, init], strict=True):
                if checkpoint is None:
                    row[:] = rows[:-1].mean(axis=0)
                else:
                    row[:] = widen(checkpoint.elements(name, start, len(row)), checkpoint.entry(name).dtype)
            tasks, origin = rows[:-1] - rows[-1], rows[-1]
            products += tasks @ tasks.T
            crossed += tasks @ origin
            reference += float(origin @ origin)
    return Geometry(products, crossed, reference)


def slerp_weights(one: Checkpoint, other: Checkpoint, name: str, layout: Layout, t: float) -> list[float]:
    """The weights of two models in a tensor that lies a share `t` of the angle from the first."""
    found = geometry([other], Layout({name: layout.entries[name]}, {}), one)
    lengths = found.reference, float(found.products[0, 0] + 2 * found.crossed[0] + found.reference)
    if found.reference == lengths[1] == 0:
        cosine = 1.0  # nothing that has a direction, such as batch-norm statistics
    else:
        cosine = float(found.reference_cosines[0]) if min(lengths) > SHORT**2 else 0.0
    if abs(cosine) > PARALLEL:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def medians_of_others(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) of each row of a (K, K) matrix, its diagonal left out; 1 where there is no other."""
    if len(cosines) < 2:
        return np.ones(len(cosines))
    return np.array([np.median(np.delete(row, i)) for i, row in enumerate(cosines)])
