"""Files of a data set: which of them are data, what they say, a digest of what they hold, and lists of them.

A million names and sizes are asked for once, not by each task of a sweep: lists are kept on disk. A kept list is
believed where every folder of it has the time of its last change that it had, which adding, deleting or renaming a file
moves, and where a sample of its files have their sizes.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from configs.errors import UserError
from soups.chance import uniform
from soups.files.atomic import digest_of, replacing
from tasks.split import decoded

ROOT = Path(__file__).resolve().parents[1]
READERS = 16  # threads that read files, which on a network file system is waiting
WHOLE = 64 * 2**20  # bytes; of a split up to this size, and
MANY = 10_000  # files, every byte is in the digest; of a larger one
SAMPLE = 1024  # files are, and of each
PIECE = 64 * 2**10  # bytes at its end, where formats of images keep the pixels
COMPARED = 512  # files of a kept list whose sizes are compared; all of a smaller data set
VERSION = 2  # of kept lists


def is_data(path: str) -> bool:
    """Whether a relative path is data: no part of it is hidden, or belongs to a Mac's archives.

    >>> [is_data(path) for path in ("cat/1.jpg", "cat/._1.jpg", ".ipynb_checkpoints", "__MACOSX/cat", "../cat")]
    [True, False, False, False, True]
    """
    return not any((part[:1] == "." and part not in (".", "..")) or part == "__MACOSX" for part in path.split("/"))


def read_file(path: Path, last: int | None = None) -> bytes:
    """The bytes of a file, or only its last so many; a `UserError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            if last is not None:
                file.seek(max(0, file.seek(0, 2) - last))
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it from the data set") from None


def content_digest(
    described: Iterable[str], sizes: NDArray[np.int64], content: Callable[[int, int | None], bytes]
) -> str:
    """32 hex digits that name the content of a split, wherever its folder lies.

    They are over what is said of each example, its size and its bytes; of more than 64 MiB or 10,000 examples, over
    the ends of 1,024 of them, which a draw keyed by their number chooses. To read all of ImageNet would take an hour
    at each start, so an edit that keeps the sizes of all files of a large set and touches none of those is not seen.

    Args:
        described: words about the split and each example, e.g. its relative name and label.
        sizes: (N,) bytes of each example.
        content: reads example i; only its last so many bytes where a number is given.
    """
    digest = hashlib.blake2b(digest_size=16)
    for each in described:
        digest.update(f"{each}\n".encode())
    n = len(sizes)
    digest.update(sizes.astype("<i8").tobytes())
    is_small = n <= MANY and int(sizes.sum()) <= WHOLE
    rows = range(n) if is_small else sorted({int(uniform("content", n, i) * n) for i in range(SAMPLE)})
    with ThreadPoolExecutor(READERS) as pool:
        for piece in pool.map(lambda row: content(row, None if is_small else PIECE), rows):
            digest.update(piece)
    return digest.hexdigest()


def packed(names: Sequence[str]) -> NDArray[np.bytes_]:
    """(N,) names in UTF-8; a million Python strings are slow to send to the processes that load images."""
    return np.array([name.encode() for name in names], dtype=np.bytes_)


@dataclass(frozen=True, eq=False)
class Files:
    """Images that stay in their files until they are asked for."""

    root: Path
    names: NDArray[np.bytes_]  # (N,) relative to `root`, in UTF-8
    sizes: NDArray[np.int64]  # (N,) bytes of each file
    within: str = ""  # stands before a file's name in messages
    border: int = 0  # pixels that are cut off each edge

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self.names[index].decode()

    def content(self, index: int, last: int | None = None) -> bytes:
        """The bytes of an image's file, or its last ones."""
        return read_file(self.path(index), last)

    def called(self, index: int) -> str:
        """The relative path of an image."""
        return f"{self.within}{self.names[index].decode()}"

    def pil(self, index: int) -> Image.Image:
        """One image, RGB, without its border."""
        path, border = self.path(index), self.border
        image = decoded(path, str(path), ": restore the file from its source")
        if border == 0:
            return image
        if min(image.size) <= 2 * border:
            raise UserError(f"image {path} of {image.width} x {image.height} pixels is all border")
        return image.crop((border, border, image.width - border, image.height - border))

    def of(self, rows: Tensor) -> "Files":
        """Only the images `rows`."""
        return replace(self, names=self.names[rows.numpy()], sizes=self.sizes[rows.numpy()])


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
    """The content of a JSON file of a data set; a `UserError` where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it from the data set") from None


def read_table(path: Path, columns: Sequence[str] | None = None, *, remedy: str) -> pd.DataFrame:
    """A csv file, or a tsv file, as strings; only some columns where they are named.

    Raises:
        UserError: the file cannot be read, or lacks one of the columns; the message ends with the remedy.
    """
    separator = "\t" if path.suffix == ".tsv" else ","
    try:
        table = pd.read_csv(path, sep=separator, usecols=columns, dtype=str, keep_default_na=False)
        if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first column for names of the rows
            raise ValueError("its rows have more fields than its first line")
        return table
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).strip()}): {remedy}") from None


def first_empty(column: "pd.Series[str]") -> int | None:
    """The number of the first row, from 1, that says nothing in a column of a table; None where there is none."""
    empty = (column.isna() | (column.str.strip() == "")).to_numpy()
    return int(empty.argmax()) + 1 if empty.any() else None


def spaced(names: Iterable[str]) -> tuple[str, ...]:
    """Names of folders as a prompt has them."""
    return tuple(name.replace("_", " ") for name in names)


@dataclass(frozen=True, eq=False)
class Listing:
    """Files of a data set, in order."""

    names: NDArray[np.bytes_]  # (N,) relative to the root of the list, in UTF-8
    sizes: NDArray[np.int64]  # (N,) bytes
    folders: Sequence[Path]  # that were read


def _kept(keep: Path | None, key: Sequence[object], root: Path, find: Callable[[], Listing]) -> Listing:
    """The answer of `find`, from the folder `keep` where it was kept there under `key` and the data did not change."""
    if keep is None:
        return find()
    file = keep / f"{digest_of([VERSION, *map(str, key), str(root.resolve())])}.npz"
    listing = _read(file, root)
    if listing is not None:
        return listing
    listing = find()
    times = np.array([folder.stat().st_mtime_ns for folder in listing.folders], dtype=np.int64)
    folders = np.array([os.fsencode(folder) for folder in listing.folders], dtype=np.bytes_)
    with replacing(file) as temporary:
        np.savez(temporary, names=listing.names, sizes=listing.sizes, folders=folders, times=times)
    return listing


def _read(file: Path, root: Path) -> Listing | None:
    """The list in a file that is whole, if all folders and a sample of the data's files are as they were listed."""
    try:
        with np.load(file, allow_pickle=False) as stored:  # compares checksums, as every reader of zip files
            names, sizes, folders, times = (stored[name] for name in ("names", "sizes", "folders", "times"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        print(f"{file} is damaged, and is made anew", flush=True)
        return None
    listing = Listing(names, sizes, [Path(os.fsdecode(folder)) for folder in folders])
    sample = np.unique(np.linspace(0, len(sizes) - 1, min(COMPARED, len(sizes)), dtype=np.int64))
    try:
        is_same = [folder.stat().st_mtime_ns for folder in listing.folders] == times.tolist() and all(
            (root / names[i].decode()).stat().st_size == sizes[i] for i in sample
        )
    except OSError:
        return None
    return listing if is_same else None


@lru_cache(maxsize=2)  # train and held-out may be of one folder with a million files
def scanned(root: Path, classes: tuple[str, ...], keep: Path | None) -> Listing:
    """All images in the class folders of a split and in their inner folders, in the order of torchvision's ImageFolder.

    Raises:
        UserError: a class that is empty, or a file that cannot be looked at.
    """
    return _kept(keep, ("image folder", classes), root, lambda: _scan(root, classes))


def _scan(root: Path, classes: Sequence[str]) -> Listing:
    folders: list[Path] = []
    files: list[tuple[str, int]] = []
    for label in classes:
        try:
            found = _images_in(root, label, folders)
        except OSError as error:
            raise UserError(f"image folder {root / label}: {error.filename}: {error.strerror}") from None
        if not found:
            raise UserError(f"image folder {root}: class {label!r} has no image ({', '.join(IMG_EXTENSIONS)})")
        files += found
    try:
        names = packed([name for name, _ in files])
    except UnicodeEncodeError as error:
        name = str(error.object).partition("/")[2]
        raise UserError(f"image folder {root}: the file name {name!r} is not UTF-8: rename it") from None
    return Listing(names, np.array([size for _, size in files], dtype=np.int64), folders)


def _images_in(root: Path, label: str, folders: list[Path]) -> list[tuple[str, int]]:
    """Names and sizes of a class's images; each folder that is read is added to `folders`."""
    found: list[tuple[str, str, int]] = []
    waiting = [label]
    while waiting:
        inner = waiting.pop()
        folders.append(root / inner)
        with os.scandir(root / inner) as entries:
            for entry in entries:
                if not is_data(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append(f"{inner}/{entry.name}")
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    found.append((inner, entry.name, entry.stat().st_size))
    return [(f"{inner}/{name}", size) for inner, name, size in sorted(found)]  # by folder, then by name


def looked_up(root: Path, files: Sequence[str], source: Path, keep: Path | None) -> Listing:
    """The files of a folder that a data set's own list names, with their sizes; a `UserError` where one is missing.

    Each folder is read once, since to ask for a million files one by one takes long.
    """

    def look_up() -> Listing:
        folders: dict[str, dict[str, os.DirEntry[str]]] = {}
        sizes = []
        for file in files:
            parent, name = str(PurePosixPath(file).parent), PurePosixPath(file).name
            try:
                if parent not in folders:
                    with os.scandir(root / parent) as entries:
                        folders[parent] = {entry.name: entry for entry in entries}
                sizes.append(folders[parent][name].stat().st_size)
            except (OSError, KeyError):
                raise UserError(
                    f"{root / file} is missing, and {source} lists it: restore it from the data set"
                ) from None
        return Listing(packed(files), np.array(sizes, dtype=np.int64), [root / parent for parent in folders])

    names = hashlib.blake2b("\0".join(files).encode(), digest_size=16).hexdigest()
    return _kept(keep, ("listed files", names), root, look_up)
