"""Weights of torch and their files: read whole or when asked for, written, named by digests, and as open files."""

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from soups.errors import UserError
from soups.files.atomic import replacing
from soups.files.checkpoints import Checkpoint, Entry, first_names, in_file_order, read_header, supported
from soups.files.dtypes import KINDS, STORED
from soups.files.opening import open_checkpoint
from soups.files.reading import Reading

Weights = Mapping[str, Tensor]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, names[0]) for name, names in KINDS.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def digest(weights: Weights) -> str:
    """32 hex digits over every tensor's name, dtype, shape and bytes, whatever the order of keys."""
    content = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        content.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def save_weights(path: Path, weights: Weights) -> str:
    """Write weights whole or not at all and return their digest. Equal weights give equal bytes.

    Tied tensors are written under each of their names, since a safetensors file cannot share them.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    tensors |= {name: tensors[name].clone() for name in tied_names(tensors)}
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    return digest(tensors)


def load_weights(path: Path, expected: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; a UserError where it has not the digest `expected`, recorded when it was written."""
    again = f"delete its folder {path.parent} and run again"
    try:
        weights = load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        reason = "is missing" if not path.exists() else f"is damaged ({error})"
        raise UserError(f"weights {path}: the file {reason}; {again}") from None
    if expected is not None and digest(weights) != expected:
        raise UserError(f"weights {path}: the content differs from what was recorded when it was written; {again}")
    return weights


def tied_names(tensors: Weights) -> dict[str, str]:
    """Every further name of a tensor, which is the same memory seen in the same way -> its first in the alphabet.

    >>> w = torch.zeros(2)
    >>> tied_names({"head": w, "embedding": w, "bias": torch.zeros(2)})
    {'head': 'embedding'}
    """
    filled = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    return first_names({name: (t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) for name, t in filled.items()})


def checkpoint_of(name: str, weights: Mapping[str, Any]) -> Checkpoint:
    """Weights in memory as an open checkpoint that messages call `name`; a `LazyWeights` gives its own.

    Numbers and None are kept as a state dict's are; a UserError names what else is no tensor, or cannot be averaged.
    """
    if isinstance(weights, LazyWeights):
        return weights.checkpoint
    # All at once: of a mapping that reads when asked, a tensor may lie where the one before it was freed, and would
    # pass for tied to it.
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in weights.items() if not isinstance(value, Tensor)}
    for key, value in others.items():
        if not isinstance(value, (bool, int, float, str, bytes, type(None))):
            raise UserError(f"{name}: {key!r} is a {type(value).__name__}, not a tensor")
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{name}: tensor {key!r} is sparse or quantized, which cannot be averaged")
    ties = tied_names(tensors)
    kept = {key: tensors[key] for key in sorted(tensors) if key not in ties}
    entries = {key: Entry(NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in kept.items()}

    def fill(key: str, offset: int, view: memoryview) -> None:
        tensor = kept[key].detach().cpu()
        stored = tensor.view(INTEGERS[tensor.itemsize]).numpy()  # which has no bfloat16
        start, count = offset // stored.itemsize, len(view) // stored.itemsize
        # A transposed or channels-last tensor is gathered element by element, not copied as a whole.
        flat = stored.reshape(-1) if stored.flags.c_contiguous else stored.flat
        view[:] = np.ascontiguousarray(flat[start : start + count]).view(np.uint8).data

    return supported(Checkpoint(Path(name), entries, ties, fill, others=others))


class LazyWeights(Weights):
    """A weight file of any kind that can be averaged, as weights that are read one tensor at a time, when asked for."""

    def __init__(self, source: Path | Checkpoint, reading: Reading | None = None):
        stack = ExitStack()
        self.checkpoint = open_checkpoint(source, stack, reading)
        self._names = frozenset(self.checkpoint.names)
        weakref.finalize(self, stack.close)

    def __getitem__(self, name: str) -> Tensor:
        entry, stored = self.checkpoint.entry(name), self.checkpoint.elements(name)
        return torch.from_numpy(stored).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def blocks(self, name: str, buffer: NDArray[np.uint8], elements: int) -> Iterator[Tensor]:
        """The elements of a tensor in order, so many at a time; each block is a view of `buffer`, good until the next.

        A buffer used again costs neither the memory nor the page faults of a fresh tensor for every reading.
        """
        dtype = DTYPES[self.checkpoint.entry(name).dtype]
        for stored in self.checkpoint.blocks(name, buffer[: elements * dtype.itemsize]):
            yield torch.from_numpy(stored).view(dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.names)

    def __len__(self) -> int:
        return len(self._names)


def mapped(path: Path, mode: Literal["c", "r+"] = "c") -> dict[str, Tensor]:
    """The tensors of a .safetensors file, each in memory that is the file's own pages; tied names share theirs.

    With mode "r+" what is written into them is written into the file.
    """
    with path.open("rb") as file:
        metadata, places = read_header(path, file.fileno())
    found = {}
    for name in in_file_order({name: entry for name, (entry, _) in places.items()}):
        entry, start = places[name]
        kind = STORED[entry.dtype]
        stored = np.memmap(path, kind, mode, start, (entry.size,)) if entry.size else np.empty(0, kind)
        found[name] = torch.from_numpy(stored).view(DTYPES[entry.dtype]).reshape(entry.shape)
    ties = json.loads(metadata["soup"])["tied"] if "soup" in metadata else {}
    return found | {name: found[kept] for name, kept in ties.items()}
