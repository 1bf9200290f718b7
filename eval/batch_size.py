"""How many examples fit into a GPU's memory at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from configs.errors import UserError
from configs.training import Model
from store.processes import Processes, least_of_all

SMALLEST, LARGEST = 4, 1024  # examples; beyond the largest, a pass is no faster
ON_CPU = 128  # memory is no question there


def largest_that_fits(attempt: Callable[[int], None]) -> int:
    """A power of two from 4 to 1024: half of the largest with which `attempt` has enough memory, or 1024.

    The half leaves room for what fragments and other processes may need on top; a UserError where not even 4 fit.
    """
    size = SMALLEST
    while size <= LARGEST:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            if size == SMALLEST:
                raise UserError(
                    f"not even {SMALLEST} examples fit into the memory: set compute.eval_batch lower"
                ) from None
            return max(SMALLEST, size // 4)
        size *= 2
    return LARGEST


def found_by_all(find: Callable[[], int], processes: Processes) -> int:
    """The smallest of the numbers that the processes find; where one's `find` raises a UserError, all raise one."""
    refused = UserError("another process found no memory for a forward pass: set compute.eval_batch lower")
    try:
        found = find()
    except UserError as error:
        found, refused = 0, error
    least = least_of_all(found, processes)
    if least == 0:
        raise refused
    return least


def largest_input(model: Model, training: bool = False) -> Tensor:
    """(1, 3, S, S) uint8, or (1, L) token ids: an example that no other needs more memory than."""
    if model.is_reader:
        return torch.ones(1, model.max_length, dtype=torch.int64)
    size = model.image_size if training else model.evaluated_at
    return torch.zeros(1, 3, size, size, dtype=torch.uint8)


def found_batch_size(outputs: Callable[[Tensor], Tensor], example: Tensor, device: torch.device) -> int:
    """Examples a forward pass by `outputs` of inputs like `example`, by trying on a GPU; on the CPU a fixed number."""
    if device.type == "cpu":
        return ON_CPU

    def attempt(examples: int) -> None:
        try:
            outputs(example.to(device).repeat(examples, *[1] * (example.ndim - 1)))
        finally:
            torch.cuda.empty_cache()

    return largest_that_fits(attempt)
