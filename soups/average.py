"""The running average of weights, the ground of every soup."""

from dataclasses import dataclass

import torch
from torch import Tensor

from store.weights import Weights


@dataclass(frozen=True)
class Average:
    """The mean of some models' weights, kept as float64 sums so that no order of adding them loses digits.

    Floating-point tensors (parameters and buffers) are averaged and rounded once, to the dtype they came in.
    Integer and boolean buffers must be equal in all models and are kept.
    """

    sums: dict[str, Tensor]  # float64 for floating-point tensors, the tensor itself for others
    dtypes: dict[str, torch.dtype]
    count: int

    @classmethod
    def of(cls, weights: Weights) -> "Average":
        """The average of one model.

        Raises:
            ValueError: a tensor holds NaN or infinity.
        """
        sums = {name: _term(name, tensor) for name, tensor in weights.items()}
        return cls(sums, {name: tensor.dtype for name, tensor in weights.items()}, 1)

    def plus(self, weights: Weights) -> "Average":
        """The average with one more model; this one is left as it was.

        Raises:
            ValueError: keys, shapes, dtypes or integer buffers differ, or a tensor holds NaN or infinity.
        """
        only = sorted(self.sums.keys() ^ weights.keys())
        if only:
            raise ValueError(f"models with different parameters cannot be averaged; {only[0]!r} is not in all of them")
        sums = {}
        for name, total in self.sums.items():
            tensor = weights[name]
            if tensor.shape != total.shape or tensor.dtype != self.dtypes[name]:
                raise ValueError(
                    f"parameter {name!r}: {tuple(total.shape)} {self.dtypes[name]} and "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            if tensor.is_floating_point():
                sums[name] = total + _term(name, tensor)
            elif torch.equal(tensor, total):
                sums[name] = total
            else:
                raise ValueError(f"integer buffer {name!r} differs between models, and has no meaningful average")
        return Average(sums, self.dtypes, self.count + 1)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, in the dtypes of the models."""
        return {
            name: (total / self.count).to(self.dtypes[name]) if self.dtypes[name].is_floating_point else total
            for name, total in self.sums.items()
        }


def _term(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if not torch.isfinite(tensor).all():
        raise ValueError(f"parameter {name!r} holds NaN or infinity")
    return tensor.double()
