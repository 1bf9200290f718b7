"""Images that were decoded and resized once, in shards of plain bytes that are mapped into memory."""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from store.arrays import read_array, write_rows

SHARD = 2048  # images
ABANDONED = 3600  # seconds without a write, after which a half-written shard is taken for that of a dead process


@dataclass(frozen=True)
class Shards:
    """N images of one shape; shard `first` holds the images first, first + 1, ... and is written once, whole or not."""

    folder: Path  # named by everything that the bytes depend on
    n: int
    shape: tuple[int, ...]  # of an image

    def path(self, first: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{first:08d}.npy"

    def rows(self, first: int) -> range:
        """The images of a shard."""
        return range(first, min(first + SHARD, self.n))

    def needed(self, rows: Tensor) -> list[int]:
        """The shards of the images `rows`, each once, in the order in which they are first needed."""
        return list(dict.fromkeys((rows // SHARD * SHARD).tolist()))

    def write(self, first: int, images: Iterable[NDArray[np.uint8]]) -> None:
        """Write a shard, image by image. Processes that write the same one at once replace equal bytes by equal bytes.

        Raises:
            UserError: no space is left on the disk.
        """
        write_rows(self.path(first), "|u1", self._shape(first), images)
        for half_written in self.folder.glob(".*.tmp.npy"):
            with suppress(FileNotFoundError):  # its writer has renamed it, or another process was faster
                if time.time() - half_written.stat().st_mtime > ABANDONED:
                    half_written.unlink()

    def check(self, first: int) -> None:
        """Compare the content of a shard with its digest, and with what it should be of; all of it is read.

        Raises:
            ValueError: it is damaged, of another shape or type, or of a version that wrote no digest.
        """
        read_array(self.path(first), self._shape(first), np.uint8)

    def _shape(self, first: int) -> tuple[int, ...]:
        return (len(self.rows(first)), *self.shape)

    def read(self, rows: Tensor) -> Tensor:
        """(len(rows), *shape) uint8 images, whose shards have been written and checked.

        Raises:
            ValueError: a shard is no array, or of another shape.
        """
        numbers = rows.numpy()
        images = np.empty((len(numbers), *self.shape), dtype=np.uint8)
        for first in self.needed(rows):
            of_shard = numbers // SHARD * SHARD == first
            shard = read_array(self.path(first), self._shape(first), np.uint8, checked=False)
            images[of_shard] = shard[numbers[of_shard] - first]
        return torch.from_numpy(images)
