"""Images that were decoded and resized once, in shards of plain bytes that are mapped into memory."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray
from torch import Tensor

from soups.files.atomic import replacing
from store.arrays import as_array, hash_of, read_array

SHARD = 2048  # images
ABANDONED = 3600  # seconds without a write, after which a half-written shard is of a dead process


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
        path, shape = self.path(first), (len(self.rows(first)), *self.shape)
        with replacing(path) as temporary, temporary.open("wb") as file:
            # Not by a memory map, which a full disk ends with a signal.
            write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            content = hash_of("|u1", shape)
            for image in images:
                content.update(np.ascontiguousarray(image).data)
                file.write(np.ascontiguousarray(image).data)
            np.save(file, as_array(content))
        for half_written in self.folder.glob(".*.tmp.npy"):
            _remove_abandoned(half_written)

    def check(self, first: int) -> None:
        """Compare the content of a shard with its digest, and with what it should be of; all of it is read.

        Raises:
            ValueError: it is damaged, of another shape or type, or of a version that wrote no digest.
        """
        self._open(first, checked=True)

    def _open(self, first: int, *, checked: bool = False) -> NDArray[np.uint8]:
        shape = (len(self.rows(first)), *self.shape)
        return read_array(self.path(first), shape, np.uint8, checked=checked)

    def read(self, rows: Tensor) -> Tensor:
        """(len(rows), *shape) uint8 images, whose shards have been written and checked.

        Raises:
            ValueError: a shard is no array, or of another shape.
        """
        numbers = rows.numpy()
        images = np.empty((len(numbers), *self.shape), dtype=np.uint8)
        for first in self.needed(rows):
            of_shard = numbers // SHARD * SHARD == first
            images[of_shard] = self._open(first)[numbers[of_shard] - first]
        return torch.from_numpy(images)


def _remove_abandoned(half_written: Path) -> None:
    try:
        if time.time() - half_written.stat().st_mtime > ABANDONED:
            half_written.unlink()
    except FileNotFoundError:  # its writer has renamed it, or another process was faster
        pass
