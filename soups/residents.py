"""Where the ingredients of a learned soup live while it is learned, and the two passes over them that a step takes."""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from soups.mixture import Loader
from store.checkpoints import open_checkpoint
from store.dtypes import STORED
from store.pickled import NAMES
from store.weights import Weights

Place = Literal["stream", "host", "device"]
DTYPES = {name: dtype for dtype, name in NAMES.items()}
BLOCK = 1 << 20  # elements that are read at once, and whose products are summed in float32 before a float64 sum
Buffer = NDArray[np.uint8]


class FileWeights(Mapping[str, Tensor]):
    """A weight file of any kind that can be souped, as weights that are read one tensor at a time, when asked for."""

    def __init__(self, path: Path):
        stack = ExitStack()
        self._checkpoint = open_checkpoint(path, stack)
        self._names = (*self._checkpoint.entries, *self._checkpoint.ties)
        weakref.finalize(self, stack.close)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._checkpoint.entries[self._checkpoint.own(name)]
        stored = np.empty(entry.size, STORED[entry.dtype])
        self._checkpoint.read(name, 0, stored)
        return torch.from_numpy(stored).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._checkpoint.entries[self._checkpoint.own(name)].shape

    def blocks(self, name: str, buffer: Buffer) -> Iterator[Tensor]:
        """The elements of a tensor in order, `BLOCK` at a time; each block is a view of `buffer`, good until the next.

        A buffer used again costs neither the memory nor the page faults of a fresh tensor for every reading.
        """
        dtype = DTYPES[self._checkpoint.entries[self._checkpoint.own(name)].dtype]
        for stored in self._checkpoint.blocks(name, buffer[: BLOCK * dtype.itemsize]):
            yield torch.from_numpy(stored).view(dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def blocks_of(weights: Weights, name: str, buffer: Buffer) -> Iterator[Tensor]:
    """The elements of a tensor in order, `BLOCK` at a time, read into `buffer` where the weights are a file."""
    if isinstance(weights, FileWeights):
        yield from weights.blocks(name, buffer)
    else:
        yield from weights[name].reshape(-1).split(BLOCK)


def _as(block: Tensor, like: Tensor, scratch: Tensor) -> Tensor:
    """The block as numbers like those of another tensor, where that is; converted in `scratch`, whose pages exist."""
    if block.device != like.device:
        return block.to(like.device, like.dtype)
    return block if block.dtype == like.dtype else scratch.view(like.dtype)[: len(block)].copy_(block)


def this_rank() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The tensor itself, after it was summed in place over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@dataclass(frozen=True)
class Residents:
    """This rank's share of K ingredients: every W-th, as they are or as bfloat16 differences to the mean of all K."""

    number: int  # K, over all ranks
    own: tuple[int, ...]  # which of the K are here
    held: tuple[Weights, ...]  # one for each of `own`
    mean: Weights | None  # what the differences are to; None where ingredients are held as they are
    buffer: Buffer  # what blocks of files are read into
    scratch: Tensor  # what blocks of another kind of number are converted in

    def blocks(self, name: str) -> Iterator[tuple[int, Iterator[Tensor]]]:
        """Each ingredient's number in [0, K) and the blocks of its tensor of this name, to be used in turn."""
        for i, weights in zip(self.own, self.held, strict=True):
            yield i, blocks_of(weights, name, self.buffer)


def settle(
    models: Sequence[Loader],
    targets: Mapping[str, Tensor],
    names: Collection[str],
    *,
    place: Place,
    differences: bool = False,
    device: torch.device | None = None,
) -> Residents:
    """Bring this rank's share of the ingredients to where they stay, having checked that they can be mixed.

    Args:
        models: K loaders; this rank calls every W-th.
        targets: the floating-point tensors they are mixed into, by name.
        names: all tensors of the network, which are to be those of each ingredient.
        place: `stream` keeps the loaders' answers and reads them again at every step, so a loader should answer with
            `FileWeights`; `host` and `device` hold copies in memory.
        differences: hold bfloat16 differences to the mean (half the memory of float32). The differences are small
            beside the weights, and so is what their rounding does to the mix.
        device: where `device` is.

    Raises:
        ValueError: no models; a tensor is missing, of another shape, or holds NaN or infinity; differences that stream.
    """
    if differences and place == "stream":
        raise ValueError("differences to the mean are held in memory: choose the place host or device, not stream")
    if not models:
        raise ValueError("a recipe needs at least one model")
    rank, world = this_rank()
    own = tuple(range(rank, len(models), world))
    sources, buffer = [models[i]() for i in own], np.empty(8 * BLOCK, np.uint8)
    scratch = torch.empty(BLOCK, dtype=torch.float64)
    for i, source in zip(own, sources, strict=True):
        only = sorted(set(names) ^ source.keys())
        if only:
            raise ValueError(f"ingredient {i} and the network have different tensors; {only[0]!r} is not in both")
        _check(f"ingredient {i}", source, targets, buffer)
    if place == "stream":
        return Residents(len(models), own, tuple(sources), None, buffer, scratch)
    where = torch.device("cpu") if place == "host" else device
    held: list[dict[str, Tensor]] = [{} for _ in own]
    mean: dict[str, Tensor] = {}
    for name, target in targets.items():
        centre = torch.zeros(target.numel(), dtype=torch.float64)
        if differences:
            for source in sources:
                for part, block in zip(centre.split(BLOCK), blocks_of(source, name, buffer), strict=True):
                    part.add_(_as(block, part, scratch))
            centre = sum_over_ranks(centre) / len(models)
            mean[name] = centre.to(where, _wide(target.dtype)).reshape(target.shape)
        for kept, source in zip(held, sources, strict=True):
            if differences:
                kept[name] = torch.empty(target.shape, dtype=torch.bfloat16, device=where)
                _subtract(blocks_of(source, name, buffer), centre, kept[name], scratch)
            else:
                kept[name] = source[name].to(where, copy=True)
    return Residents(len(models), own, tuple(held), mean if differences else None, buffer, scratch)


def _subtract(blocks: Iterator[Tensor], centre: Tensor, into: Tensor, scratch: Tensor) -> None:
    """Write a tensor that comes in blocks, less the flat float64 `centre`, into another."""
    for part, block, middle in zip(into.view(-1).split(BLOCK), blocks, centre.split(BLOCK), strict=True):
        part.copy_(torch.sub(_as(block, middle, scratch), middle, out=scratch[: len(block)]))


def _check(what: str, source: Weights, targets: Mapping[str, Tensor], buffer: Buffer) -> None:
    for name, target in targets.items():
        shape = tuple(source.shape(name) if isinstance(source, FileWeights) else source[name].shape)
        if shape != target.shape:
            raise ValueError(f"{what}, parameter {name!r}: {shape} and {tuple(target.shape)} in the network")
        if not all(torch.isfinite(block).all() for block in blocks_of(source, name, buffer)):
            raise ValueError(f"{what}, parameter {name!r} holds NaN or infinity")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def mix_into(targets: Mapping[str, Tensor], residents: Residents, shares: Callable[[str], Sequence[float]]) -> None:
    """Overwrite each target with the sum of shares x ingredients, in float32 or wider, one tensor at a time.

    Args:
        targets: tensors of the network, by name.
        residents: the ingredients.
        shares: the K numbers, summing to 1, of a tensor of this name.
    """
    for name, target in targets.items():
        total = torch.zeros(target.shape, dtype=_wide(target.dtype), device=target.device)
        if residents.mean is not None and this_rank()[0] == 0:  # once, whatever the number of ranks
            total += residents.mean[name].to(total.device)
        numbers = shares(name)
        for i, blocks in residents.blocks(name):
            for part, block in zip(total.view(-1).split(BLOCK), blocks, strict=True):
                part.add_(_as(block, part, residents.scratch), alpha=numbers[i])
        target.copy_(sum_over_ranks(total))


@torch.no_grad()
def inner_products(gradients: Mapping[str, Tensor], residents: Residents) -> Tensor:
    """(T, K) float64 products of each of T gradients with each ingredient's tensor of the same name.

    Of differences to the mean they are smaller by the same number for all K, which a softmax does not see.
    """
    products = torch.zeros(len(gradients), residents.number, dtype=torch.float64)
    for row, (name, gradient) in enumerate(gradients.items()):
        flat = gradient.reshape(-1).to(_wide(gradient.dtype))
        for i, blocks in residents.blocks(name):
            pairs = zip(flat.split(BLOCK), blocks, strict=True)
            products[row, i] = sum(torch.dot(g, _as(t, g, residents.scratch)).double() for g, t in pairs)
    return sum_over_ranks(products)
