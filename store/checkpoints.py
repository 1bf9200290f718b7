"""Readers of weight files, block by block into the caller's buffer: memory does not depend on the size of a file.

Read are: safetensors; safetensors in shards, named by their index json or by its folder; state dicts of torch.save
(.pt .pth .bin .ckpt), never executing a pickle. A tensor block is read with preadv into a reused buffer, since a page
of a memory map costs a fault each time it is first touched.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from configs.errors import UserError
from store.dtypes import STORED

INDEX = "model.safetensors.index.json"
WHOLE = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
BLOCK = 1 << 18  # elements read at once: the buffers of a block stay in the processor's cache
SAMPLE = 4096  # bytes of each tensor that `sample` looks at
LONGEST_HEADER = 100_000_000  # bytes; the limit of the format


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
    unwrapped: str = ""  # the key of the outer dict under which the state dict was found
    metadata: dict[str, str] = field(default_factory=dict)

    def own(self, name: str) -> str:
        """The name in `entries` of the tensor that `name` means."""
        return self.ties.get(name, name)

    def read(self, name: str, start: int, buffer: NDArray) -> None:
        """Fill `buffer` with the stored elements of a tensor from element `start` on."""
        self.fill(self.own(name), start * buffer.itemsize, buffer.view(np.uint8).data)

    def blocks(self, name: str, buffer: NDArray[np.uint8]) -> Iterator[NDArray]:
        """The stored elements of a tensor, as many as fit at a time in `buffer`, whose content is overwritten."""
        entry = self.entries[self.own(name)]
        stored = buffer[: len(buffer) // 8 * 8].view(STORED[entry.dtype])
        for start in range(0, entry.size, len(stored)):
            part = stored[: min(len(stored), entry.size - start)]
            self.read(name, start, part)
            yield part


def supported(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself.

    Raises:
        UserError: a tensor of a kind that cannot be averaged here.
    """
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


def _header(path: Path, descriptor: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where the tensors' bytes begin."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    size = os.fstat(descriptor).st_size
    if size < 8 or length > min(LONGEST_HEADER, size - 8):
        raise UserError(f"{path} is truncated or not a safetensors file: its header does not fit in {size} bytes")
    try:
        header = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=_distinct)
        if not isinstance(header, dict):
            raise ValueError("it is not a dict")
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise UserError(f"{path} is damaged or not a safetensors file: cannot read its header ({error})") from None
    return header, 8 + length


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} is damaged: its metadata is not a dict of strings")
    return metadata


def _natural(*numbers: Any) -> None:
    for number in numbers:
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{number!r} is not a size or a place")


def _offsets(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, tuple[Entry, int]]:
    """Each tensor and its place in the file, checked so that every byte of the file belongs to one tensor."""
    found: dict[str, tuple[Entry, int]] = {}
    try:
        for name, value in sorted(header.items()):
            entry = Entry(value["dtype"], tuple(value["shape"]))
            first, last = value["data_offsets"]
            _natural(first, last, *entry.shape)
            width = STORED[entry.dtype].itemsize if entry.dtype in STORED else None
            if width is not None and last - first != entry.size * width:
                raise UserError(f"{path} is damaged: tensor {name!r} {entry} does not have {last - first} bytes")
            found[name] = entry, start + first
        spans = sorted(tuple(value["data_offsets"]) for value in header.values())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: its header has an entry that is not a tensor ({error})") from None
    end = 0
    for first, last in spans:
        if first != end or last < first:
            raise UserError(f"{path} is damaged: its tensors overlap or leave gaps")
        end = last
    if start + end != size:
        raise UserError(f"{path} is truncated or damaged: {size} bytes, but its header speaks of {start + end}")
    return found


def _pread(places: dict[str, tuple[Path, int, int]], name: str, offset: int, view: memoryview) -> None:
    path, descriptor, start = places[name]
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], start + offset + done)
        if count == 0:
            raise UserError(f"{path}: tensor {name!r} ends too early; the file was truncated while it was read")
        done += count


def _recorded_ties(metadata: dict[str, str], names: set[str]) -> dict[str, str]:
    """Tied names that are not stored: `{name: stored name}`, as safetensors.torch.save_model and our soups write."""
    pairs: dict[str, Any] = dict(metadata)
    with suppress(ValueError, KeyError, TypeError):  # no soup, or somebody else's
        pairs |= json.loads(metadata["soup"])["tied"]
    return {
        name: kept
        for name, kept in sorted(pairs.items())
        if name not in names and isinstance(kept, str) and kept in names
    }


def _open_shards(path: Path, shards: Sequence[Path], stack: ExitStack) -> Checkpoint:
    places: dict[str, tuple[Path, int, int]] = {}
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        descriptor = os.open(shard, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        header, start = _header(shard, descriptor)
        metadata |= _metadata(shard, header)
        for name, (entry, place) in _offsets(shard, header, start, os.fstat(descriptor).st_size).items():
            if name in entries:
                raise UserError(f"{shard}: tensor {name!r} stands in {places[name][0].name} too")
            entries[name], places[name] = entry, (shard, descriptor, place)
    ties = _recorded_ties(metadata, set(entries))
    return Checkpoint(path, dict(sorted(entries.items())), ties, partial(_pread, places), metadata=metadata)


def _open_index(index: Path, stack: ExitStack) -> Checkpoint:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged or not an index of shards ({type(error).__name__}: {error})") from None
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names a shard outside its folder: {outside[0]!r}")
    missing = [name for name in shards if not (index.parent / name).exists()]
    if missing:
        raise UserError(f"{index}: its shard {missing[0]} is missing")
    checkpoint = _open_shards(index, [index.parent / name for name in shards], stack)
    unlike = sorted(listed.keys() ^ checkpoint.entries.keys())
    if unlike:
        where = "the index but in no shard" if unlike[0] in listed else "a shard but not in the index"
        raise UserError(f"{index}: tensor {unlike[0]!r} is in {where}")
    return checkpoint


def _in_folder(folder: Path) -> Path:
    """The weights of a folder as Hugging Face's libraries and open_clip write it."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        return folder / INDEX
    if len(files) == 1:
        return files[0]
    for name in WHOLE:
        if (folder / name).exists():
            return folder / name
    if list(folder.glob("*.bin.index.json")):
        raise UserError(f"{folder} has shards of pickles: load it and save it with save_pretrained, as safetensors")
    raise UserError(f"{folder} is a folder without {INDEX}: name a file in it")


def open_checkpoint(path: Path, stack: ExitStack) -> Checkpoint:
    """Open a weight file, an index of shards, or a folder that holds one of them; closed with `stack`.

    Raises:
        UserError: missing, truncated, damaged, not weights, or a kind of tensor that cannot be averaged.
    """
    try:
        if path.is_dir():
            path = _in_folder(path)
        if path.suffix == ".safetensors":
            return supported(_open_shards(path, [path], stack))
        if path.suffix == ".json":
            return supported(_open_index(path, stack))
        if path.suffix in PICKLED:
            from store.pickled import open_pickled  # noqa: PLC0415  # torch takes seconds to import

            return supported(open_pickled(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    raise UserError(f"{path}: not a weight file; known are .safetensors, {INDEX} and {' '.join(PICKLED)}")


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[Checkpoint]]:
    """Several weight files, open while the block lasts."""
    with ExitStack() as stack:
        yield [open_checkpoint(path, stack) for path in paths]


def hash_tensor() -> "xxhash.xxh3_128":
    """A running hash of a tensor's bytes: a hundred times faster than a cryptographic one, and no protection against
    someone who builds two files with one hash on purpose.
    """
    return xxhash.xxh3_128()


def content_digest(checkpoint: Checkpoint, tensors: dict[str, str]) -> str:
    """A name for the content of a file: 32 hex digits over each tensor's name, kind, shape and bytes, and the ties.

    It does not depend on the file's format, order, sharding or metadata.

    Args:
        checkpoint: the file.
        tensors: hexadecimal `hash_tensor` of every tensor in `checkpoint.entries`.
    """
    lines = [f"{name}/{entry}/{tensors[name]}" for name, entry in checkpoint.entries.items()]
    ties = [f"{name}={kept}" for name, kept in sorted(checkpoint.ties.items())]
    return hashlib.blake2b("\n".join([*lines, *ties]).encode(), digest_size=16).hexdigest()


def digest_file(checkpoint: Checkpoint) -> str:
    """`content_digest` of a file, in one reading."""
    buffer, tensors = np.empty(4 * BLOCK, np.uint8), {}
    for name in checkpoint.entries:
        running = hash_tensor()
        for block in checkpoint.blocks(name, buffer):
            running.update(block.data)
        tensors[name] = running.hexdigest()
    return content_digest(checkpoint, tensors)


def sample(checkpoint: Checkpoint) -> str:
    """A hash of each tensor's name, kind, shape and first bytes: equal for equal contents, and quickly read."""
    content = hashlib.blake2b(digest_size=16)
    for name, entry in checkpoint.entries.items():
        first = np.empty(min(entry.size, SAMPLE // STORED[entry.dtype].itemsize), STORED[entry.dtype])
        checkpoint.read(name, 0, first)
        content.update(f"{name}/{entry}/".encode() + first.tobytes())
    return content.hexdigest()
