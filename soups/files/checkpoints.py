"""Readers of weight files, block by block into the caller's buffer: memory does not depend on the size of a file.

Read are: safetensors; checkpoints of torch.save, never executing a pickle; shards of either, named by their index json
or by its folder; models of the Hugging Face hub. What a file is, its first bytes say. A block of a tensor is read with
preadv into a reused buffer, since a page of a memory map costs a fault each time it is first touched.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from soups.errors import UserError
from soups.files.dtypes import STORED
from soups.files.folders import HUB, INDEX, from_hub, in_folder, is_shard
from soups.files.reading import Reading, only_here, without_wrappers

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

    def read(self, name: str, start: int, buffer: NDArray[Any]) -> None:
        """Fill `buffer` with the stored elements of a tensor from element `start` on."""
        self.fill(self.own(name), start * buffer.itemsize, buffer.view(np.uint8).data)

    def blocks(self, name: str, buffer: NDArray[np.uint8]) -> Iterator[NDArray[Any]]:
        """The stored elements of a tensor, as many as fit at a time in `buffer`, whose content is overwritten."""
        entry = self.entries[self.own(name)]
        stored = buffer[: len(buffer) // 8 * 8].view(STORED[entry.dtype])
        for start in range(0, entry.size, len(stored)):
            part = stored[: min(len(stored), entry.size - start)]
            self.read(name, start, part)
            yield part


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with other names for some of its tensors; `original` says what they are in the file."""
    if not names:
        return checkpoint
    before = {names.get(name, name): name for name in checkpoint.names}

    def fill(name: str, offset: int, view: memoryview) -> None:
        checkpoint.fill(before[name], offset, view)

    original = {new: checkpoint.original.get(old, old) for new, old in before.items()}
    return replace(
        checkpoint,
        entries=dict(sorted((names.get(name, name), entry) for name, entry in checkpoint.entries.items())),
        ties={names.get(name, name): names.get(kept, kept) for name, kept in checkpoint.ties.items()},
        fill=fill,
        original={new: old for new, old in original.items() if new != old},
        absent=frozenset(names.get(name, name) for name in checkpoint.absent),
    )


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
    pread(path, name, descriptor, start + offset, view)


def pread(path: Path, name: str, descriptor: int, offset: int, view: memoryview) -> None:
    """Fill a buffer with bytes of a tensor from a place in its file.

    Raises:
        UserError: the file ends too early.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
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


def _open_safetensors(path: Path, stack: ExitStack) -> Checkpoint:
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    header, start = _header(path, descriptor)
    metadata = _metadata(path, header)
    found = _offsets(path, header, start, os.fstat(descriptor).st_size)
    places = {name: (path, descriptor, place) for name, (_, place) in found.items()}
    ties = _recorded_ties(metadata, set(found))
    entries = {name: entry for name, (entry, _) in found.items()}
    fill = partial(_pread, places)
    return Checkpoint(path, entries, ties, fill, metadata=metadata, absent=frozenset(ties))


def _open_index(index: Path, stack: ExitStack, reading: Reading) -> Checkpoint:
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
    checkpoint = _together(index, [_open_file(index.parent / name, stack, reading) for name in shards])
    unlike = sorted(listed.keys() ^ (set(checkpoint.names) - checkpoint.absent))
    if unlike:
        where = "the index but in no shard" if unlike[0] in listed else "a shard but not in the index"
        raise UserError(f"{index}: tensor {unlike[0]!r} is in {where}")
    return checkpoint


def _together(path: Path, shards: Sequence[Checkpoint]) -> Checkpoint:
    """The shards of one model as one checkpoint."""
    place: dict[str, Checkpoint] = {}
    metadata: dict[str, str] = {}
    ties: dict[str, str] = {}
    for shard in shards:
        metadata |= shard.metadata
        for name in (name for name in shard.names if name not in shard.absent):
            if name in place:
                raise UserError(f"{shard.path}: tensor {name!r} stands in {place[name].path.name} too")
            place[name] = shard
        ties |= {name: kept for name, kept in shard.ties.items() if name not in shard.absent}
    recorded = _recorded_ties(metadata, set(place))
    entries = {name: shard.entries[name] for name, shard in sorted(place.items()) if name in shard.entries}

    def fill(name: str, offset: int, view: memoryview) -> None:
        place[name].fill(name, offset, view)

    return Checkpoint(path, entries, ties | recorded, fill, metadata=metadata, absent=frozenset(recorded))


def _open_file(path: Path, stack: ExitStack, reading: Reading) -> Checkpoint:
    """A file of weights, told by its first bytes where its name does not say what it is."""
    if path.suffix == ".json":
        return _open_index(path, stack, reading)
    with path.open("rb") as file:
        first = file.read(9)
    if first == b"version h":  # of https://git-lfs.github.com/spec/v1
        raise UserError(f"{path} is a Git LFS pointer, not the weights: git lfs pull fetches them")
    if not first:
        raise UserError(f"{path} is empty: copy or download it again")
    if path.suffix == ".safetensors" or (first[8:] == b"{" and path.suffix not in PICKLED):
        if reading.key is not None:
            raise UserError(f"{path} has no keys, so --key {reading.key} means nothing in it")
        return _open_safetensors(path, stack)
    if path.suffix in PICKLED or first.startswith((b"PK\x03\x04", b"\x80\x02")):
        from soups.files.pickled import open_pickled  # noqa: PLC0415  # it imports this module's Checkpoint

        return open_pickled(path, stack, reading)
    raise UserError(f"{path}: not a weight file; known are .safetensors, {INDEX} and {' '.join(PICKLED)}")


def open_checkpoint(source: Path | Checkpoint, stack: ExitStack, reading: Reading | None = None) -> Checkpoint:
    """Open a weight file, an index of shards, a folder that holds one of them, or hf:org/model; closed with `stack`.

    Args:
        source: one that is open already is given back.
        stack: closes what is opened.
        reading: which weights of it, and whether names keep those of wrappers.

    Raises:
        UserError: missing, truncated, damaged, not weights, or a kind of tensor that cannot be averaged.
    """
    if isinstance(source, Checkpoint):
        return source
    reading, path = reading or Reading(), source
    try:
        if str(path).startswith(HUB):
            path = from_hub(str(path))
        if path.is_dir():
            path = in_folder(path)
        elif is_shard(path):
            raise UserError(f"{path} is one shard of a model: name its folder, or the index of the shards")
        found = supported(_open_file(path, stack, reading))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return found if reading.as_stored else renamed(found, without_wrappers(found.names, inside=found.unwrapped != ""))


def alike(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints of a pool, without the `model.` before all names of some of them alone."""
    changes = only_here([checkpoint.names for checkpoint in checkpoints])
    return [renamed(checkpoint, names) for checkpoint, names in zip(checkpoints, changes, strict=True)]


@contextmanager
def opened(sources: Sequence[Path | Checkpoint], reading: Reading | None = None) -> Iterator[list[Checkpoint]]:
    """Several weight files of one pool, open while the block lasts."""
    with ExitStack() as stack:
        found = [open_checkpoint(source, stack, reading) for source in sources]
        yield found if reading is not None and reading.as_stored else alike(found)


def hash_tensor() -> "xxhash.xxh3_128":
    """A running hash of a tensor's bytes: a hundred times faster than a cryptographic one, and no protection against
    someone who builds two files with one hash on purpose.
    """
    return xxhash.xxh3_128()


def content_digest(checkpoint: Checkpoint, tensors: dict[str, str]) -> str:
    """A name for the content of a file: 32 hex digits over each tensor's name, kind, shape and bytes, and the ties.

    It does not depend on the file's format, order, sharding or metadata; names are those in the file.

    Args:
        checkpoint: the file.
        tensors: hexadecimal `hash_tensor` of every tensor in `checkpoint.entries`.
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
        first = np.empty(min(entry.size, SAMPLE // STORED[entry.dtype].itemsize), STORED[entry.dtype])
        checkpoint.read(name, 0, first)
        content.update(f"{name}/{entry}/".encode() + first.tobytes())
    return content.hexdigest()
