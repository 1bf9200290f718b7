"""Lists of a data set's files, kept on disk: a million names and sizes are asked for once, not by each task of a sweep.

A kept list is believed where every folder of it has the time of its last change that it had, which adding, deleting or
renaming a file moves, and where a sample of its files have their sizes.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from configs.errors import UserError
from soups.files.atomic import digest_of, replacing
from tasks.files import is_data, packed

SAMPLE = 512  # files whose sizes are compared; all of a smaller data set
VERSION = 2


@dataclass(frozen=True, eq=False)
class Listing:
    """Files of a data set, in order."""

    names: NDArray[np.bytes_]  # (N,) relative to the root of the list, in UTF-8
    sizes: NDArray[np.int64]  # (N,) bytes
    folders: Sequence[Path]  # that were read


def kept(keep: Path | None, key: Sequence[object], root: Path, find: Callable[[], Listing]) -> Listing:
    """The answer of `find`, from disk where it was kept and the data did not change.

    Args:
        keep: the folder of kept lists; None: nothing is kept.
        key: names the list: which data, and what of them is listed.
        root: the folder of the data.
        find: lists the data.
    """
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
    sample = np.unique(np.linspace(0, len(sizes) - 1, min(SAMPLE, len(sizes)), dtype=np.int64))
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
    return kept(keep, ("image folder", classes), root, lambda: _scan(root, classes))


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
    """The files that a data set's own list names, with their sizes.

    Args:
        root: their folder.
        files: relative names.
        source: the file that lists them, for messages.
        keep: the folder of kept lists, if there is one.

    Raises:
        UserError: one of them is missing.
    """
    names = hashlib.blake2b("\0".join(files).encode(), digest_size=16).hexdigest()
    return kept(keep, ("listed files", names), root, lambda: _look_up(root, files, source))


def _look_up(root: Path, files: Sequence[str], source: Path) -> Listing:
    """Each folder is read once, since to ask for a million files one by one takes long."""
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
            raise UserError(f"{root / file} is missing, and {source} lists it: restore it from the data set") from None
    return Listing(packed(files), np.array(sizes, dtype=np.int64), [root / parent for parent in folders])
