"""Labelled images in folders, <folder>/<split>/<class>/<image>, in the order of torchvision's ImageFolder."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from configs.data import ImageFolder
from configs.errors import UserError
from tasks import objectnet
from tasks.content import content_digest, is_data
from tasks.files import ROOT, Files, Names
from tasks.kept import Arrays, Found, kept
from tasks.label_space import LabelSpace
from tasks.parts import check_count, own_name, parted, rows_of, source
from tasks.split import ImageSplit

WNID = re.compile(r"n\d{8}")  # ImageNet's name of a class


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

    def split(self, name: str, place: str, rows: NDArray[np.int64], folders: _Folders) -> ImageSplit:
        """The images `rows`, which are sorted, of a split in the folder `place` of the task's."""
        names = [self.files[row] for row in rows]
        paths = [f"{self.classes[self.labels[row]]}/{file}" for row, file in zip(rows, names, strict=True)]
        stored = Files(self.root, Names.of(paths), self.sizes[rows], f"{self.root.name}/", folders.border)
        digest = content_digest([name, place, f"border {folders.border}", *paths], stored.sizes, stored.content)
        return ImageSplit(name, stored, torch.from_numpy(self.labels[rows]), digest, folders.space)


def _root(task: ImageFolder, name: str) -> Path:
    return ROOT / task.folder / own_name(task, name)


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Names of class folders in the order of the class ids: by name, as torchvision does, but numbers as numbers.

    >>> in_order(["10", "2", "1"]), in_order(["dog", "cat"])
    (('1', '2', '10'), ('cat', 'dog'))
    """
    are_numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))


def _class_folders(root: Path, remedy: str) -> tuple[str, ...]:
    try:
        with os.scandir(root) as entries:
            return in_order([entry.name for entry in entries if is_data(entry.name) and entry.is_dir()])
    except OSError as error:
        raise UserError(f"image folder {root}: {error.strerror}; {remedy}") from None


def _classes(task: ImageFolder) -> tuple[str, ...]:
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


def _folders(task: ImageFolder, name: str, classes: tuple[str, ...]) -> _Folders:
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


def _files(folder: Path, folders: list[Path]) -> list[tuple[str, int]]:
    """Names within a class's folder and sizes in bytes of its images, those of inner folders too.

    Each folder that is read is added to `folders`.
    """
    found: list[tuple[str, str, int]] = []
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        folders.append(Path(f"{folder}{inner}"))
        with os.scandir(f"{folder}{inner}") as entries:
            for entry in entries:
                if not is_data(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append(f"{inner}/{entry.name}")
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    found.append((inner, entry.name, entry.stat().st_size))
    # ImageFolder sorts the folders, then the names in each.
    return [(f"{inner}/{name}"[1:], size) for inner, name, size in sorted(found)]


@lru_cache(maxsize=2)  # train and held-out may be of one folder with a million files
def _listing(root: Path, classes: tuple[str, ...], keep: Path | None) -> _Listing:
    """All images in the class folders of a split, from the list that is kept in `keep` where there is one.

    Raises:
        UserError: a class that is empty, or a file that cannot be looked at.
    """

    def path(arrays: Arrays, index: int) -> Path:
        label = int(np.searchsorted(arrays["counts"].cumsum(), index, side="right"))
        return root / classes[label] / _names(arrays)[index]

    arrays = kept(keep, ("image folder", root.resolve(), classes), lambda: _found(root, classes), path)
    labels = np.repeat(np.arange(len(classes)), arrays["counts"])
    return _Listing(root, classes, labels, _names(arrays), arrays["sizes"])


def _names(arrays: Arrays) -> Names:
    return Names(arrays["names"].tobytes(), arrays["ends"])


def _found(root: Path, classes: tuple[str, ...]) -> Found:
    """The images of each class in turn: how many, their names and sizes."""
    counts, names, sizes = [], [], []
    folders: list[Path] = []
    for folder in classes:
        try:
            files = _files(root / folder, folders)
        except OSError as error:
            raise UserError(f"image folder {root / folder}: {error.filename}: {error.strerror}") from None
        if not files:
            raise UserError(f"image folder {root}: class {folder!r} has no image ({', '.join(IMG_EXTENSIONS)})")
        counts.append(len(files))
        names += [name for name, _ in files]
        sizes += [size for _, size in files]
    try:
        packed = Names.of(names)
    except UnicodeEncodeError as error:
        raise UserError(f"image folder {root}: the file name {error.object!r} is not UTF-8: rename it") from None
    arrays: Arrays = {"names": np.frombuffer(packed.joined, dtype=np.uint8), "ends": packed.ends}
    return Found(arrays | {"counts": np.array(counts), "sizes": np.array(sizes)}, folders)


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


def load_split(task: ImageFolder, name: str) -> ImageSplit:
    """The images and labels of one split.

    Its class folders are those of train; or some of them, where `task.subsets` says so; or numbers from 0, of
    `task.numbered`; or ObjectNet's, of `task.objectnet`, in the order of their names.

    Held-out is a folder of its own, or a part of train's, of which train is then the rest. Of n images per class, they
    are those of the lowest keyed draws over class and file name: a file more in one class moves no other class.

    The digest is that of `content_digest`: the same on every machine, wherever the task's folder lies.

    Args:
        task: of kind image_folder.
        name: one of the task's splits.

    Raises:
        UserError: no such folder; class folders that are not those that the task says, or not `task.num_classes` of
            train; an empty class; not as many images as `task.counts`; a held-out rule that does not fit the images.
    """
    own = source(task, name)
    folders = _folders(task, own, _classes(task))
    listing = _listing(_root(task, own), folders.names, task.listings)
    if parted(task, name) and task.held_out_index is not None:
        check_count(task, own, listing.root, len(listing.labels))
        rows = np.flatnonzero(_listed(listing, task.held_out_index) == (name == task.held_out))
    else:
        rows = rows_of(task, name, listing.labels, listing.classes, key=listing.files.__getitem__, where=listing.root)
    return listing.split(name, own_name(task, name), rows, folders)


def class_names(task: ImageFolder) -> tuple[str, ...]:
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
