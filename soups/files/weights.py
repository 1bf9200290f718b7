"""Weights on disk: safetensors, and a digest that names their content."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from soups.errors import UserError
from soups.files.atomic import replacing
from soups.files.tensors import tied_names

Weights = Mapping[str, Tensor]


def digest(weights: Weights) -> str:
    """A name for the content: 32 hex digits over every tensor's name, dtype, shape and bytes.

    It does not depend on the order of keys, the file's layout or its metadata.
    """
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
    """Read weights.

    Args:
        path: a safetensors file.
        expected: the digest they must have, as recorded when they were written.

    Raises:
        UserError: the file is missing, truncated, or not the one that was recorded.
    """
    try:
        weights = load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        reason = "is missing" if not path.exists() else f"is damaged ({error})"
        raise UserError(f"weights {path}: the file {reason}; delete its folder {path.parent} and run again") from None
    if expected is not None and digest(weights) != expected:
        raise UserError(
            f"weights {path}: the content differs from what was recorded when it was written; "
            f"delete its folder {path.parent} and run again"
        )
    return weights
