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

from configs.errors import UserError
from configs.schema import Task
from tasks import objectnet
from tasks.files import ROOT, Names, decoded
from tasks.label_space import LabelSpace
from tasks.parts import check_count, own_name, parted, rows_of, source
from tasks.split import narrowed

WNID = re.compile(r"n\d{8}")  # ImageNet's name of a class


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Images that stay in their files until they are asked for."""

    name: str
    root: Path  # of the split
    classes: tuple[str, ...]  # the folder of each reported class
    labels: Tensor  # (N,) int64 ids of the reported classes
    files: Names  # N, each within the folder of its class
    digest: str  # of relative names, file sizes and `border`
    space: LabelSpace | None = None
    border: int = 0  # pixels that are cut off each edge
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self.classes[int(self.labels[index])] / self.files[index]

    def pil(self, index: int) -> Image.Image:
        """One image, RGB, without its border.

        Raises:
            UserError: the file is missing, or cannot be decoded to its end.
        """
        image, border = decoded(self.path(index)), self.border
        if border == 0:
            return image
        if min(image.size) <= 2 * border:
            raise UserError(f"image {self.path(index)} of {image.width} x {image.height} pixels is all border")
        return image.crop((border, border, image.width - border, image.height - border))

    def of_classes(self, ids: Sequence[int], digest: str) -> "FolderSplit":
        """The images of the task's classes `ids` alone, which are numbered 0, 1, ... in the order of `ids`."""
        part = narrowed(self, ids)
        files, classes = Names.of([self.files[row] for row in part.rows.tolist()]), (self.classes[i] for i in part.kept)
        return FolderSplit(self.name, self.root, tuple(classes), part.labels, files, digest, part.space, self.border)


@dataclass(frozen=True)
class _Folders:
    """The class folders of a split, and what they are to the network."""

    names: tuple[str, ...]  # in the order of the reported classes
    space: LabelSpace | None = None
    border: int = 0


@dataclass(frozen=True, eq=False)
class _Listing:
    """Every image of a split's folder, in the order of ImageFolder."""

    root: Path
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    files: Names
    sizes: NDArray[np.int64]  # bytes

    def split(self, name: str, rows: NDArray[np.int64], folders: _Folders) -> FolderSplit:
        """The images `rows`, which are sorted."""
        content, names = hashlib.blake2b(digest_size=16), [self.files[row] for row in rows]
        for row, file in zip(rows, names, strict=True):
            content.update(f"{self.classes[self.labels[row]]}/{file}\0{self.sizes[row]}\n".encode())
        if folders.border:
            content.update(f"border {folders.border}".encode())
        labels, packed = torch.from_numpy(self.labels[rows]), Names.of(names)
        return FolderSplit(
            name, self.root, self.classes, labels, packed, content.hexdigest(), folders.space, folders.border
        )


def _root(task: Task, name: str) -> Path:
    return ROOT / task.folder / own_name(task, name)


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


def _refuse_unlike(own: Sequence[str], expected: Sequence[str], root: Path, owner: str) -> None:
    """Refuse a class folder that is missing or unknown to its owner."""
    unlike = sorted(set(own) ^ set(expected))
    if not unlike:
        return
    if unlike[0] not in expected:
        raise UserError(f"image folder {root}: class folder {unlike[0]!r} is unknown; {owner} does not have it")
    hint = "; of a split with fewer classes, task.subsets says how many" if len(own) < len(expected) else ""
    raise UserError(f"image folder {root}: class folder {unlike[0]!r} is missing; {owner} has it{hint}")


def _folders(task: Task, name: str, classes: tuple[str, ...]) -> _Folders:
    """The class folders that a split has and reports, which must be what the task says of it.

    Raises:
        UserError: a folder that is missing or unknown, or another number of them than `task.subsets` says.
    """
    root = _root(task, name)
    own = _class_folders(root, "set task.folder, or task.folders for a split whose folder has another name")
    if name == task.objectnet:
        ids = objectnet.overlap(root.parent / "mappings", task.num_classes)
        others = objectnet.all_folders(root.parent / "mappings") - set(ids)
        _refuse_unlike([folder for folder in own if folder not in others], tuple(ids), root, "its mapping")
        border = objectnet.BORDER if task.objectnet_border else 0
        folders = _Folders(tuple(ids), LabelSpace(tuple(ids.values()), len(classes)), border)
    elif name in task.numbered:
        folders = _Folders(tuple(str(i) for i in range(len(classes))))
        _refuse_unlike(own, folders.names, root, f"a numbering of {len(classes)} classes from 0")
    elif name in task.subsets and own:
        place = {folder: i for i, folder in enumerate(classes)}
        strange = [folder for folder in own if folder not in place]
        _refuse_unlike(strange, (), root, "training")
        folders = _Folders(own, LabelSpace.subset([place[folder] for folder in own], len(classes)))
    else:
        folders = _Folders(classes)
        _refuse_unlike(own, classes, root, "training")
    expected = task.subsets.get(name, len(folders.names))
    if len(folders.names) != expected:
        raise UserError(f"image folder {root} is of {len(folders.names)} classes, but task.subsets.{name}={expected}")
    return folders


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
    """All images in the class folders of a split.

    Raises:
        UserError: a class that is empty, or a file that cannot be looked at.
    """
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

    Its class folders are those of train; or some of them, where `task.subsets` says so; or numbers from 0, of
    `task.numbered`; or ObjectNet's, of `task.objectnet`, in the order of their names.

    Held-out is a folder of its own, or a part of train's, of which train is then the rest. Of n images per class, they
    are those of the lowest keyed draws over class and file name: a file more in one class moves no other class.

    The digest is over relative names and file sizes, not contents, since a million files take an hour to read: it is
    the same on every machine, and does not see an edit that keeps a file's size.

    Args:
        task: of kind image_folder.
        name: one of the task's splits.

    Raises:
        UserError: no such folder; class folders that are not those that the task says, or not `task.num_classes` of
            train; an empty class; not as many images as `task.counts`; a held-out rule that does not fit the images.
    """
    own = source(task, name)
    folders = _folders(task, own, _classes(task))
    listing = _listing(_root(task, own), folders.names)
    if parted(task, name) and task.held_out_index is not None:
        check_count(task, own, listing.root, len(listing.labels))
        rows = np.flatnonzero(_listed(listing, task.held_out_index) == (name == task.held_out))
    else:
        rows = rows_of(task, name, listing.labels, listing.classes, key=listing.files.__getitem__, where=listing.root)
    return listing.split(name, rows, folders)


def class_names(task: Task) -> tuple[str, ...]:
    """Names of the classes: those of their folders, or with `task.names=imagenet` CLIP's of ImageNet.

    Raises:
        UserError: another number of folders than `task.num_classes`, or folders that are not ImageNet's.
    """
    classes = _classes(task)
    if task.names != "imagenet":
        return tuple(re.sub("[_-]", " ", folder) for folder in classes)
    from open_clip import IMAGENET_CLASSNAMES  # noqa: PLC0415  # a loader process need not wait for it

    strange = [folder for folder in classes if not WNID.fullmatch(folder)]
    if strange or len(classes) != len(IMAGENET_CLASSNAMES):
        found = f"{strange[0]!r}" if strange else f"{len(classes)} of them"
        raise UserError(f"task.names=imagenet needs 1,000 class folders such as n01440764, but there is {found}")
    return tuple(IMAGENET_CLASSNAMES)
