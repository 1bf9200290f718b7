"""Folders of torch.distributed.checkpoint: .metadata is a pickle, read as those of torch.save are, and a chunk of a
tensor is a zip of torch.save in a .distcp file.
"""

import io
import os
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from soups.errors import UserError
from soups.files.checkpoints import Checkpoint, Entry
from soups.files.dtypes import STORED
from soups.files.pickled import Place, Tensor, Unpickler, begin_of, unpickled, unwrap
from soups.files.reading import Reading

METADATA = ".metadata"
RECORDS = (
    *("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
    *("MetadataIndex", "_StorageInfo"),
)


class _Record:
    """Stands for a dataclass of torch.distributed.checkpoint: it has the fields, and nothing else of it."""

    def __setstate__(self, state: Any) -> None:
        # TensorProperties alone has a tuple, whose first item is the dtype.
        self.__dict__.update(state if isinstance(state, dict) else {"dtype": state[0]})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # a field that a damaged file lacks


class _MetadataUnpickler(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.") and name in RECORDS:
            return _Record
        return super().find_class(module, name)


class _Slice(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int):
        self.descriptor, self.start, self.length, self.place = descriptor, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence])
        return self.place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self.place))
        done = os.preadv(self.descriptor, [memoryview(buffer)[:count]], self.start + self.place)
        self.place += done
        return done


@dataclass
class _Chunk:
    """A box of a tensor, and where it is stored."""

    path: Path
    descriptor: int
    info: Any  # `offset` and `length` in the file, in bytes
    whole: Tensor
    offsets: tuple[int, ...]  # of the box in it
    sizes: tuple[int, ...]  # of the box

    @cached_property
    def place(self) -> Place:
        """The stored box; raises UserError where there is no such tensor."""
        start = self.info.offset
        try:
            with zipfile.ZipFile(_Slice(self.descriptor, start, self.info.length)) as archive:
                tensor, root = unpickled(self.path, archive)
                if tensor.entry != Entry(self.whole.dtype, self.sizes):
                    raise ValueError(f"{tensor.dtype} {tensor.shape} in place of {self.whole.dtype} {self.sizes}")
                begin = begin_of(self.descriptor, archive, root, tensor, start)
                return Place(self.path, self.descriptor, tensor, begin)
        except Exception as error:  # a damaged archive may fail in any way
            raise UserError(f"{self.path} is damaged at byte {start}: {error}") from None

    def fill(self, name: str, first: int, last: int, view: memoryview) -> int:
        """Copy those of the tensor's elements `first` to `last` that it holds into their places; how many they are."""
        shape, strides = self.whole.shape, self.whole.stride
        cut = [i for i, size in enumerate(self.sizes) if size != shape[i]]
        axis = cut[-1] if cut else 0  # a run of following elements goes over this axis and those after it
        starts = np.array([sum(offset * stride for offset, stride in zip(self.offsets, strides, strict=True))])
        for i in range(axis):
            starts = (starts[:, None] + np.arange(self.sizes[i]) * strides[i]).reshape(-1)
        run, width, done = prod(self.sizes[axis:]), STORED[self.whole.dtype].itemsize, 0
        for i in range(*np.searchsorted(starts, [first - run + 1, last]).tolist()):
            begin = int(starts[i])
            low, high = max(first, begin), min(last, begin + run)
            part = view[(low - first) * width : (high - first) * width]
            self.place.fill(name, (i * run + low - begin) * width, part)
            done += high - low
        return done


def _read_metadata(folder: Path, stack: ExitStack) -> tuple[dict[str, Any], dict[str, list[_Chunk]]]:
    """The nested dict that was saved, with what its tensors are in their places, and chunks by a tensor's full name."""
    with (folder / METADATA).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    stored = {(index.fqn, index.__dict__.get("offset")): info for index, info in metadata.storage_data.items()}
    descriptors: dict[str, int] = {}
    nested: dict[str, Any] = {}
    chunks: dict[str, list[_Chunk]] = {}
    for name, what in metadata.state_dict_metadata.items():
        # As torch: the keys that lead to it, or without them a flat dict.
        *outer, last = map(str, (metadata.planner_data or {}).get(name, (name,)))
        node = nested
        for key in outer:
            node = node.setdefault(key, {})
        if last.startswith("param_groups."):
            node["param_groups"] = None  # the flattened state of an optimizer
        if not isinstance(what, _Record):
            node[last] = None  # a pickled value, which is not read
            continue
        strides = tuple(prod(what.size[i + 1 :]) for i in range(len(what.size)))
        whole = node[last] = Tensor(what.properties.dtype, name, prod(what.size), 0, what.size, strides)
        chunks[name] = []
        for box in what.chunks:
            info = stored[name, box.offsets]
            path = folder / info.relative_path
            if path.parent != folder or "transform_descriptors" in info.__dict__:
                raise UserError(f"{path}: a chunk outside the folder, or compressed by an extension, cannot be read")
            if path.name not in descriptors:
                descriptors[path.name] = os.open(path, os.O_RDONLY)
                stack.callback(os.close, descriptors[path.name])
            size = os.fstat(descriptors[path.name]).st_size
            if not 0 <= info.offset <= info.offset + info.length <= size:
                raise UserError(f"{path} is truncated: {size} bytes, and a chunk of {name!r} ends after them")
            chunks[name].append(_Chunk(path, descriptors[path.name], info, whole, box.offsets, box.sizes))
        if sum(prod(chunk.sizes) for chunk in chunks[name]) != whole.numel:
            raise UserError(f"{folder}: the chunks of tensor {name!r} are not all of it")
    return nested, chunks


def open_distributed(folder: Path, stack: ExitStack, reading: Reading) -> Checkpoint:
    """Open a folder of torch.distributed.checkpoint; raises UserError as `open_pickled`.

    Elements are copied from the chunks that hold them, so no tensor is put together in memory.
    """
    try:
        nested, chunks = _read_metadata(folder, stack)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{folder}: its file {Path(error.filename).name} is missing") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise UserError(f"{folder / METADATA} is damaged: {type(error).__name__}: {error}") from None
    state, unwrapped, dropped = unwrap(folder, nested, reading.key)
    tensors = {name: item for name, item in sorted(state.items()) if isinstance(item, Tensor)}

    def fill(name: str, offset: int, view: memoryview) -> None:
        width = STORED[tensors[name].dtype].itemsize
        first, last = offset // width, (offset + len(view)) // width
        if sum(chunk.fill(name, first, last, view) for chunk in chunks[tensors[name].storage]) != last - first:
            raise UserError(f"{folder}: the chunks of tensor {name!r} overlap or leave gaps")

    values = tuple(name for name, item in state.items() if not isinstance(item, Tensor))
    entries = {name: tensor.entry for name, tensor in tensors.items()}
    return Checkpoint(folder, entries, {}, fill, unwrapped, dropped=(*dropped, *values))
