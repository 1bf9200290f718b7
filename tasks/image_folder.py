"""Labelled images in folders, <folder>/<split>/<class>/<image>, in the order of torchvision's ImageFolder."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from configs.chance import uniform
from configs.errors import UserError
from configs.schema import Task
from tasks.label_space import LabelSpace
from tasks.split import renumbered

ROOT = Path(__file__).resolve().parents[1]
WNID = re.compile(r"n\d{8}")  # ImageNet's name of a class


@dataclass(frozen=True, eq=False)
class Names:
    """Many short strings in one, since a million Python strings are slow to send to the processes that load images."""

    joined: bytes  # UTF-8
    ends: NDArray[np.int64]  # (N,) where each one ends

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        """Pack them."""
        encoded = [name.encode() for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.joined[start : self.ends[index]].decode()


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Images that stay in their files until they are asked for."""

    name: str
    root: Path  # of the split
    classes: tuple[str, ...]  # the folder of each class id
    labels: Tensor  # (N,) int64 class ids
    files: Names  # N, each within the folder of its class
    digest: str  # of relative names and file sizes
    space: LabelSpace | None = None
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self.classes[int(self.labels[index])] / self.files[index]

    def pil(self, index: int) -> Image.Image:
        """One image, converted to RGB as torchvision's loader does it; an orientation in its EXIF is ignored.

        Raises:
            UserError: the file is missing, or cannot be decoded to its end.
        """
        path = self.path(index)
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
            raise UserError(f"image {path} cannot be decoded ({error}): restore the file from its source") from error

    def of_classes(self, ids: Sequence[int], digest: str) -> "FolderSplit":
        """The images of these classes alone, which are numbered 0, 1, ... in the order of `ids`."""
        rows, labels = renumbered(self.labels, ids)
        files = Names.of([self.files[row] for row in rows.tolist()])
        return FolderSplit(self.name, self.root, tuple(self.classes[i] for i in ids), labels, files, digest)


@dataclass(frozen=True, eq=False)
class _Listing:
    """Every image of a split's folder, in the order of ImageFolder."""

    root: Path
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    files: Names
    sizes: NDArray[np.int64]  # bytes

    def split(self, name: str, rows: NDArray[np.int64]) -> FolderSplit:
        """The images `rows`, which are sorted."""
        content, names = hashlib.blake2b(digest_size=16), [self.files[row] for row in rows]
        for row, file in zip(rows, names, strict=True):
            content.update(f"{self.classes[self.labels[row]]}/{file}\0{self.sizes[row]}\n".encode())
        labels = torch.from_numpy(self.labels[rows])
        return FolderSplit(name, self.root, self.classes, labels, Names.of(names), content.hexdigest())


def _root(task: Task, name: str) -> Path:
    return ROOT / task.folder / task.folders.get(name, name)


def _class_folders(root: Path, remedy: str) -> tuple[str, ...]:
    try:
        with os.scandir(root) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir()))
    except OSError as error:
        raise UserError(f"image folder {root}: {error.strerror}; {remedy}") from None


def _classes(task: Task) -> tuple[str, ...]:
    """The label space: the class folders of the training split."""
    root = _root(task, task.train)
    where = f"set task.folder, or task.folders.{task.train} if it has another name"
    classes = _class_folders(root, f"the classes of every split are those of the training folder: {where}")
    if len(classes) != task.num_classes:
        raise UserError(f"task.num_classes={task.num_classes}, but {root} has {len(classes)} class folders")
    return classes


def _files(folder: Path) -> list[tuple[str, int]]:
    """Names within a class's folder and sizes in bytes of its images, those of inner folders too."""
    found: list[tuple[str, str, int]] = []
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        with os.scandir(f"{folder}{inner}") as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(f"{inner}/{entry.name}")
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    found.append((inner, entry.name, entry.stat().st_size))
    # ImageFolder sorts the folders, then the names in each.
    return [(f"{inner}/{name}"[1:], size) for inner, name, size in sorted(found)]


@lru_cache(maxsize=2)  # train and held-out may be of one folder with a million files
def _listing(root: Path, classes: tuple[str, ...]) -> _Listing:
    """All images of a split, whose class folders must be exactly `classes`.

    Raises:
        UserError: a class that is missing, unknown or empty, or a file that cannot be looked at.
    """
    own = _class_folders(root, "set task.folder, or task.folders for a split whose folder has another name")
    unlike = sorted(set(own) ^ set(classes))
    if unlike:
        problem = "is missing; training has it" if unlike[0] in classes else "is unknown; training does not have it"
        raise UserError(f"image folder {root}: class folder {unlike[0]!r} {problem}")
    labels, names, sizes = [], [], []
    for label, folder in enumerate(classes):
        try:
            files = _files(root / folder)
        except OSError as error:
            raise UserError(f"image folder {root / folder}: {error.filename}: {error.strerror}") from None
        if not files:
            raise UserError(f"image folder {root}: class {folder!r} has no image ({', '.join(IMG_EXTENSIONS)})")
        labels += [label] * len(files)
        names += [name for name, _ in files]
        sizes += [size for _, size in files]
    try:
        packed = Names.of(names)
    except UnicodeEncodeError as error:
        raise UserError(f"image folder {root}: the file name {error.object!r} is not UTF-8: rename it") from None
    return _Listing(root, classes, np.array(labels), packed, np.array(sizes))


def _chosen(listing: _Listing, per_class: int) -> NDArray[np.bool_]:
    """(N,) the images of each class whose keyed draws are the lowest, wherever and beside whatever they stand."""
    held_out = np.zeros(len(listing.labels), dtype=np.bool_)
    for label, folder in enumerate(listing.classes):
        first, last = np.searchsorted(listing.labels, [label, label + 1])
        if last - first <= per_class:
            raise UserError(
                f"task.held_out_per_class={per_class} leaves none of the {last - first} images of class {folder!r} "
                f"in {listing.root} to train on"
            )
        draws = [
            (uniform("held_out", folder, listing.files[row]), listing.files[row], row) for row in range(first, last)
        ]
        held_out[[row for _, _, row in sorted(draws)[:per_class]]] = True
    return held_out


def _listed(listing: _Listing, path: Path) -> NDArray[np.bool_]:
    """(N,) the images that the authors' file says: 1 is held-out and 0 train, in the order of ImageFolder."""
    try:
        values = np.load(ROOT / path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"task.held_out_index={path} cannot be read: {error}") from None
    n = len(listing.labels)
    if values.shape != (n,):
        raise UserError(f"task.held_out_index={path} has shape {values.shape}, but {listing.root} has {n} images")
    if not np.isin(values, (0, 1)).all():
        raise UserError(f"task.held_out_index={path} has other values than 0 (train) and 1 (held-out)")
    absent = sorted(set(range(len(listing.classes))) - set(listing.labels[values == 0].tolist()))
    if absent:
        raise UserError(f"task.held_out_index={path} leaves no image of class {listing.classes[absent[0]]!r} to train")
    return values == 1


def load_split(task: Task, name: str) -> FolderSplit:
    """The images and labels of one split.

    Held-out is a folder of its own, or a part of train's, of which train is then the rest. Of n images per class, they
    are those of the lowest keyed draws over class and file name: a file more in one class moves no other class.

    The digest is over relative names and file sizes, not contents, since a million files take an hour to read: it is
    the same on every machine, and does not see an edit that keeps a file's size.

    Args:
        task: of kind image_folder.
        name: one of the task's splits.

    Raises:
        UserError: no such folder; class folders that are not those of train, or not `task.num_classes`; an empty
            class; a held-out rule that does not fit the images.
    """
    classes = _classes(task)
    parted = task.held_out_per_class is not None or task.held_out_index is not None
    if not parted or name not in (task.train, task.held_out):
        listing = _listing(_root(task, name), classes)
        return listing.split(name, np.arange(len(listing.labels)))
    listing = _listing(_root(task, task.train), classes)
    if task.held_out_index is not None:
        held_out = _listed(listing, task.held_out_index)
    else:
        held_out = _chosen(listing, task.held_out_per_class or 0)
    return listing.split(name, np.flatnonzero(held_out == (name == task.held_out)))


def class_names(task: Task) -> tuple[str, ...]:
    """Names of the classes, as `task.names` says: of their folders, CLIP's of ImageNet, or the lines of a file.

    Raises:
        UserError: another number of names than classes, folders that are not ImageNet's, or an unreadable file.
    """
    classes = _classes(task)
    if task.names == "folder":
        return tuple(re.sub("[_-]", " ", folder) for folder in classes)
    if task.names == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES  # noqa: PLC0415  # a loader process need not wait for it

        strange = [folder for folder in classes if not WNID.fullmatch(folder)]
        if strange or len(classes) != len(IMAGENET_CLASSNAMES):
            found = f"{strange[0]!r}" if strange else f"{len(classes)} of them"
            raise UserError(f"task.names=imagenet needs 1,000 class folders such as n01440764, but there is {found}")
        return tuple(IMAGENET_CLASSNAMES)
    try:
        lines = (ROOT / task.names).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"task.names={task.names}: neither folder, imagenet, nor a readable file ({error})") from None
    names = tuple(line.strip() for line in lines)
    if len(names) != len(classes) or not all(names):
        raise UserError(f"task.names={task.names} has {sum(map(bool, names))} names for {len(classes)} classes")
    return names
