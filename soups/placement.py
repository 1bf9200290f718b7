"""Where the ingredients of a learned soup live while it is learned, and the two passes over them that a step takes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soups.average import Loader
from soups.checks import sound_digest
from soups.conformance import common_layout
from soups.files.tensors import LazyWeights, checkpoint_of
from soups.files.weights import Weights
from soups.ranks import sum_over_ranks, this_rank

Place = Literal["stream", "host", "device"]
BLOCK = 1 << 20  # elements that are read at once, and whose products are summed in float32 before a float64 sum
Buffer = NDArray[np.uint8]


def blocks_of(weights: Weights, name: str, buffer: Buffer) -> Iterator[Tensor]:
    """The elements of a tensor in order, `BLOCK` at a time, read into `buffer` where the weights are a file."""
    if isinstance(weights, LazyWeights):
        yield from weights.blocks(name, buffer, BLOCK)
    else:
        yield from weights[name].reshape(-1).split(BLOCK)


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
    buffer: Buffer  # what blocks of files are read into
    scratch: Tensor  # what blocks of another kind of number are converted in

    def blocks(self, name: str) -> Iterator[tuple[int, Iterator[Tensor]]]:
        """Each ingredient's number in [0, K) and the blocks of its tensor of this name, to be used in turn."""
        for i, weights in zip(self.own, self.held, strict=True):
            yield i, blocks_of(weights, name, self.buffer)


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
        differences: hold bfloat16 differences to the mean (half the memory of float32). The differences are small
            beside the weights, and so is what their rounding does to the mix.
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
    sources, buffer = [models[i]() for i in own], np.empty(8 * BLOCK, np.uint8)
    scratch = torch.empty(BLOCK, dtype=torch.float64)
    checkpoints = [checkpoint_of(f"ingredient {i}", source) for i, source in zip(own, sources, strict=True)]
    common_layout([checkpoint_of("the network", network), *checkpoints])
    for checkpoint in checkpoints:
        sound_digest(checkpoint)
    if place == "stream":
        return Placement(len(models), own, tuple(sources), None, buffer, scratch)
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
    return Placement(len(models), own, tuple(held), mean if differences else None, buffer, scratch)


def _subtract(blocks: Iterator[Tensor], centre: Tensor, into: Tensor, scratch: Tensor) -> None:
    """Write a tensor that comes in blocks, less the flat float64 `centre`, into another."""
    for part, block, middle in zip(into.view(-1).split(BLOCK), blocks, centre.split(BLOCK), strict=True):
        part.copy_(torch.sub(_as(block, middle, scratch), middle, out=scratch[: len(block)]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def mix_into(targets: Mapping[str, Tensor], placement: Placement, shares: Callable[[str], Sequence[float]]) -> None:
    """Overwrite each target with the sum of shares x ingredients, in float32 or wider, one tensor at a time.

    Args:
        targets: tensors of the network, by name.
        placement: the ingredients.
        shares: the K numbers, summing to 1, of a tensor of this name.
    """
    for name, target in targets.items():
        total = torch.zeros(target.shape, dtype=_wide(target.dtype), device=target.device)
        if placement.mean is not None and this_rank()[0] == 0:  # once, whatever the number of ranks
            total += placement.mean[name].to(total.device)
        numbers = shares(name)
        for i, blocks in placement.blocks(name):
            for part, block in zip(total.view(-1).split(BLOCK), blocks, strict=True):
                part.add_(_as(block, part, placement.scratch), alpha=numbers[i])
        target.copy_(sum_over_ranks(total))


@torch.no_grad()
def inner_products(gradients: Mapping[str, Tensor], placement: Placement) -> Tensor:
    """(T, K) float64 products of each of T gradients with each ingredient's tensor of the same name.

    Of differences to the mean they are smaller by the same number for all K, which a softmax does not see.
    """
    products = torch.zeros(len(gradients), placement.number, dtype=torch.float64)
    for row, (name, gradient) in enumerate(gradients.items()):
        flat = gradient.reshape(-1).to(_wide(gradient.dtype))
        for i, blocks in placement.blocks(name):
            pairs = zip(flat.split(BLOCK), blocks, strict=True)
            products[row, i] = sum(torch.dot(g, _as(t, g, placement.scratch)).double() for g, t in pairs)
    return sum_over_ranks(products)
