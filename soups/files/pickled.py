"""Checkpoints of torch.save, a zip of a pickle and of tensors' bytes: read without torch, and nothing in them is run.

Of what the pickle names a few functions are read by our own; every other becomes an inert stand-in.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from soups.errors import UserError, first_line
from soups.files.checkpoints import Checkpoint, Entry, first_names, pread
from soups.files.dtypes import FLOATS, KINDS, STORED
from soups.files.reading import Reading, is_ema

NAMED = {name: kind for kind, names in KINDS.items() for name in names[:2]}  # torch's dtype or storage -> its kind
NAMED |= {"ComplexFloatStorage": "torch.complex64", "ComplexDoubleStorage": "torch.complex128"}
PLAIN = (type(None), bool, int, float, str, bytes)
DEPTH = 3  # dicts within dicts that are looked through for weights


class Inert:
    """Stands for an object of a class that is not read: it takes whatever a pickle does to it and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":  # noqa: D102
        # copyreg._reconstructor and numpy's _reconstruct make an object of the class that is their first argument.
        of_class = args[0] if args and isinstance(args[0], type) and issubclass(args[0], Inert) else cls
        return object.__new__(of_class)

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":  # noqa: D102
        return self

    def _ignore(self, *items: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


@dataclass(frozen=True)
class Tensor:
    """A tensor in the archive; equal for tensors that are one, the same memory seen in the same way."""

    dtype: str
    storage: str  # name of the bytes in the archive
    numel: int  # elements of the storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def entry(self) -> Entry:
        """Its kind and shape."""
        return Entry(self.dtype, self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow each other in memory."""
        usual = [prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.stride, usual, strict=True))


class Unreadable(Inert):
    """A sparse or quantised tensor, or one whose stored numbers have another sign."""


def _tensor(
    storage: tuple[str, str, int], start: int, shape: Sequence[int], stride: Sequence[int], *more: Any
) -> Tensor | Unreadable:
    flags = more[2] if len(more) > 2 else None  # after whether it needs a gradient, and hooks
    if flags and any(flags.values()):  # neg or conj: torch reads the same bytes with another sign
        return Unreadable()
    return Tensor(*storage, start, tuple(shape), tuple(stride))


def _typed_tensor(storage: tuple[str, str, int], *more: Any) -> Tensor | Unreadable:
    _, name, size = storage  # in bytes
    dtype = more[5]
    typed = (dtype, name, size // (STORED[dtype].itemsize if dtype in STORED else 1))
    return _tensor(typed, *more[:5], *more[6:])


READ: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, _, data, *__: function(*data),
    ("torch.tensor", "_rebuild_from_type"): lambda function, _, data, *__: function(*data),
    ("torch._utils", "_rebuild_sparse_tensor"): Unreadable,
    ("torch._utils", "_rebuild_qtensor"): Unreadable,
    ("torch._utils", "_rebuild_nested_tensor"): Unreadable,
    ("torch.storage", "UntypedStorage"): "U8",
}


class Unpickler(pickle.Unpickler):
    """Builds plain values, `Tensor`s and stand-ins."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: D102
        if (module, name) in READ:
            return READ[module, name]
        if module == "torch":
            if name in NAMED:
                return NAMED[name]
            if name.endswith("Storage") or name.startswith(("complex", "float8", "float4")):
                return f"torch.{name}"
        return type(name, (Inert,), {"__module__": module})

    def persistent_load(self, pid: Any) -> tuple[str, str, int]:  # noqa: D102
        what, dtype, name, _, numel = pid
        if what != "storage" or not isinstance(dtype, str):
            raise ValueError(f"{what!r} is no storage of numbers")
        return dtype, name, numel


def unpickled(path: Path, archive: zipfile.ZipFile) -> tuple[Any, str]:
    """What the archive holds, and its top folder."""
    names = archive.namelist()
    root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
    if root is None:
        raise UserError(f"{path} is a zip, but no checkpoint of torch.save: it has no data.pkl")
    if f"{root}constants.pkl" in names:
        raise UserError(f"{path} is TorchScript: load it with torch.jit.load, and torch.save its state_dict()")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise UserError(f"{path} was saved on a big-endian machine: load it with torch and save it again")
    return Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), encoding="utf-8").load(), root


def _is_state_dict(value: Any) -> bool:
    """Whether a dict has tensors, and beside them numbers, texts and None alone."""
    return (
        isinstance(value, Mapping)
        and all(
            isinstance(name, str) and (isinstance(item, (Tensor, Unreadable, *PLAIN)) or name.endswith("_extra_state"))
            for name, item in value.items()
        )
        and any(isinstance(item, (Tensor, Unreadable)) for item in value.values())
    )


def _state_dicts(value: Mapping[Any, Any], depth: int = DEPTH) -> dict[str, Mapping[str, Any]]:
    """Every state dict of a network within a dict, by its path of keys; an optimizer's is none, nor is one of the
    numbers of a random generator or a metric.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, Mapping) or "param_groups" in item:
            continue
        if _is_state_dict(item) and any(
            isinstance(each, Unreadable) or (isinstance(each, Tensor) and each.shape and each.dtype in FLOATS)
            for each in item.values()
        ):
            found[key] = item
        elif depth > 1:
            found |= {f"{key}.{name}": state for name, state in _state_dicts(item, depth - 1).items()}
    return found


def _choose(path: Path, found: Mapping[str, Any], key: str | None) -> str:
    """The path of keys that is meant."""
    if key is None:
        if len(found) == 1:
            return next(iter(found))
        ways = " or ".join(f"--key {name}" for name in found)
        raise UserError(f"{path} holds several sets of weights ({', '.join(found)}): say which with {ways}")
    fitting = [name for name in found if name == key]
    fitting = fitting or [name for name in found if (is_ema(name) if key == "ema" else name.split(".")[-1] == key)]
    if len(fitting) != 1:
        what = "several" if fitting else "no"
        raise UserError(f"{path} holds {what} weights that --key {key} means; there are {', '.join(found)}")
    return fitting[0]


def unwrap(path: Path, value: Any, key: str | None) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    """The state dict, the path of keys it was under or an empty string, and what else the file holds."""
    if isinstance(value, Inert):
        raise UserError(f"{path} holds {_object(value)}")
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds a {type(value).__name__}, not a state dict")
    if _is_state_dict(value):
        if key is not None:
            raise UserError(f"{path} is one state dict by itself, without the weights that --key {key} means")
        return value, "", ()
    found = _state_dicts(value)
    if found:
        chosen = _choose(path, found, key)
        return found[chosen], chosen, tuple(str(name) for name in value if name != chosen.split(".")[0])
    if "param_groups" in value:
        raise UserError(f"{path} holds the state of an optimizer, not a model: name the file with the weights")
    what = "it is empty"
    for name, item in value.items():
        if isinstance(item, Inert):
            what = f"{name!r} is {_object(item)}"
            break
        if what == "it is empty" and not isinstance(item, Tensor):
            what = f"{name!r} is a {type(item).__name__}, not a tensor"
    raise UserError(f"{path} is not a state dict, nor does it hold one: {what}")


def _object(value: Inert) -> str:
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if kind == "numpy.ndarray":
        return "an array of numpy: save a dict of tensors, as torch.from_numpy makes them, with torch.save"
    return (
        f"a whole object ({kind}), not its weights: save its state_dict() with torch.save where it was made. "
        "Unpickling it whole executes whatever code it holds: do that only where you trust who made it"
    )


def begin_of(descriptor: int, archive: zipfile.ZipFile, root: str, tensor: Tensor, base: int = 0) -> int:
    """Where a storage's bytes begin in the file, which has the archive from byte `base` on; the tensor lies within."""
    info = archive.getinfo(f"{root}data/{tensor.storage}")
    last = tensor.start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
    fits = info.file_size == tensor.numel * STORED[tensor.dtype].itemsize and min(tensor.stride, default=0) >= 0
    if info.compress_type != zipfile.ZIP_STORED or not fits or (tensor.entry.size and not 0 <= last < tensor.numel):
        raise ValueError(f"storage {tensor.storage} does not hold what it should")
    header = os.pread(descriptor, 30, base + info.header_offset)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"storage {tensor.storage} is not where it should be")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return base + info.header_offset + 30 + name + extra


@dataclass(frozen=True)
class Place:
    """A tensor in an open file, and where its storage begins there."""

    path: Path
    descriptor: int
    tensor: Tensor
    begin: int

    def fill(self, name: str, offset: int, view: memoryview) -> None:
        """Copy the tensor's bytes from an offset on; `name` is for messages."""
        tensor, begin, width = self.tensor, self.begin, STORED[self.tensor.dtype].itemsize
        if tensor.is_contiguous:
            pread(self.path, name, self.descriptor, begin + tensor.start * width + offset, view)
            return
        # A transposed or channels-last tensor is gathered element by element.
        numbers = np.memmap(self.path, f"V{width}", "r", begin + tensor.start * width, tensor.numel - tensor.start)
        strided = np.lib.stride_tricks.as_strided(numbers, tensor.shape, [stride * width for stride in tensor.stride])
        flat = np.frombuffer(view, f"V{width}")
        flat[:] = strided.flat[offset // width : offset // width + len(flat)]


def open_pickled(path: Path, stack: ExitStack, reading: Reading) -> Checkpoint:
    """Open a checkpoint of torch.save; its weights are read when they are asked for.

    Raises:
        UserError: damaged, a whole module, several sets of weights, or no state dict in it.
    """
    file = stack.enter_context(path.open("rb"))
    if file.read(2) == b"\x80\x02":
        raise UserError(f"{path} is not an archive of torch.save as of 1.6: load it with torch and save it again")
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        value, root = unpickled(path, archive)
        state, unwrapped, dropped = unwrap(path, value, reading.key)
        unreadable = [name for name, item in state.items() if isinstance(item, Unreadable)]
        if unreadable:
            raise UserError(
                f"{path}: tensor {unreadable[0]!r} is sparse, quantized or a negated view, which cannot be averaged"
            )
        tensors = {name: item for name, item in sorted(state.items()) if isinstance(item, Tensor)}
        ties = first_names({name: tensor for name, tensor in tensors.items() if tensor.entry.size})
        entries = {name: tensor.entry for name, tensor in tensors.items() if name not in ties}
        places = {
            name: Place(path, file.fileno(), tensors[name], begin_of(file.fileno(), archive, root, tensors[name]))
            for name, entry in entries.items()
            if entry.dtype in STORED
        }
    except UserError:
        raise
    except Exception as error:  # a damaged archive or pickle may fail in any way
        raise UserError(f"{path} is truncated, damaged or not a state dict: {first_line(error)}") from None

    def fill(name: str, offset: int, view: memoryview) -> None:
        places[name].fill(name, offset, view)

    others = {name: item for name, item in state.items() if isinstance(item, PLAIN)}
    inert = tuple(name for name, item in state.items() if isinstance(item, Inert))
    return Checkpoint(path, entries, ties, fill, unwrapped, others=others, dropped=(*dropped, *inert))
