"""Write a safetensors file block by block, in any order, whole or not at all."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soups.files.atomic import replacing
from soups.files.checkpoints import Entry
from soups.files.dtypes import STORED


def in_file_order(entries: Mapping[str, Entry]) -> list[str]:
    """Wide kinds first, so that every tensor is aligned; then by name, so that equal contents are equal files."""
    return sorted(entries, key=lambda name: (-STORED[entries[name].dtype].itemsize, name))


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor's bytes begin in the file, and the file's length."""
    described, offsets, end = {}, {}, 0
    for name in in_file_order(entries):
        entry = entries[name]
        offsets[name], end = end, end + entry.size * STORED[entry.dtype].itemsize
        described[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **described}, separators=(",", ":"))
    text += " " * (-len(text.encode()) % 8)
    start = 8 + len(text.encode())
    header = len(text.encode()).to_bytes(8, "little") + text.encode()
    return header, {name: start + offset for name, offset in offsets.items()}, start + end


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


@contextmanager
def streamed(
    path: Path, entries: Mapping[str, Entry], metadata: Callable[[], Mapping[str, str]], *, sync: bool = True
) -> Iterator[Callable[[str, int, NDArray[Any]], None]]:
    """A safetensors file that appears under `path` when the block ends well.

    The block gets a function that puts stored elements of a tensor into the file, from the element of a number on;
    threads may write different blocks.

    Args:
        path: of the file; its space is taken at once, so that a full disk is known before the work.
        entries: the tensors; every element of them must be written.
        metadata: asked before and after the block, since digests of what was read are known only then; the second
            answer must be as long as the first.
        sync: as in `replacing`.

    Raises:
        UserError: no space is left on the disk.
    """
    header, offsets, size = _header(entries, metadata())
    with replacing(path, sync=sync) as temporary, temporary.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS, where a full disk is known only when it is full
            os.posix_fallocate(file.fileno(), 0, size)
        yield lambda name, start, stored: _pwrite(
            file.fileno(), stored.view(np.uint8).data, offsets[name] + start * stored.itemsize
        )
        final, _, same_size = _header(entries, metadata())
        if (len(final), same_size) != (len(header), size):
            raise ValueError("the metadata of a streamed file changed its length")
        _pwrite(file.fileno(), memoryview(final), 0)
