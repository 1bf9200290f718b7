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
from PIL import Image

from configs.errors import UserError
from tasks.split import ImageSplit, Pixels

DATA = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "held_out", "test", "v2", "r", "sketch", "objectnet", "a")
SIZE = 64  # pixels, both sides
REMEDY = "restore it with `git checkout -- tasks/emoji/data` or make it with `python -m embedded.build`"


class DataError(UserError):
    """A data file is missing, damaged, or does not agree with the manifest."""


def load_split(name: str, folder: Path = DATA, classes: Container[int] | None = None) -> ImageSplit:
    """The images and labels of one split, of all classes or of some.

    Args:
        name: one of `SPLITS`. `held_out` selects, `test` and the shifts report.
        folder: where the files are.
        classes: ids of the classes whose images are decoded and returned; of all where None.

    Returns:
        images (N, 3, 64, 64) uint8, labels (N,) int64 in [0, number of classes).

    Raises:
        DataError: no such split; the file is missing, is not the one of the manifest, or its labels and names do not
            agree.
    """
    if name not in SPLITS:
        raise DataError(f"split {name!r} is not one of {', '.join(SPLITS)}")
    table, digest = read_table(name, folder)
    if classes is not None:
        table = table.filter([label in classes for label in table["label"].to_pylist()])
    pictures = (Image.open(io.BytesIO(picture["bytes"])) for picture in table["image"].to_pylist())
    images = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    if images.shape[1:] != (SIZE, SIZE, 3):
        raise DataError(f"{folder / name}.parquet: images are {images.shape[1:]}, not {(SIZE, SIZE, 3)}; {REMEDY}")
    return ImageSplit(
        name=name,
        stored=Pixels(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()),
        labels=torch.tensor(table["label"].to_pylist(), dtype=torch.int64),
        digest=digest,
    )


def read_table(name: str, folder: Path = DATA) -> tuple[pa.Table, str]:
    """The checked parquet table of a split (columns as README.md says) and the sha256 of its file.

    Raises:
        DataError: see `load_split`.
    """
    manifest, path = read_manifest(folder), folder / f"{name}.parquet"
    entry = manifest["splits"].get(name)
    if entry is None:
        raise DataError(f"{folder / 'manifest.json'}: has no split {name!r}; {REMEDY}")
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
    """The manifest: counts, digests, sources, classes.

    Raises:
        DataError: it is missing or is not JSON.
    """
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
