"""Lists of a data set's files, kept on disk: a million names and sizes are asked for once, not by each task of a sweep.

A kept list is believed where every folder of it has the time of its last change that it had, which adding, deleting or
renaming a file moves, and where a sample of its files have their sizes.
"""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soups.files.atomic import digest_of, replacing

Arrays = dict[str, NDArray]
SAMPLE = 512  # files whose sizes are looked at; all of a smaller data set
VERSION = 1


@dataclass(frozen=True)
class Found:
    """What listing a data set found."""

    arrays: Arrays  # with `sizes`, (N,) bytes of each file
    folders: Sequence[Path]  # that were read


def kept(
    keep: Path | None, key: Sequence[object], find: Callable[[], Found], path: Callable[[Arrays, int], Path]
) -> Arrays:
    """The arrays of `find`, from disk where they were kept and the data did not change.

    Args:
        keep: the folder of kept lists; None: nothing is kept.
        key: names the list: where the data are, and what of them is listed.
        find: lists the data.
        path: the file with an index, by the arrays.
    """
    if keep is None:
        return find().arrays
    file = keep / f"{digest_of([VERSION, *map(str, key)])}.npz"
    arrays = _read(file)
    if arrays is not None and _is_as_it_was(arrays, path):
        return {name: array for name, array in arrays.items() if name not in ("folders", "times", "digest")}
    found = find()
    times = np.array([folder.stat().st_mtime_ns for folder in found.folders], dtype=np.int64)
    names = np.frombuffer("\0".join(map(str, found.folders)).encode(), dtype=np.uint8)
    whole = found.arrays | {"folders": names, "times": times}
    with replacing(file) as temporary:
        np.savez(temporary, **(whole | {"digest": _digest(whole)}))  # type: ignore[arg-type]  # of allow_pickle
    return found.arrays


def _digest(arrays: Arrays) -> NDArray:
    content = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        content.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return np.frombuffer(content.digest(), dtype=np.uint8)


def _read(file: Path) -> Arrays | None:
    """The arrays of a file that is there and whole."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        digest = arrays.pop("digest")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        print(f"{file} is damaged, and is made anew", flush=True)
        return None
    if not np.array_equal(_digest(arrays), digest):
        print(f"{file} is damaged, and is made anew", flush=True)
        return None
    return arrays


def _is_as_it_was(arrays: Arrays, path: Callable[[Arrays, int], Path]) -> bool:
    """Whether all folders and a sample of files are as they were listed."""
    folders = arrays["folders"].tobytes().decode().split("\0")
    sizes = arrays["sizes"]
    sample = np.unique(np.linspace(0, len(sizes) - 1, min(SAMPLE, len(sizes)), dtype=np.int64))
    try:
        changed = any(
            Path(folder).stat().st_mtime_ns != time for folder, time in zip(folders, arrays["times"], strict=True)
        )
        return not changed and all(path(arrays, i).stat().st_size == sizes[i] for i in sample.tolist())
    except OSError:
        return False
