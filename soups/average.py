"""Means of weights in memory; `soups.mean` does the work, as it does for files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from soups.conformance import common_layout, joint_kind
from soups.files.dtypes import FLOATS, STORED, round_once
from soups.files.weights import DTYPES, NAMES, Weights, checkpoint_of
from soups.mean import Mean, Term

Loader = Callable[[], Weights]


def _tensors(mean: Mean) -> dict[str, Tensor]:
    """The mean by the names in its layout's entries."""
    found = {}
    for name in mean.layout.entries:
        entry = mean.entry(name)
        stored = np.empty(entry.size, STORED[entry.dtype])
        for start, block in mean.blocks(name):
            stored[start : start + len(block)] = block
        found[name] = torch.from_numpy(stored).view(DTYPES[entry.dtype]).reshape(entry.shape)
    return found


@dataclass(frozen=True)
class Average:
    """The mean of some models' weights, at first of none, kept as float64 sums so that no order of them loses digits.

    Tensors that share memory in a model are summed once and share memory in the average.
    """

    # Float64 for floating-point tensors, the tensor itself for others; tied names share one.
    sums: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # of each tensor of the mean, as safetensors calls it
    count: int = 0

    def plus(self, weights: Weights) -> "Average":
        """The average with one more model, or a UserError where it does not fit; this one is left as it was."""
        new = checkpoint_of(f"model {self.count}", weights)
        before = [checkpoint_of("the models before", self.sums)] if self.count else []
        layout = common_layout([*before, new])
        wide = {name: "F64" if entry.dtype in FLOATS else entry.dtype for name, entry in layout.entries.items()}
        sums = _tensors(Mean([Term(found) for found in (*before, new)], layout, wide, total=1.0))
        names = dict.fromkeys([*self.sums, *new.names] if before else weights)
        stands = {name: layout.ties.get(name, name) for name in names if name in new.names or name in self.sums}
        kinds = {}
        for name, stand in stands.items():
            entry = new.entry(stand)
            kinds[name] = joint_kind({self.kinds.get(stand, entry.dtype), entry.dtype}) or entry.dtype
        return Average({name: sums[stand] for name, stand in stands.items()}, kinds, self.count + 1)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, in the kinds of the models."""
        total = checkpoint_of("the sum", self.sums)
        layout = common_layout([total])
        means = _tensors(Mean([Term(total)], layout, self.kinds, total=float(self.count)))
        return {name: means[layout.ties.get(name, name)] for name in self.sums}


def mixture(models: Sequence[Weights], coefficients: Callable[[str], Sequence[float]]) -> dict[str, Tensor]:
    """The weighted sum of K models, tensor by tensor, in float64 and rounded once: to the kind it came in, or the
    narrowest that holds several. Tied tensors come out equal, each with memory of its own.

    Args:
        models: of a `LazyWeights` a block is in memory, of a dict all of it is.
        coefficients: the K numbers of a tensor of this name, which sum to 1; not asked for integer and bool tensors.

    Raises:
        UserError: no models; names, shapes, kinds or integers differ; a tensor holds NaN or infinity.
    """
    if models and not any(models):
        return {}
    found = [checkpoint_of(f"model {i}", model) for i, model in enumerate(models)]
    layout = common_layout(found)
    rows = {name: coefficients(name) for name, entry in layout.entries.items() if entry.dtype in FLOATS}
    # The mean of K x share x tensor is the weighted sum.
    weights = [{name: float(row[i] * len(models)) for name, row in rows.items()} for i in range(len(models))]
    terms = [Term(checkpoint, weight) for checkpoint, weight in zip(found, weights, strict=True)]
    mixed = _tensors(Mean(terms, layout, total=float(len(models))))
    return {
        name: mixed[layout.ties[name]].clone() if name in layout.ties else mixed[name]
        for name in models[0]
        if layout.ties.get(name, name) in mixed
    }


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 to another dtype in one rounding; torch itself goes to 16 bits over float32, and rounds twice."""
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    stored = round_once(values.reshape(-1).cpu().numpy(), NAMES[dtype])
    return torch.from_numpy(stored.view("<i2")).view(dtype).reshape(values.shape).to(values.device)
