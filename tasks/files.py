"""Files of a data set: which of them are data, what they say, and a digest of what they hold."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from soups.chance import uniform
from tasks.split import decoded

ROOT = Path(__file__).resolve().parents[1]
READERS = 16  # threads that read files, which on a network file system is waiting
WHOLE = 64 * 2**20  # bytes; of a split up to this size, and
MANY = 10_000  # files, every byte is in the digest; of a larger one
SAMPLE = 1024  # files are, and of each
PIECE = 64 * 2**10  # bytes at its end, where formats of images keep the pixels


def is_data(path: str) -> bool:
    """Whether a relative path is data: no part of it is hidden, or belongs to a Mac's archives.

    >>> [is_data(path) for path in ("cat/1.jpg", "cat/._1.jpg", ".ipynb_checkpoints", "__MACOSX/cat", "../cat")]
    [True, False, False, False, True]
    """
    return not any((part[:1] == "." and part not in (".", "..")) or part == "__MACOSX" for part in path.split("/"))


def read_file(path: Path, last: int | None = None) -> bytes:
    """The bytes of a file, or only its last so many.

    Raises:
        UserError: it cannot be read.
    """
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

    Raises:
        UserError: a file that cannot be read.
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
        """One image, RGB, without its border.

        Raises:
            UserError: the file is missing, or cannot be decoded to its end.
        """
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
    """The content of a JSON file of a data set.

    Raises:
        UserError: the file is missing or not JSON.
    """
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
        return pd.read_csv(path, sep=separator, usecols=columns, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).strip()}): {remedy}") from None


def first_empty(column: "pd.Series[str]") -> int | None:
    """The number of the first row, from 1, that says nothing in a column of a table; None where there is none."""
    empty = (column.isna() | (column.str.strip() == "")).to_numpy()
    return int(empty.argmax()) + 1 if empty.any() else None


def spaced(names: Iterable[str]) -> tuple[str, ...]:
    """Names of folders as a prompt has them."""
    return tuple(name.replace("_", " ") for name in names)
