"""Images that stay in their files until they are asked for, listed by a data set's own files."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from configs.schema import Task
from tasks.label_space import LabelSpace
from tasks.parts import own_name, rows_of
from tasks.split import narrowed

ROOT = Path(__file__).resolve().parents[1]


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


def decoded(path: Path) -> Image.Image:
    """An image, converted to RGB as torchvision's loader does it; an orientation in its EXIF is ignored.

    Raises:
        UserError: the file is missing, or cannot be decoded to its end.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        raise UserError(f"image {path} cannot be decoded ({error}): restore the file from its source") from error


@dataclass(frozen=True, eq=False)
class FileSplit:
    """Images whose paths a data set's own files list."""

    name: str
    root: Path
    files: Names  # N, relative to `root`
    labels: Tensor  # (N,) int64 class ids
    digest: str  # of relative names, labels and file sizes
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    space: LabelSpace | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self.files[index]

    def pil(self, index: int) -> Image.Image:
        """One image, RGB.

        Raises:
            UserError: the file is missing, or cannot be decoded to its end.
        """
        return decoded(self.path(index))

    def of_classes(self, ids: Sequence[int], digest: str) -> "FileSplit":
        """The images of the task's classes `ids` alone, which are numbered 0, 1, ... in the order of `ids`."""
        part = narrowed(self, ids)
        files = Names.of([self.files[row] for row in part.rows.tolist()])
        return FileSplit(self.name, self.root, files, part.labels, digest, part.groups, self.group_names, part.space)


@dataclass(frozen=True, eq=False)
class Listed:
    """What a data set's own files say of one of its splits."""

    source: Path  # the file that says it
    root: Path
    files: Sequence[str]  # N, relative to `root`, with slashes
    labels: NDArray[np.int64]  # (N,) class ids
    groups: NDArray[np.int64] | None = None  # (N,) group ids, -1 for an image in none
    group_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lists:
    """How a data set says what is in it; functions of its folder."""

    classes: Callable[[Path], tuple[str, ...]]  # as its files call them, in the order of the class ids
    names: Callable[[Path], tuple[str, ...]]  # as a prompt calls them
    split: Callable[[Path, str], Listed]  # of a split by the data's own name


def lines(path: Path) -> tuple[str, ...]:
    """The lines of a small text file of a data set that are not empty, without the spaces around them.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    try:
        found = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from the data set, or set task.folder") from None
    if not found:
        raise UserError(f"{path} is empty: restore it from the data set")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file of a data set says.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it from the data set") from None


def label_of(name: str, classes: dict[str, int], source: Path) -> int:
    """The id of a class.

    Raises:
        UserError: the class is unknown.
    """
    if name not in classes:
        raise UserError(f"{source}: {name!r} is none of the {len(classes)} classes: restore it from the data set")
    return classes[name]


def _sizes(listed: Listed) -> list[int]:
    """Bytes of each file; each folder is read once, since to ask for a million files one by one takes long."""
    folders: dict[str, dict[str, os.DirEntry[str]]] = {}
    sizes = []
    for file in listed.files:
        parent, name = str(PurePosixPath(file).parent), PurePosixPath(file).name
        try:
            if parent not in folders:
                with os.scandir(listed.root / parent) as entries:
                    folders[parent] = {entry.name: entry for entry in entries}
            sizes.append(folders[parent][name].stat().st_size)
        except (OSError, KeyError):
            raise UserError(
                f"{listed.root / file} is missing, and {listed.source} lists it: restore it from the data set"
            ) from None
    return sizes


def listed_split(task: Task, name: str, lists: Lists) -> FileSplit:
    """One split of a data set whose own files list its images.

    Held-out is a split of its own, or `task.held_out_per_class` of train. The digest is over relative names, labels
    and file sizes, not contents: it is the same on every machine, and does not see an edit that keeps a file's size.

    Raises:
        UserError: a file that is missing or does not fit the others; other numbers of images or classes than the task
            says.
    """
    folder = ROOT / task.folder
    classes = lists.classes(folder)
    if len(classes) != task.num_classes:
        raise UserError(f"task.num_classes={task.num_classes}, but {folder} has {len(classes)} classes")
    listed = lists.split(folder, own_name(task, name))
    rows = rows_of(task, name, listed.labels, classes, key=listed.files.__getitem__, where=listed.source)
    content = hashlib.blake2b(digest_size=16)
    sizes = _sizes(listed)
    for row in rows.tolist():
        content.update(f"{listed.files[row]}\0{listed.labels[row]}\0{sizes[row]}\n".encode())
    groups = None if listed.groups is None else torch.from_numpy(listed.groups[rows])
    files, labels = Names.of([listed.files[row] for row in rows]), torch.from_numpy(listed.labels[rows])
    return FileSplit(name, listed.root, files, labels, content.hexdigest(), groups, listed.group_names)
