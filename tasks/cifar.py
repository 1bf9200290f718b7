"""CIFAR-10, CIFAR-100 and CIFAR-10.1, whole in memory, from their binary files."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from configs.data import Cifar
from configs.errors import UserError
from tasks.files import ROOT, lines, spaced
from tasks.held_out import own_name, rows_of
from tasks.split import ImageSplit, Pixels

PIXELS = 3 * 32 * 32  # bytes of an image: red, then green, then blue
BINARIES = {  # kind -> its folder, the file of class names, label bytes before each image, and split -> its files
    "cifar10": (
        "cifar-10-batches-bin",
        "batches.meta.txt",
        1,
        {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    ),
    "cifar100": ("cifar-100-binary", "fine_label_names.txt", 2, {"train": ["train.bin"], "test": ["test.bin"]}),
}


def _records(path: Path, label_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 3, 32, 32) images and (N,) labels of one binary file; the last of the label bytes is the class."""
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


def _arrays(prefix: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 3, 32, 32) images and (N,) labels in the two .npy files of CIFAR-10.1."""
    found = []
    for what, shape in (("data", (32, 32, 3)), ("labels", ())):
        path = Path(f"{prefix}_{what}.npy")
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}): restore it, or set task.folders") from None
        if array.shape[1:] != shape or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{path} has shape {array.shape} and type {array.dtype}, not (N, {shape}) integers")
        found.append(array)
    images, labels = found
    if len(images) != len(labels) or images.dtype != np.uint8:
        raise UserError(f"{prefix}_*.npy has {len(images)} {images.dtype} images and {len(labels)} labels")
    return images.transpose(0, 3, 1, 2), labels.astype(np.int64)


def class_names(task: Cifar) -> tuple[str, ...]:
    """The names in the data set's own file, with spaces."""
    folder, names, *_ = BINARIES[task.kind]
    return spaced(lines(ROOT / task.folder / folder / names))


def load_split(task: Cifar, name: str) -> ImageSplit:
    """One split in memory: train or test of the binary version, or of CIFAR-10.1, as `task.folders` calls it.

    A split that is neither train nor test is read from <folder>/<name>_data.npy and <folder>/<name>_labels.npy.
    Held-out is drawn by the place of an image in its files.
    """
    own = own_name(task, name)
    inner, _, label_bytes, files = BINARIES[task.kind]
    if own in files:
        where = ROOT / task.folder / inner
        records = [_records(where / file, label_bytes) for file in files[own]]
        images, labels = (np.concatenate(arrays) for arrays in zip(*records, strict=True))
    else:
        where = ROOT / task.folder / f"{own}_data.npy"
        images, labels = _arrays(ROOT / task.folder / own)
    if not ((labels >= 0) & (labels < task.num_classes)).all():
        raise UserError(f"{where} has class ids up to {labels.max()}, but task.num_classes={task.num_classes}")
    rows = rows_of(task, name, labels, [str(i) for i in range(task.num_classes)], key=str, where=where)
    images, labels = np.ascontiguousarray(images[rows]), labels[rows]
    digest = hashlib.blake2b(f"{name}\0{own}\n".encode(), digest_size=16)
    digest.update(images.data)
    digest.update(labels)
    return ImageSplit(name, Pixels(torch.from_numpy(images)), torch.from_numpy(labels), digest.hexdigest())
