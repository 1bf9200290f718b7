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

from configs.data import ImageFiles
from configs.errors import UserError
from tasks.content import content_digest, is_data, read_file
from tasks.kept import Found, kept
from tasks.parts import own_name, rows_of
from tasks.split import ImageSplit

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
class Files:
    """Images that stay in their files until they are asked for."""

    root: Path
    files: Names  # N, relative to `root`
    sizes: NDArray[np.int64]  # (N,) bytes of each file
    within: str = ""  # what stands before a file's name in messages
    border: int = 0  # pixels that are cut off each edge

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self.files[index]

    def content(self, index: int, last: int | None = None) -> bytes:
        """The bytes of an image's file."""
        return read_file(self.path(index), last)

    def called(self, index: int) -> str:
        """Its relative path."""
        return f"{self.within}{self.files[index]}"

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

    def of(self, rows: Tensor) -> "Files":
        """Only some of them."""
        names = Names.of([self.files[row] for row in rows.tolist()])
        return Files(self.root, names, self.sizes[rows.numpy()], self.within, self.border)


@dataclass(frozen=True, eq=False)
class Listed:
    """What a data set's own files say of one of its splits."""

    source: Path  # the file that says it
    root: Path
    files: Sequence[str]  # N, relative to `root`, with slashes
    labels: Sequence[str | int]  # N names or ids of classes
    groups: Sequence[int] | None = None  # N group ids, -1 for an image in none
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


def spaced(names: Sequence[str]) -> tuple[str, ...]:
    """Names of folders as a prompt has them."""
    return tuple(name.replace("_", " ") for name in names)


def _data_of(listed: Listed, classes: Sequence[str]) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64] | None]:
    """Files, class ids and groups, without files that a list names and that are no data, as a list by `find` does.

    Raises:
        UserError: the class of an image is unknown.
    """
    ids: dict[str | int, int] = {name: label for label, name in enumerate(classes)}
    ids |= {label: label for label in range(len(classes))}
    rows = [row for row, file in enumerate(listed.files) if is_data(file)]
    for row in rows:
        if listed.labels[row] not in ids:
            raise UserError(
                f"{listed.source}: {str(listed.labels[row])!r} is none of the {len(classes)} classes: restore it from "
                "the data set"
            )
    labels = np.array([ids[listed.labels[row]] for row in rows], dtype=np.int64)
    groups = None if listed.groups is None else np.array([listed.groups[row] for row in rows], dtype=np.int64)
    return [listed.files[row] for row in rows], labels, groups


def _sizes(listed: Listed, files: Sequence[str], keep: Path | None) -> NDArray[np.int64]:
    """(N,) bytes of each file, from the list that is kept in `keep` where there is one."""
    names = hashlib.blake2b("\0".join(files).encode(), digest_size=16).hexdigest()
    key = ("listed files", listed.root.resolve(), names)
    return kept(keep, key, lambda: _found(listed, files), lambda _, index: listed.root / files[index])["sizes"]


def _found(listed: Listed, files: Sequence[str]) -> Found:
    """The size of each file; each folder is read once, since to ask for a million files one by one takes long."""
    folders: dict[str, dict[str, os.DirEntry[str]]] = {}
    sizes = []
    for file in files:
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
    return Found({"sizes": np.array(sizes, dtype=np.int64)}, [listed.root / parent for parent in folders])


def listed_split(task: ImageFiles, name: str, lists: Lists) -> ImageSplit:
    """One split of a data set whose own files list its images.

    Held-out is a split of its own, or a part of train. The digest is that of `content_digest`: the same on every
    machine, wherever the task's folder lies.

    Raises:
        UserError: a file that is missing or does not fit the others; other numbers of images or classes than the task
            says.
    """
    folder = ROOT / task.folder
    classes = lists.classes(folder)
    if len(classes) != task.num_classes:
        raise UserError(f"task.num_classes={task.num_classes}, but {folder} has {len(classes)} classes")
    listed = lists.split(folder, own_name(task, name))
    files, labels, groups = _data_of(listed, classes)
    rows = rows_of(task, name, labels, classes, key=files.__getitem__, where=listed.source)
    paths = [files[row] for row in rows]
    stored = Files(listed.root, Names.of(paths), _sizes(listed, files, task.listings)[rows])
    described = [f"{path}\0{labels[row]}" for row, path in zip(rows, paths, strict=True)]
    return ImageSplit(
        name,
        stored,
        torch.from_numpy(labels[rows]),
        content_digest([name, own_name(task, name), *described], stored.sizes, stored.content),
        groups=None if groups is None else torch.from_numpy(groups[rows]),
        group_names=listed.group_names,
    )
