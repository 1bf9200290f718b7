"""The running average of weights in memory, the ground of every recipe; `soups.files` does the same to files."""

from dataclasses import dataclass

import torch
from torch import Tensor

from soups.files import COUNTER
from store.dtypes import round_once
from store.pickled import NAMES, tied_names
from store.weights import Weights


@dataclass(frozen=True)
class Average:
    """The mean of some models' weights, kept as float64 sums so that no order of adding them loses digits.

    Floating-point tensors (parameters and buffers, batch-norm statistics among them) are averaged and rounded once, to
    the dtype they came in. Integer and boolean buffers must be equal in all models and are kept; of batch counters
    (`num_batches_tracked`) the largest is taken. Tensors that share memory in the first model are summed once and share
    memory in the average; the other models must have them shared or equal.
    """

    sums: dict[str, Tensor]  # float64 for floating-point tensors, the tensor itself for others; tied names share one
    dtypes: dict[str, torch.dtype]
    count: int

    @classmethod
    def of(cls, weights: Weights) -> "Average":
        """The average of one model.

        Raises:
            ValueError: a tensor holds NaN or infinity, or is complex or float8.
        """
        # All at once: of a mapping that reads when asked, a tensor may lie where the one before it was freed, and
        # would pass for tied to it.
        weights = dict(weights)
        ties = tied_names(weights)
        sums = {name: _term(name, tensor) for name, tensor in weights.items() if name not in ties}
        dtypes = {name: tensor.dtype for name, tensor in weights.items()}
        return cls({name: sums[ties.get(name, name)] for name in weights}, dtypes, 1)

    @property
    def ties(self) -> dict[str, str]:
        """Further names of a tied tensor -> its first name."""
        return tied_names(self.sums)

    def plus(self, weights: Weights) -> "Average":
        """The average with one more model; this one is left as it was.

        Raises:
            ValueError: keys, shapes, dtypes, ties or integer buffers differ, or a tensor holds NaN or infinity.
        """
        weights = dict(weights)
        only = sorted(self.sums.keys() ^ weights.keys())
        if only:
            raise ValueError(f"models with different parameters cannot be averaged; {only[0]!r} is not in all of them")
        ties = self.ties
        for name, kept in ties.items():
            if weights[name].data_ptr() != weights[kept].data_ptr() and not torch.equal(weights[name], weights[kept]):
                raise ValueError(f"parameter {name!r} is tied to {kept!r} in one model, but differs from it in another")
        sums = {name: self._plus(name, weights[name]) for name in self.sums if name not in ties}
        return Average({name: sums[ties.get(name, name)] for name in self.sums}, self.dtypes, self.count + 1)

    def _plus(self, name: str, tensor: Tensor) -> Tensor:
        total = self.sums[name]
        if tensor.shape != total.shape or tensor.dtype != self.dtypes[name]:
            raise ValueError(
                f"parameter {name!r}: {tuple(total.shape)} {self.dtypes[name]} and {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.is_floating_point():
            return total + _term(name, tensor)
        if name.endswith(COUNTER):
            return torch.maximum(total, tensor)
        if not torch.equal(tensor, total):
            raise ValueError(f"integer buffer {name!r} differs between models, and has no meaningful average")
        return total

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, in the dtypes of the models."""
        ties = self.ties
        means = {name: self._mean(name) for name in self.sums if name not in ties}
        return {name: means[ties.get(name, name)] for name in self.sums}

    def _mean(self, name: str) -> Tensor:
        dtype, total = self.dtypes[name], self.sums[name]
        return rounded(total / self.count, dtype) if dtype.is_floating_point else total


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 to another dtype in one rounding; torch itself goes to 16 bits over float32, and rounds twice."""
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    stored = round_once(values.reshape(-1).cpu().numpy(), NAMES[dtype])
    return torch.from_numpy(stored.view("<i2")).view(dtype).reshape(values.shape).to(values.device)


def _term(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in NAMES:
        raise ValueError(f"parameter {name!r} is {tensor.dtype}, which cannot be averaged: convert it first")
    if not tensor.is_floating_point():
        return tensor
    if not torch.isfinite(tensor).all():
        raise ValueError(f"parameter {name!r} holds NaN or infinity")
    return tensor.double()
