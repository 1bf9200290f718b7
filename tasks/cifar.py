"""CIFAR-10, CIFAR-100 and CIFAR-10.1, whole in memory, from their binary files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from configs.data import Cifar
from configs.errors import UserError
from tasks.files import ROOT, lines, spaced
from tasks.parts import own_name, rows_of
from tasks.split import ImageSplit, Pixels

PIXELS = 3 * 32 * 32  # bytes of an image, red, then green, then blue


@dataclass(frozen=True)
class _Binary:
    """The binary version of a data set: records of some label bytes and one image."""

    folder: str
    files: dict[str, tuple[str, ...]]  # split -> its files
    label_bytes: int  # before each image; the last one is the class
    names: str  # the file of class names


BINARIES = {
    "cifar10": _Binary(
        "cifar-10-batches-bin",
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        1,
        "batches.meta.txt",
    ),
    "cifar100": _Binary(
        "cifar-100-binary", {"train": ("train.bin",), "test": ("test.bin",)}, 2, "fine_label_names.txt"
    ),
}


def _records(path: Path, label_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 3, 32, 32) images and (N,) labels of one binary file."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: it is of the binary version of the data set; the Python version is pickled, "
            "which could run code, and is not read"
        ) from None
    size = label_bytes + PIXELS
    if len(content) == 0 or len(content) % size:
        raise UserError(f"{path} has {len(content):,} bytes, not a multiple of {size:,}: it is cut off; restore it")
    table = content.reshape(-1, size)
    return table[:, label_bytes:].reshape(-1, 3, 32, 32), table[:, label_bytes - 1].astype(np.int64)


def _arrays(folder: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 3, 32, 32) images and (N,) labels in the two .npy files of CIFAR-10.1."""
    found = []
    for what, shape in (("data", (32, 32, 3)), ("labels", ())):
        path = folder / f"{prefix}_{what}.npy"
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}): restore it, or set task.folders") from None
        if array.shape[1:] != shape or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{path} has shape {array.shape} and type {array.dtype}, not (N, {shape}) integers")
        found.append(array)
    images, labels = found
    if len(images) != len(labels) or images.dtype != np.uint8:
        raise UserError(f"{folder / prefix}_*.npy has {len(images)} {images.dtype} images and {len(labels)} labels")
    return images.transpose(0, 3, 1, 2), labels.astype(np.int64)


def class_names(task: Cifar) -> tuple[str, ...]:
    """The names in the data set's own file, with spaces.

    Raises:
        UserError: the file is missing.
    """
    binary = BINARIES[task.kind]
    return spaced(lines(ROOT / task.folder / binary.folder / binary.names))


def load_split(task: Cifar, name: str) -> ImageSplit:
    """One split in memory: train or test of the binary version, or of CIFAR-10.1, as `task.folders` calls it.

    Held-out is drawn by the place of an image in its files.

    Args:
        task: of kind cifar10 or cifar100. A split that is neither train nor test is read from
            <folder>/<name>_data.npy and <folder>/<name>_labels.npy.
        name: one of the task's splits.

    Raises:
        UserError: a file that is missing or cut off, another number of images, or a label past the classes.
    """
    binary, own = BINARIES[task.kind], own_name(task, name)
    folder = ROOT / task.folder
    if own in binary.files:
        source = folder / binary.folder
        parts = [_records(source / file, binary.label_bytes) for file in binary.files[own]]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    else:
        source = folder / f"{own}_data.npy"
        images, labels = _arrays(folder, own)
    if not ((labels >= 0) & (labels < task.num_classes)).all():
        raise UserError(f"{source} has class ids up to {labels.max()}, but task.num_classes={task.num_classes}")
    names = [str(i) for i in range(task.num_classes)]
    rows = rows_of(task, name, labels, names, key=str, where=source)
    images, labels = np.ascontiguousarray(images[rows]), labels[rows]
    digest = hashlib.blake2b(f"{name}\0{own}\n".encode(), digest_size=16)
    digest.update(images.data)
    digest.update(labels)
    return ImageSplit(name, Pixels(torch.from_numpy(images)), torch.from_numpy(labels), digest.hexdigest())
