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
from torch import Tensor

from soups.mixture import Loader
from store.checkpoints import open_checkpoint
from store.dtypes import STORED
from store.pickled import NAMES
from store.weights import Weights

Place = Literal["stream", "host", "device"]
DTYPES = {name: dtype for dtype, name in NAMES.items()}
BLOCK = 1 << 20  # elements whose products are summed in float32 before they go to a float64 sum


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

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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

    def of(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Each ingredient's number in [0, K) and its tensor of this name."""
        for i, weights in zip(self.own, self.held, strict=True):
            yield i, weights[name]


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
    sources = [models[i]() for i in own]
    for i, source in zip(own, sources, strict=True):
        only = sorted(set(names) ^ source.keys())
        if only:
            raise ValueError(f"ingredient {i} and the network have different tensors; {only[0]!r} is not in both")
        for name, target in targets.items():
            _check(f"ingredient {i}, parameter {name!r}", source[name], target)
    if place == "stream":
        return Residents(len(models), own, tuple(sources), None)
    where = torch.device("cpu") if place == "host" else device
    held: list[dict[str, Tensor]] = [{} for _ in own]
    mean: dict[str, Tensor] = {}
    for name, target in targets.items():
        centre = torch.zeros(target.shape, dtype=torch.float64)
        if differences:
            for source in sources:
                centre += source[name]
            centre = sum_over_ranks(centre) / len(models)
            mean[name] = centre.to(where, _wide(target.dtype))
        for kept, source in zip(held, sources, strict=True):
            tensor = source[name]
            kept[name] = (
                (tensor.double() - centre).to(where, torch.bfloat16) if differences else tensor.to(where, copy=True)
            )
    return Residents(len(models), own, tuple(held), mean if differences else None)


def _check(what: str, tensor: Tensor, target: Tensor) -> None:
    if tensor.shape != target.shape:
        raise ValueError(f"{what}: {tuple(tensor.shape)} and {tuple(target.shape)} in the network")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} holds NaN or infinity")


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
        total = torch.zeros_like(target, dtype=_wide(target.dtype))
        if residents.mean is not None and this_rank()[0] == 0:  # once, whatever the number of ranks
            total += residents.mean[name].to(total.device)
        numbers = shares(name)
        for i, tensor in residents.of(name):
            total.add_(tensor.to(total.device), alpha=numbers[i])
        target.copy_(sum_over_ranks(total))


@torch.no_grad()
def inner_products(gradients: Mapping[str, Tensor], residents: Residents) -> Tensor:
    """(T, K) float64 products of each of T gradients with each ingredient's tensor of the same name.

    Of differences to the mean they are smaller by the same number for all K, which a softmax does not see.
    """
    products = torch.zeros(len(gradients), residents.number, dtype=torch.float64)
    for row, (name, gradient) in enumerate(gradients.items()):
        flat = gradient.reshape(-1).to(_wide(gradient.dtype))
        for i, tensor in residents.of(name):
            blocks = zip(flat.split(BLOCK), tensor.reshape(-1).split(BLOCK), strict=True)
            products[row, i] = sum(torch.dot(g, t.to(g.device, g.dtype)).double() for g, t in blocks)
    return sum_over_ranks(products)
