"""Read the emoji benchmark: plain tensors from committed parquet files, checked before they are decoded."""

import hashlib
import io
import json
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from tasks.split import ImageSplit, Pixels

DATA = Path(__file__).resolve().parent / "data"
DRAWINGS = "drawings"  # the file whose pictures a fold deals to the three splits that come first
SHIFTS = ("v2", "r", "sketch", "objectnet", "a")
SPLITS = ("train", "held_out", "test", *SHIFTS)
FILES = (DRAWINGS, *SHIFTS)
FOLDS = 5
SIZE = 64  # pixels, both sides
REMEDY = "restore it with `git checkout -- tasks/emoji/data` or make it with `python -m embedded.build`"


class DataError(UserError):
    """A data file is missing, damaged, or does not agree with the manifest."""


def load_split(name: str, folder: Path = DATA, classes: Container[int] | None = None, fold: int = 0) -> ImageSplit:
    """The images of one split, one of `SPLITS`, (N, 3, 64, 64) uint8, and their labels, (N,) int64.

    Args:
        classes: ids of the classes whose images are decoded and returned; all where None.
        fold: decides which drawings are train, held-out and test, see `deal`.

    Raises:
        DataError: no such split; the file is missing, is not the one of the manifest, or its labels and names do not
            agree.
    """
    table, digest = read_split(name, folder, fold)
    if classes is not None:
        table = table.filter([label in classes for label in table["label"].to_pylist()])
    images = torch.from_numpy(decoded(table, folder)).permute(0, 3, 1, 2).contiguous()
    return ImageSplit(name, Pixels(images), torch.tensor(table["label"].to_pylist(), dtype=torch.int64), digest)


def decoded(table: pa.Table, folder: Path = DATA) -> NDArray[np.uint8]:
    """The pictures of a table: (N, 64, 64, 3) uint8."""
    pictures = (Image.open(io.BytesIO(picture["bytes"])) for picture in table["image"].to_pylist())
    images = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    if images.shape[1:] != (SIZE, SIZE, 3):
        raise DataError(f"{folder}: images are {images.shape[1:]}, not {(SIZE, SIZE, 3)}; {REMEDY}")
    return images


def read_split(name: str, folder: Path = DATA, fold: int = 0) -> tuple[pa.Table, str]:
    """The checked table of a split (columns as README.md says), and a digest of what is in it."""
    if name not in SPLITS:
        raise DataError(f"split {name!r} is not one of {', '.join(SPLITS)}")
    if name in SHIFTS:
        return read_table(name, folder)
    table, digest = read_table(DRAWINGS, folder)
    rows = np.flatnonzero(deal(table, fold) == name)
    return table.take(rows), hashlib.sha256(f"{digest} fold {fold} {name}".encode()).hexdigest()


def deal(table: pa.Table, fold: int) -> NDArray[np.str_]:
    """The split of each drawing in a fold, "" for those that are left out.

    In a class with n drawings, in a keyed order, number `fold` modulo n is test, the next is held-out, and the rest
    is train: both unseen drawings have as many to learn from, so held-out and test are exchangeable. Over the folds
    every drawing is test. A drawing of test or held-out that is nearly that of another split is left out.
    """
    labels, places = np.asarray(table["label"]), np.asarray(table["place"])
    sizes = np.bincount(labels)[labels]
    splits = np.where(places == fold % sizes, "test", np.where(places == (fold + 1) % sizes, "held_out", "train"))
    others = table["near"].to_pylist()
    is_leak = [any(splits[other] != split for other in near) for split, near in zip(splits, others, strict=True)]
    return np.where((splits != "train") & is_leak, "", splits)


def read_table(name: str, folder: Path = DATA) -> tuple[pa.Table, str]:
    """The checked table of one of `FILES` and the sha256 of its file."""
    manifest, path = read_manifest(folder), folder / f"{name}.parquet"
    entry = manifest["files"].get(name)
    if entry is None:
        raise DataError(f"{folder / 'manifest.json'}: has no file {name!r}; {REMEDY}")
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise DataError(f"{path}: sha256 is {digest}, the manifest says {entry['sha256']}; {REMEDY}")
    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}); {REMEDY}") from error
    if table.num_rows != entry["count"]:
        raise DataError(f"{path}: has {table.num_rows} rows, the manifest says {entry['count']}; {REMEDY}")
    columns = (table[column].to_pylist() for column in ("label", "hexcode", "name"))
    for row, (label, hexcode, word) in enumerate(zip(*columns, strict=True)):
        known = manifest["classes"][label] if 0 <= label < len(manifest["classes"]) else {}
        if (known.get("hexcode"), known.get("name")) != (hexcode, word):
            raise DataError(f"{path}: row {row} has label {label} but is {word!r} ({hexcode}); {REMEDY}")
    return table, digest


def read_manifest(folder: Path = DATA) -> Mapping:
    """The manifest: counts, digests, sources, classes."""
    path = folder / "manifest.json"
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); {REMEDY}") from error


def class_names(folder: Path = DATA) -> tuple[str, ...]:
    """The class names in the order of the labels."""
    return tuple(row["name"] for row in read_manifest(folder)["classes"])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {REMEDY}") from error
