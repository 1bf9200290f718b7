"""Means of weights in memory by `soups.mean`, and the two passes over ingredients that a learned soup's step takes."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soups.checks import sound_digest
from soups.conformance import common_layout, joint_kind
from soups.files.dtypes import FLOATS, STORED, round_once
from soups.files.weights import DTYPES, NAMES, LazyWeights, Weights, checkpoint_of
from soups.mean import Mean, Term
from soups.ranks import sum_over_ranks, this_rank

Loader = Callable[[], Weights]
Place = Literal["stream", "host", "device"]
# Elements that are read at once, and whose products are summed in float32 before a float64 sum: few enough to stay in a
# core's cache, or of a GPU enough to be worth a kernel.
BLOCK, GPU_BLOCK = 1 << 18, 1 << 20
AT_ONCE = 8  # threads at most, since each holds the sum of a whole tensor


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

    Of a `LazyWeights` a block is in memory, of a dict all of it is. `coefficients` are the K numbers of a tensor of a
    name, which sum to 1; not asked for integer and bool tensors.
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


class Buffers(threading.local):
    """Of each thread: what blocks of files are read into, and what those of another kind of number are converted in."""

    def __init__(self, block: int) -> None:
        self.block = block  # elements
        self.read: NDArray[np.uint8] = np.empty(8 * block, np.uint8)
        self.scratch = torch.empty(block, dtype=torch.float64)


def blocks_of(weights: Weights, name: str, buffers: Buffers) -> Iterator[Tensor]:
    """The elements of a tensor in order, a block at a time, read into a buffer where the weights are a file."""
    if isinstance(weights, LazyWeights):
        yield from weights.blocks(name, buffers.read, buffers.block)
    else:
        yield from weights[name].reshape(-1).split(buffers.block)


def _as(block: Tensor, like: Tensor, scratch: Tensor) -> Tensor:
    """The block as numbers like those of another tensor, where that is; converted in `scratch`, whose pages exist."""
    if block.device != like.device:
        return block.to(like.device, like.dtype)
    return block if block.dtype == like.dtype else scratch.view(like.dtype)[: len(block)].copy_(block)


@dataclass(frozen=True)
class Placement:
    """This rank's share of K ingredients: every W-th, as they are or as bfloat16 differences to the mean of all K."""

    number: int  # K, over all ranks
    own: tuple[int, ...]  # which of the K are here
    held: tuple[Weights, ...]  # one for each of `own`
    mean: Weights | None  # what the differences are to; None where ingredients are held as they are
    buffers: Buffers

    def blocks(self, name: str, like: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each block of the flat `like`, each ingredient's number in [0, K) and its block there, to be used in turn.

        A block of `like` is in the processor's cache from one ingredient to the next.
        """
        found = [(i, blocks_of(held, name, self.buffers)) for i, held in zip(self.own, self.held, strict=True)]
        for part in like.split(self.buffers.block):
            for i, blocks in found:
                yield i, part, _as(next(blocks), part, self.buffers.scratch)


def settle(
    models: Sequence[Loader],
    targets: Mapping[str, Tensor],
    network: Weights,
    *,
    place: Place,
    differences: bool = False,
    device: torch.device | None = None,
) -> Placement:
    """Bring this rank's share of the ingredients to where they stay, having checked that they can be mixed.

    Args:
        models: K loaders; this rank calls every W-th.
        targets: the floating-point tensors they are mixed into, by name.
        network: all tensors of the network by the ingredients' names, which are to have the same.
        place: `stream` keeps the loaders' answers and reads them again at every step, so a loader should answer with
            `LazyWeights`; `host` and `device` hold copies in memory.
        differences: hold bfloat16 differences to the mean, half the memory of float32; they are small beside the
            weights, and so is what their rounding does to the mix.
        device: where `device` is.
    """
    if differences and place == "stream":
        raise ValueError("differences to the mean are held in memory: choose the place host or device, not stream")
    if not models:
        raise ValueError("a recipe needs at least one model")
    rank, world = this_rank()
    own = tuple(range(rank, len(models), world))
    sources = [models[i]() for i in own]
    buffers = Buffers(BLOCK if device is None or device.type == "cpu" else GPU_BLOCK)
    checkpoints = [checkpoint_of(f"ingredient {i}", source) for i, source in zip(own, sources, strict=True)]
    common_layout([checkpoint_of("the network", network), *checkpoints])
    for checkpoint in checkpoints:
        sound_digest(checkpoint)
    if place == "stream":
        return Placement(len(models), own, tuple(sources), None, buffers)
    where = torch.device("cpu") if place == "host" else device
    held: list[dict[str, Tensor]] = [{} for _ in own]
    mean: dict[str, Tensor] = {}
    for name, target in targets.items():
        centre = torch.zeros(target.numel(), dtype=torch.float64)
        if differences:
            for source in sources:
                for part, block in zip(centre.split(buffers.block), blocks_of(source, name, buffers), strict=True):
                    part.add_(_as(block, part, buffers.scratch))
            centre = sum_over_ranks(centre) / len(models)
            mean[name] = centre.to(where, _wide(target.dtype)).reshape(target.shape)
        for kept, source in zip(held, sources, strict=True):
            if not differences:
                kept[name] = source[name].to(where, copy=True)
                continue
            kept[name] = torch.empty(target.shape, dtype=torch.bfloat16, device=where)
            parts, middles = kept[name].view(-1).split(buffers.block), centre.split(buffers.block)
            for part, middle, block in zip(parts, middles, blocks_of(source, name, buffers), strict=True):
                part.copy_(torch.sub(_as(block, middle, buffers.scratch), middle, out=buffers.scratch[: len(block)]))
    return Placement(len(models), own, tuple(held), mean if differences else None, buffers)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _for_each(tensors: Mapping[str, Tensor], work: Callable[[str], None], *, in_order: bool = False) -> None:
    """Work on each tensor, on several threads where tensors are on the host; each computes alone.

    Two threads that share every small sum wait for each other longer than they sum.
    """
    on_host = all(tensor.device.type == "cpu" for tensor in tensors.values())
    threads = min(torch.get_num_threads(), AT_ONCE) if on_host and not in_order else 1
    if threads == 1:
        for name in tensors:
            work(name)
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, tensors))
    finally:
        torch.set_num_threads(before)  # of threads that are yet to come, as those of autograd


def mix_into(targets: Mapping[str, Tensor], placement: Placement, shares: Callable[[str], Sequence[float]]) -> None:
    """Overwrite each target with the sum of shares x ingredients, in float32 or wider, a tensor a thread at a time.

    `shares` gives the K numbers, summing to 1, of a tensor of a name.
    """
    rank, world = this_rank()

    @torch.no_grad()  # which is a thread's own
    def mix(name: str) -> None:
        target, numbers = targets[name], shares(name)
        total = torch.zeros(target.shape, dtype=_wide(target.dtype), device=target.device)
        if placement.mean is not None and rank == 0:  # once, whatever the number of ranks
            total += placement.mean[name].to(total.device)
        for i, part, block in placement.blocks(name, total.view(-1)):
            part.add_(block, alpha=numbers[i])
        target.copy_(sum_over_ranks(total))

    _for_each(targets, mix, in_order=world > 1)  # ranks sum tensors in one order


def inner_products(gradients: Mapping[str, Tensor], placement: Placement) -> Tensor:
    """(T, K) float64 products of each of T gradients with each ingredient's tensor of the same name.

    Of differences to the mean they are smaller by the same number for all K, which a softmax does not see.
    """
    products = torch.zeros(len(gradients), placement.number, dtype=torch.float64)
    rows = {name: row for row, name in enumerate(gradients)}

    @torch.no_grad()
    def multiply(name: str) -> None:
        gradient = gradients[name]
        found = torch.zeros(placement.number, dtype=torch.float64, device=gradient.device)
        for i, part, block in placement.blocks(name, gradient.reshape(-1).to(_wide(gradient.dtype))):
            found[i] += torch.dot(part, block)
        products[rows[name]] = found

    _for_each(gradients, multiply)
    return sum_over_ranks(products)
