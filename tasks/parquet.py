"""Images in parquet files as Hugging Face's `datasets` has them, in a folder or on its hub."""

import io
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from configs.data import Parquet
from configs.errors import UserError
from soups.errors import first_line
from tasks.files import ROOT, content_digest, is_data, read_file, spaced
from tasks.held_out import own_name, rows_of
from tasks.split import ImageSplit, decoded, ending

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images that stay in a memory-mapped table, as encoded as they came, until they are asked for."""

    split: str  # for messages
    table: "datasets.Dataset"
    column: str  # of the images
    rows: NDArray[np.int64]  # (N,) places in the table
    sizes: NDArray[np.int64]  # (N,) bytes of each encoded image

    def content(self, index: int, last: int | None = None) -> bytes:
        """The encoded bytes of an image, or their last ones."""
        return _encoded(self.table, self.column, int(self.rows[index]), last)

    def called(self, index: int) -> str:
        """The place of an image in the table."""
        return f"row {self.rows[index]}"

    def pil(self, index: int) -> Image.Image:
        """One image, RGB."""
        name = f"{self.rows[index]} of split {self.split!r} in parquet"
        return decoded(io.BytesIO(self.content(index)), name)

    def of(self, rows: Tensor) -> "Encoded":
        """Only the images `rows`."""
        return replace(self, rows=self.rows[rows.numpy()], sizes=self.sizes[rows.numpy()])


def _encoded(table: "datasets.Dataset", column: str, row: int, last: int | None = None) -> bytes:
    """An image as it is encoded: in the table, or in the file that the table names."""
    found = table[row][column]
    if found["bytes"]:
        return ending(found["bytes"], last)
    return read_file(Path(found["path"] or f"image {row}, which has neither bytes nor a path,"), last)


@lru_cache(maxsize=4)
def _table(where: str, own: str) -> "datasets.Dataset":
    """A split with its images as they are encoded.

    The files of a local folder are those that its card or their names say, and are read one by one: by the folder alone
    `datasets` would answer with the tables of any other folder that has its name and a card and that it has seen
    before. The name of what it keeps is a digest of the files' content.
    """
    import datasets  # noqa: PLC0415  # seconds that other tasks need not wait for

    folder = Path(where)
    try:
        if not folder.is_dir():
            return datasets.load_dataset(where, split=own)
        with tempfile.TemporaryDirectory() as empty:  # nothing that it has kept says what is here
            builder = datasets.load_dataset_builder(where, cache_dir=empty)
        known = {
            str(split): [Path(file) for file in files if is_data(str(Path(file).relative_to(folder)))]
            for split, files in (builder.config.data_files or {}).items()
        }
        files = known.get(own, [])
        if not files:
            splits = ", ".join(split for split, files in known.items() if files) or "none"
            raise UserError(f"{folder} has no parquet files of split {own!r}, but of {splits}: set task.folders")
        sizes = np.array([file.stat().st_size for file in files], dtype=np.int64)
        names = [str(file.relative_to(folder)) for file in files]
        digest = content_digest(names, sizes, lambda i, last: read_file(files[i], last))
        paths = {own: [str(file) for file in files]}
        features = builder.info.features
        return datasets.load_dataset("parquet", f"files-{digest}", data_files=paths, features=features, split=own)
    except UserError:
        raise
    except Exception as error:  # of the network, of parquet, of its cache, or of the split's name
        raise UserError(
            f"{where}, split {own!r}, is neither a folder of parquet files nor a data set on the hub that can be had: "
            f"{first_line(error)}"
        ) from None


def _columns(task: Parquet, own: str) -> tuple["datasets.Dataset", str, Any]:
    """The table, its image column and the feature of its label column."""
    import datasets  # noqa: PLC0415

    local = ROOT / task.folder
    where = str(local if local.exists() else task.folder)
    table = _table(where, own)
    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1 or task.label not in table.features:
        raise UserError(
            f"{where} has the columns {', '.join(table.features)}: one of them must be of images, and one the labels, "
            f"task.label={task.label}"
        )
    table = table.select_columns([images[0], task.label])
    return table.cast_column(images[0], datasets.Image(decode=False)), images[0], table.features[task.label]


def class_names(task: Parquet) -> tuple[str, ...]:
    """The names of the label column; a `UserError` where it has none."""
    feature = _columns(task, own_name(task, task.train))[2]
    names = getattr(feature, "names", None)
    if names is None:
        raise UserError(f"column {task.label!r} of {task.folder} has no class names: task.names=FILE gives them")
    return spaced(names)


def load_split(task: Parquet, name: str) -> ImageSplit:
    """One split, whose images are decoded when they are asked for; held-out is drawn by the place in the table."""
    import pyarrow.compute as pc  # noqa: PLC0415

    table, column, _ = _columns(task, own_name(task, name))
    values = table.data.column(task.label).to_numpy()
    if not np.issubdtype(values.dtype, np.integer) or not ((values >= 0) & (values < task.num_classes)).all():
        raise UserError(f"column {task.label!r} of {task.folder} is not of class ids in [0, {task.num_classes})")
    labels = values.astype(np.int64)
    rows = rows_of(task, name, labels, [str(i) for i in range(task.num_classes)], key=str, where=ROOT / task.folder)
    encoded = pc.struct_field(table.data.column(column), "bytes")
    sizes = pc.fill_null(pc.binary_length(encoded), 0).to_numpy().astype(np.int64)
    for row in np.flatnonzero(sizes == 0):  # the table names a file
        sizes[row] = len(_encoded(table, column, int(row)))
    labels, stored = labels[rows], Encoded(name, table, column, rows, sizes[rows])
    digest = content_digest([name, own_name(task, name), *map(str, labels)], stored.sizes, stored.content)
    return ImageSplit(name, stored, torch.from_numpy(labels), digest)
