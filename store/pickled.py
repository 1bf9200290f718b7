"""State dicts that torch.save wrote, memory-mapped, with no pickle ever executed."""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from store.checkpoints import Checkpoint, Entry

WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training scripts put a state dict among other things
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        reason = lines[0].strip() if lines else str(error).splitlines()[0]
        raise UserError(f"{path} holds more than weights; unpickling runs code, so it is refused: {reason}") from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if "mmap can only be used" in reason:
            reason = "not an archive of torch.save as of 1.6; load it and save it again"
        raise UserError(f"{path} is truncated, damaged or not a state dict: {reason}") from None


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _unwrap(path: Path, value: Any) -> tuple[Mapping[str, Tensor], str]:
    """The state dict, and the key it was under, or an empty string."""
    if _is_state_dict(value):
        return value, ""
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds a {type(value).__name__}, not a state dict")
    found = [key for key in WRAPPERS if _is_state_dict(value.get(key))]
    if len(found) == 1:
        return value[found[0]], found[0]
    if found:
        raise UserError(f"{path} holds several state dicts ({', '.join(found)}): save the one that is meant by itself")
    if "param_groups" in value:
        raise UserError(f"{path} holds the state of an optimizer, not a model: name the file with the weights")
    culprit = next((key for key, item in value.items() if not isinstance(item, Tensor)), None)
    what = "it is empty" if culprit is None else f"{culprit!r} is a {type(value[culprit]).__name__}, not a tensor"
    raise UserError(f"{path} is not a state dict, nor does it hold one under {', '.join(WRAPPERS)}: {what}")


def same_storage(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are one: the same memory seen in the same way."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Every further name of a tensor that has several -> its first name in alphabetical order.

    >>> w = torch.zeros(2)
    >>> tied_names({"head": w, "embedding": w, "bias": torch.zeros(2)})
    {'head': 'embedding'}
    """
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name in sorted(tensors):
        if tensors[name].numel():
            kept = first.setdefault(same_storage(tensors[name]), name)
            if kept != name:
                ties[name] = kept
    return ties


def _copy(tensors: dict[str, NDArray], name: str, offset: int, view: memoryview) -> None:
    stored = tensors[name]
    start, count = offset // stored.itemsize, len(view) // stored.itemsize
    # A transposed or channels-last tensor is gathered element by element, not copied as a whole.
    flat = stored.reshape(-1) if stored.flags.c_contiguous else stored.flat
    view[:] = np.ascontiguousarray(flat[start : start + count]).view(np.uint8).data


def _bits(tensor: Tensor) -> NDArray:
    """The tensor's memory as integers of its width; numpy has no bfloat16."""
    return tensor.detach().view(INTEGERS[tensor.itemsize]).numpy()


def _entry(tensor: Tensor) -> Entry:
    return Entry(NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def open_pickled(path: Path) -> Checkpoint:
    """Open a state dict; its pages are the file's, not this process's own.

    Raises:
        UserError: damaged, more than tensors, or no state dict in it.
        FileNotFoundError: it is not there.
    """
    state, unwrapped = _unwrap(path, _load(path))
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{path}: tensor {name!r} is sparse or quantized, which cannot be averaged")
    ties = tied_names(state)
    kept = [name for name in sorted(state) if name not in ties]
    entries = {name: _entry(state[name]) for name in kept}
    stored = {name: _bits(state[name]) for name in kept if state[name].dtype in NAMES}
    return Checkpoint(path, entries, ties, partial(_copy, stored), unwrapped)
