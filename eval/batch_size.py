"""How many images fit into a GPU's memory at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from configs.errors import UserError
from models.classifier import Classifier

SMALLEST, LARGEST = 4, 1024  # images; beyond the largest, a pass is no faster
ON_CPU = 128  # memory is no question there


def largest_that_fits(attempt: Callable[[int], None]) -> int:
    """A power of two from 4 to 1024: half of the largest with which `attempt` runs, or 1024 where that runs.

    The half leaves room for what fragments and other processes may need on top.

    Args:
        attempt: raises torch.OutOfMemoryError where so many images are too many.

    Raises:
        UserError: not even 4 images fit.
    """
    size = SMALLEST
    while True:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            if size == SMALLEST:
                raise UserError(
                    f"not even {SMALLEST} images fit into the memory: set compute.eval_batch lower"
                ) from None
            return max(SMALLEST, size // 4)
        if size == LARGEST:
            return size
        size *= 2


def found_batch_size(model: Classifier, look: Callable[[Tensor], Tensor], size: int) -> int:
    """Images a forward pass of `model`, by trying on its GPU; on the CPU a fixed number.

    Args:
        model: on its device.
        look: the forward pass, in the precision of the evaluation.
        size: pixels, square.
    """
    device = model.head.weight.device
    if device.type == "cpu":
        return ON_CPU

    def attempt(images: int) -> None:
        try:
            look(torch.zeros(images, 3, size, size, dtype=torch.uint8, device=device))
        finally:
            torch.cuda.empty_cache()

    return largest_that_fits(attempt)
