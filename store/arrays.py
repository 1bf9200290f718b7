"""Arrays with a row for each image: logits and features, computed once for each model and split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import NDArray
from torch import Tensor

from soups.files.atomic import replacing


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file, whole or not at all, with the array's digest behind it, where `numpy.load` has stopped."""
    array = np.ascontiguousarray(array)
    with replacing(path) as temporary, temporary.open("wb") as file:
        write_array_header_1_0(file, header_data_from_array_1_0(array))
        file.write(array.data)  # np.save's error does not say that the disk is full
        np.save(file, _digest(array))


def _digest(array: NDArray[Any]) -> NDArray[np.uint8]:
    content = xxhash.xxh3_128(f"{array.dtype.str} {array.shape} ".encode())
    content.update(array.data)
    return np.frombuffer(content.digest(), dtype=np.uint8)


def read_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The float32 numbers in a file that `write_array` made; a ValueError where it is damaged or of another shape."""
    try:
        stored = np.load(path, mmap_mode="c", allow_pickle=False)  # kept in memory only while it is used
        if stored.shape != shape or stored.dtype != np.float32:
            raise ValueError(f"{stored.dtype} {stored.shape}, not float32 {shape}")
        with path.open("rb") as file:
            file.seek(stored.offset + stored.nbytes)
            recorded = np.load(file, allow_pickle=False)
    except EOFError:
        raise ValueError("it ends without the digest of its content") from None
    except OSError as error:
        raise ValueError(str(error)) from None
    if not np.array_equal(recorded, _digest(stored)):
        raise ValueError("its content is not what was written")
    return stored


def stored_array(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Float32 numbers, or None where they have to be computed: the file is absent or, which is printed, damaged."""
    if not path.exists():
        return None
    try:
        return torch.from_numpy(read_array(path, shape))
    except ValueError as error:
        print(f"cached array {path} is damaged ({error}): computing it anew", flush=True)
        return None


def cached_array(path: Path, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Tensor:
    """Read (N, C) float32 numbers, or compute, round to float32 and keep them; also where the file is damaged.

    The name in `path` must depend on everything that the numbers depend on (weights, images, transform).
    """
    stored = stored_array(path, shape)
    if stored is not None:
        return stored
    found = compute().to(torch.float32)
    if tuple(found.shape) != shape:
        raise ValueError(f"cached array {path}: need {shape} numbers, got {tuple(found.shape)}")
    write_array(path, found.numpy())
    return found
