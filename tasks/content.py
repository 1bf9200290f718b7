"""Which files are data, and digests of what they hold."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from soups.chance import uniform

Content = Callable[[int, int | None], bytes]  # example i as it is stored; its last so many bytes only, where a number
READERS = 16  # threads that read files, which on a network file system is waiting
WHOLE = 64 * 2**20  # bytes; of a split up to this size, and
MANY = 10_000  # files, every byte is in the digest; of a larger one
SAMPLE = 1024  # files are, and of each
PIECE = 64 * 2**10  # bytes at its end, where formats of images keep the pixels


def is_data(path: str) -> bool:
    """Whether a relative path is of data: no part of it is hidden, or of a Mac's archives.

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


def content_digest(described: Iterable[str], sizes: NDArray[np.int64], content: Content) -> str:
    """32 hex digits that name the content of a split, wherever its folder lies.

    They are over what is said of each example, its size and its bytes; of more than 64 MiB or 10,000 examples, over
    the ends of 1,024 of them, which a draw keyed by their number chooses. To read all of ImageNet would take an hour
    at each start, so an edit that keeps the sizes of all files of a large set and touches none of those is not seen.

    Args:
        described: of the split and of each example, e.g. its relative name and label.
        sizes: (N,) bytes of each example.
        content: how to read it.

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
