"""Where the ingredients of a learned soup live while it is learned, and the two passes over them that a step takes."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soups.average import Loader
from soups.checks import sound_digest
from soups.conformance import common_layout
from soups.files.weights import LazyWeights, Weights, checkpoint_of
from soups.ranks import sum_over_ranks, this_rank

Place = Literal["stream", "host", "device"]
# Elements that are read at once, and whose products are summed in float32 before a float64 sum: few enough to stay in a
# core's cache, or of a GPU enough to be worth a kernel.
BLOCK, GPU_BLOCK = 1 << 18, 1 << 20
AT_ONCE = 8  # threads at most, since each holds the sum of a whole tensor


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

    Raises:
        ValueError: no models; differences that stream.
        UserError: a tensor is missing, of another shape, or holds NaN or infinity.
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
