"""A weight file, read and written block by block: memory does not depend on its size.

A block is read with preadv into a reused buffer: a page of a memory map costs a fault when it is first touched.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from soups.errors import UserError
from soups.files.atomic import replacing
from soups.files.dtypes import STORED

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
BLOCK = 1 << 18  # elements read at once: the buffers of a block stay in the processor's cache
SAMPLE = 4096  # bytes of each tensor that `sample` looks at


@dataclass(frozen=True)
class Entry:
    """What a tensor is, without its numbers."""

    dtype: str  # as safetensors calls it: F32, BF16, I64, ...
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Checkpoint:
    """An open weight file, or the shards of one model."""

    path: Path
    entries: dict[str, Entry]  # by name, sorted; a tied tensor stands here once
    ties: dict[str, str]  # another name of a tied tensor -> its name in `entries`
    fill: Callable[[str, int, memoryview], None]  # copy a tensor's bytes from an offset on into a buffer
    unwrapped: str = ""  # the path of keys, joined by dots, under which the state dict was found
    metadata: dict[str, str] = field(default_factory=dict)
    original: dict[str, str] = field(default_factory=dict)  # name -> its name in the file, where a wrapper changed it
    absent: frozenset[str] = frozenset()  # names in `ties` that the file knows of, and does not hold
    others: dict[str, Any] = field(default_factory=dict)  # what is no tensor in the state dict: numbers, None
    dropped: tuple[str, ...] = ()  # what the file holds beside the weights, such as an optimizer

    @property
    def names(self) -> tuple[str, ...]:
        """All names of tensors, those of tied ones too."""
        return (*self.entries, *self.ties)

    def own(self, name: str) -> str:
        """The name in `entries` of the tensor that `name` means."""
        return self.ties.get(name, name)

    def entry(self, name: str) -> Entry:
        """What the tensor is that `name` means."""
        return self.entries[self.own(name)]

    def read(self, name: str, start: int, buffer: NDArray[Any]) -> None:
        """Fill `buffer` with the stored elements of a tensor from element `start` on."""
        self.fill(self.own(name), start * buffer.itemsize, buffer.view(np.uint8).data)

    def elements(self, name: str, start: int = 0, count: int | None = None) -> NDArray[Any]:
        """The stored elements of a tensor from element `start` on; all that are left if `count` is None."""
        entry = self.entry(name)
        stored = np.empty(entry.size - start if count is None else count, STORED[entry.dtype])
        self.read(name, start, stored)
        return stored

    def blocks(self, name: str, buffer: NDArray[np.uint8]) -> Iterator[NDArray[Any]]:
        """The stored elements of a tensor, as many as fit at a time in `buffer`, whose content is overwritten."""
        entry = self.entry(name)
        stored = buffer[: len(buffer) // 8 * 8].view(STORED[entry.dtype])
        for start in range(0, entry.size, len(stored)):
            part = stored[: min(len(stored), entry.size - start)]
            self.read(name, start, part)
            yield part


def first_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Every further name of what has several, by equal keys -> its first name in alphabetical order."""
    first: dict[Any, str] = {}
    return {name: kept for name in sorted(keys) if (kept := first.setdefault(keys[name], name)) != name}


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with other names for some of its tensors; `original` says what they are in the file."""
    if not names:
        return checkpoint
    before = {names.get(name, name): name for name in checkpoint.names}
    original = {new: checkpoint.original.get(old, old) for new, old in before.items()}
    return replace(
        checkpoint,
        entries=dict(sorted((names.get(name, name), entry) for name, entry in checkpoint.entries.items())),
        ties={names.get(name, name): names.get(kept, kept) for name, kept in checkpoint.ties.items()},
        fill=lambda name, offset, view: checkpoint.fill(before[name], offset, view),
        original={new: old for new, old in original.items() if new != old},
        absent=frozenset(names.get(name, name) for name in checkpoint.absent),
    )


def supported(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself; raises UserError where a tensor is of a kind that cannot be averaged here."""
    for name, entry in checkpoint.entries.items():
        if entry.dtype not in STORED:
            raise UserError(
                f"{checkpoint.path}: tensor {name!r} is {entry.dtype}, which cannot be averaged: "
                "convert it to float32, float16 or bfloat16 first"
            )
    return checkpoint


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands in it twice")
    return values


def read_header(path: Path, descriptor: int) -> tuple[dict[str, str], dict[str, tuple[Entry, int]]]:
    """The metadata of a safetensors file, and each tensor and its place; a UserError where a byte belongs to none."""
    try:
        with safe_open(path, "np"):  # which checks kinds, shapes and places
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            header = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=_distinct)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is truncated, damaged or not a safetensors file ({error})") from None
    metadata = header.pop("__metadata__", None) or {}
    return metadata, {
        name: (Entry(value["dtype"], tuple(value["shape"])), 8 + length + value["data_offsets"][0])
        for name, value in sorted(header.items())
    }


def pread(path: Path, name: str, descriptor: int, offset: int, view: memoryview) -> None:
    """Fill a buffer with bytes of a tensor from a place in its file; raises UserError where the file ends too early."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise UserError(f"{path}: tensor {name!r} ends too early; the file was truncated while it was read")
        done += count


def recorded_ties(metadata: dict[str, str], names: set[str]) -> dict[str, str]:
    """Tied names that are not stored: `{name: stored name}`, as safetensors.torch.save_model and our soups write."""
    pairs: dict[str, Any] = dict(metadata)
    with suppress(ValueError, KeyError, TypeError):  # no soup, or somebody else's
        pairs |= json.loads(metadata["soup"])["tied"]
    return {
        name: kept
        for name, kept in sorted(pairs.items())
        if name not in names and isinstance(kept, str) and kept in names
    }


def open_safetensors(path: Path, stack: ExitStack) -> Checkpoint:
    """Open a .safetensors, which is closed with `stack`; raises UserError where it is truncated or damaged."""
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    metadata, found = read_header(path, descriptor)
    ties = recorded_ties(metadata, set(found))
    entries = {name: entry for name, (entry, _) in found.items()}

    def fill(name: str, offset: int, view: memoryview) -> None:
        pread(path, name, descriptor, found[name][1] + offset, view)

    return Checkpoint(path, entries, ties, fill, metadata=metadata, absent=frozenset(ties))


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
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **described}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + place for name, place in offsets.items()}, start + end


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


@contextmanager
def streamed(
    path: Path, entries: Mapping[str, Entry], metadata: Callable[[], Mapping[str, str]], *, sync: bool = True
) -> Iterator[Callable[[str, int, NDArray[Any]], None]]:
    """A safetensors file of all these tensors that appears under `path` when the block ends well.

    The block gets a function that puts stored elements of a tensor into the file, from the element of a number on, for
    threads in any order. The space is taken at once, so that a full disk is known before the work. `metadata` is asked
    before and after the block, since digests of what was read are known only then; its length must not change.
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


# A running hash of a tensor's bytes: a hundred times faster than a cryptographic one, and no protection against someone
# who builds two files with one hash on purpose.
hash_tensor = xxhash.xxh3_128


def content_digest(checkpoint: Checkpoint, tensors: dict[str, str]) -> str:
    """A name for the content of a file, from the `tensor_digests` of all entries: it does not depend on format, order,
    sharding, metadata or wrappers.
    """
    stored = {name: checkpoint.original.get(name, name) for name in checkpoint.names}
    lines = sorted((stored[name], f"{entry}/{tensors[name]}") for name, entry in checkpoint.entries.items())
    ties = sorted((stored[name], stored[kept]) for name, kept in checkpoint.ties.items())
    text = [*(f"{name}/{rest}" for name, rest in lines), *(f"{name}={kept}" for name, kept in ties)]
    return hashlib.blake2b("\n".join(text).encode(), digest_size=16).hexdigest()


def tensor_digests(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Hexadecimal `hash_tensor` of some tensors in `checkpoint.entries`."""
    buffer, tensors = np.empty(4 * BLOCK, np.uint8), {}
    for name in names:
        running = hash_tensor()
        for block in checkpoint.blocks(name, buffer):
            running.update(block.data)
        tensors[name] = running.hexdigest()
    return tensors


def digest_file(checkpoint: Checkpoint) -> str:
    """`content_digest` of a file, in one reading."""
    return content_digest(checkpoint, tensor_digests(checkpoint, checkpoint.entries))


def sample(checkpoint: Checkpoint) -> str:
    """A hash of each tensor's name, kind, shape and first bytes: equal for equal contents, and quickly read."""
    content = hashlib.blake2b(digest_size=16)
    for name, entry in checkpoint.entries.items():
        first = checkpoint.elements(name, 0, min(entry.size, SAMPLE // STORED[entry.dtype].itemsize))
        content.update(f"{name}/{entry}/".encode() + first.tobytes())
    return content.hexdigest()
