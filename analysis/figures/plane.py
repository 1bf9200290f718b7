"""The plane through three models, in coordinates of an orthonormal basis, from their distances and angle alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soups.average import rounded
from soups.files.weights import Weights

Shares = tuple[float, float, float]  # coefficients of theta_0, theta_1 and theta_2 at a point; they sum to 1
FLAT = 1e-6  # share of theta_2's way out of the line below which three models make no plane


@dataclass(frozen=True)
class Plane:
    """x and y are distances from theta_0 along u1 and u2: u1 points to theta_1, and u2 is what is left of the way to
    theta_2, of unit length.
    """

    first: float  # theta_1 is at (first, 0)
    second: tuple[float, float]  # theta_2, with y > 0

    @property
    def models(self) -> tuple[tuple[float, float], ...]:
        """(x, y) of theta_0, theta_1 and theta_2."""
        return (0.0, 0.0), (self.first, 0.0), self.second

    def shares(self, x: float, y: float) -> Shares:
        """The weights at a point as a sum of the three models; exactly one of them at its own place.

        >>> Plane(2.0, (1.0, 4.0)).shares(1.0, 4.0), Plane(2.0, (1.0, 4.0)).shares(1.0, 0.0)
        ((0.0, 0.0, 1.0), (0.5, 0.5, 0.0))
        """
        of_second = y / self.second[1]
        of_first = (x - of_second * self.second[0]) / self.first
        return 1 - of_first - of_second, of_first, of_second


def plane_through(products: NDArray[np.float64]) -> Plane:
    """The plane of two models and what they started from, by Gram-Schmidt.

    Args:
        products: (2, 2) inner products of theta_1 - theta_0 and theta_2 - theta_0, from `soups.geometry`.

    Raises:
        ValueError: the three are on one line.

    Source: Garipov et al. 2018, Appendix A.2; Figure 2.

    >>> plane_through(np.array([[4.0, 2.0], [2.0, 17.0]]))
    Plane(first=2.0, second=(1.0, 4.0))
    """
    first = sqrt(products[0, 0])
    along = products[0, 1] / first if first > 0 else 0.0
    rest = products[1, 1] - along**2
    if first == 0 or rest <= FLAT**2 * products[1, 1]:
        raise ValueError("the three models are on one line, which spans no plane")
    return Plane(float(first), (float(along), sqrt(rest)))


def axes_of(plane: Plane, size: int, longest: int, margin: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y of a grid that reaches `margin` times the models' own extent beyond them on each side.

    The axis along which the models reach less far has `size` points. The other has as many as give it the same spacing,
    but no more than `longest` and no fewer than `size`: a model far away would else stretch the grid over a basin.
    """
    ends = [(min(places), max(places)) for places in zip(*plane.models, strict=True)]
    extents = [high - low for low, high in ends]
    both = []
    for (low, high), extent in zip(ends, extents, strict=True):
        wanted = round((size - 1) * extent / min(extents)) + 1
        both.append(np.linspace(low - margin * extent, high + margin * extent, max(size, min(wanted, longest))))
    return both[0], both[1]


def moving(models: Sequence[Weights]) -> list[str]:
    """The floating-point tensors that are not the same in all models; the others are the same in the whole plane."""
    first, *others = models
    return [
        name
        for name, tensor in first.items()
        if tensor.is_floating_point() and not all(torch.equal(tensor, other[name]) for other in others)
    ]


@torch.no_grad()
def set_between(state: Mapping[str, Tensor], models: Sequence[Weights], shares: Sequence[float]) -> None:
    """Overwrite a network's tensors by a weighted sum of models, in float64 and rounded once.

    Args:
        state: of the network, whose memory is written to; names that the models lack are left as they are.
        models: K models with the same names, on the network's device.
        shares: K numbers that sum to 1, of any sign.
    """
    for name in models[0]:
        total = torch.zeros_like(models[0][name], dtype=torch.float64)
        for share, model in zip(shares, models, strict=True):
            if share:
                total += share * model[name].double()
        state[name].copy_(rounded(total, models[0][name].dtype))
