"""Arrays with a row for each image: logits and features, computed once for each model and split."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from store.atomic import replacing


def cached_array(path: Path, shape: tuple[int, int], compute: Callable[[], Tensor]) -> Tensor:
    """Read (N, C) float32 numbers, or compute and keep them.

    Args:
        path: its name must depend on everything the numbers depend on (weights, images, transform).
        shape: (N, C); a file of another shape is refused.
        compute: called only when the file is absent.

    Raises:
        UserError: the file is damaged or of another shape.
    """
    if not path.exists():
        found = compute()
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, found.numpy())
        return found
    try:
        stored = np.load(path, mmap_mode="c", allow_pickle=False)  # pages are read when they are looked at
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"cached array {path} is damaged ({error}): delete the file and run again") from None
    if stored.shape != shape or stored.dtype != np.float32:
        raise UserError(f"cached array {path}: {stored.dtype} {stored.shape}, not float32 {shape}; delete the file")
    return torch.from_numpy(stored)
