"""A soup in its library's network: what the modules of this folder write, read back and compare."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soups.errors import UserError

TOLERANCE = 1e-4  # of the largest output, and at least 1e-4
Inputs = dict[str, Tensor]  # arguments of the network by name
Answer = Callable[[Inputs], Tensor]  # (N, ...) outputs for N inputs


@dataclass(frozen=True)
class Images:
    """What is done to pictures before a network sees them."""

    size: int  # pixels, square, that the network sees
    resize: int  # pixels of the shorter side before the crop, or of both where squashed
    squash: bool
    mean: tuple[float, ...]  # of RGB in [0, 1]
    std: tuple[float, ...]

    def facts(self) -> dict[str, Any]:
        """For one who feeds an ONNX graph, which normalises by itself."""
        known: dict[str, Any] = {"resize": self.resize, "resize_mode": "squash" if self.squash else "shortest"}
        known |= {"crop": self.size, "interpolation": "bicubic", "range": "uint8, 0 to 255, RGB"}
        return known | {"mean_inside": list(self.mean), "std_inside": list(self.std)}


@dataclass(frozen=True)
class Network:
    """A network of one of the libraries with a soup's weights, on the CPU, in evaluation mode."""

    name: str  # as its library calls it, or its architecture
    module: nn.Module
    answer: Callable[[nn.Module, Inputs], Tensor]
    inputs: Callable[[int], Inputs]  # that many random inputs, always the same
    class_names: tuple[str, ...] = ()
    images: Images | None = None  # of networks of pictures with one answer for each
    pad: int | None = None  # token that fills up short texts, of networks of texts
    config: Mapping[str, Any] = field(default_factory=dict)  # the library's own, as it is to be written
    folder: Path | None = None  # where companions such as a tokenizer lie


def loaded(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> nn.Module:
    """The network with all of these weights and no others, in evaluation mode; a `UserError` where they differ."""
    wanted = module.state_dict()
    for name in [*wanted, *weights]:  # in the network's order, so that a head's weight comes before its bias
        if name not in weights or name not in wanted:
            where = "the soup has no" if name in wanted else f"{what} has no"
            raise UserError(f"the soup is not of {what}: {where} tensor {name!r}")
        if weights[name].shape != wanted[name].shape:
            shapes = f"{tuple(weights[name].shape)} in the soup and {tuple(wanted[name].shape)} in the network"
            raise UserError(f"the soup is not of {what}: tensor {name!r} is {shapes}")
    module.load_state_dict(dict(weights))
    return module.eval()


@torch.no_grad()
def compare(network: Network, read: Answer, library: str) -> float:
    """The largest difference between what was written and the soup, on random inputs of two batch sizes.

    Raises:
        UserError: it is above 1e-4 of the largest output, or above 1e-4 where that is smaller than 1.
    """
    largest = 0.0
    for count in (2, 5):
        inputs = network.inputs(count)
        ours, theirs = network.answer(network.module, inputs).float(), read(inputs).float()
        gap = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
        if not gap <= TOLERANCE * max(1.0, ours.abs().max().item()):
            raise UserError(f"{library} loads the folder, but its outputs differ by {gap:.2g} from the soup's")
        largest = max(largest, gap)
    return largest


def random_pixels(name: str, size: int) -> Callable[[int], Inputs]:
    """(N, 3, S, S) float32 standard normal under the name of an argument, by N."""
    return lambda count: {name: torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))}


def of_one_input(module: nn.Module, inputs: Inputs) -> Tensor:
    """What a network says that has one argument and one answer."""
    (only,) = inputs.values()
    answered: Tensor = module(only)
    return answered
