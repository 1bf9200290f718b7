"""Images in parquet files as Hugging Face's `datasets` has them, in a folder or on its hub."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from configs.schema import Task
from tasks.files import ROOT
from tasks.label_space import LabelSpace
from tasks.parts import own_name, rows_of
from tasks.split import narrowed

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False)
class ParquetSplit:
    """Images that stay in a memory-mapped table, as encoded as they came, until they are asked for."""

    name: str
    table: "datasets.Dataset"
    column: str  # of the images
    rows: NDArray[np.int64]  # (N,) places in the table
    labels: Tensor  # (N,) int64 class ids
    digest: str  # of labels and sizes of the encoded images
    space: LabelSpace | None = None
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> Image.Image:
        """One image, RGB.

        Raises:
            UserError: it cannot be decoded to its end.
        """
        row = int(self.rows[index])
        found = self.table[row][self.column]
        try:
            with Image.open(io.BytesIO(found["bytes"]) if found["bytes"] else found["path"]) as image:
                return image.convert("RGB")
        except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
            raise UserError(f"image {row} of split {self.name!r} in parquet cannot be decoded ({error})") from error

    def of_classes(self, ids: Sequence[int], digest: str) -> "ParquetSplit":
        """The images of the task's classes `ids` alone, which are numbered 0, 1, ... in the order of `ids`."""
        part = narrowed(self, ids)
        rows = self.rows[part.rows.numpy()]
        return ParquetSplit(self.name, self.table, self.column, rows, part.labels, digest, part.space)


@lru_cache(maxsize=4)
def _table(where: str, own: str) -> "datasets.Dataset":
    """A split with its images as they are encoded."""
    import datasets  # noqa: PLC0415  # seconds that other tasks need not wait for

    try:
        return datasets.load_dataset(where, split=own)
    except Exception as error:  # of the network, of parquet, of its cache, or of the split's name
        raise UserError(
            f"{where}, split {own!r}, is neither a folder of parquet files nor a data set on the hub that can be had: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None


def _columns(task: Task, own: str) -> tuple["datasets.Dataset", str, Any]:
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


def class_names(task: Task) -> tuple[str, ...]:
    """The names of the label column.

    Raises:
        UserError: it has none, or not `task.num_classes`.
    """
    feature = _columns(task, own_name(task, task.train))[2]
    names = getattr(feature, "names", None)
    if names is None:
        raise UserError(f"column {task.label!r} of {task.folder} has no class names: task.names=FILE gives them")
    if len(names) != task.num_classes:
        raise UserError(f"task.num_classes={task.num_classes}, but {task.folder} has {len(names)} classes")
    return tuple(name.replace("_", " ") for name in names)


def load_split(task: Task, name: str) -> ParquetSplit:
    """One split, whose images are decoded when they are asked for; held-out is drawn by the place in the table.

    Args:
        task: of kind parquet.
        name: one of the task's splits; `task.folders` says what the data call it.

    Raises:
        UserError: no such data or split, not as many images as `task.counts`, or labels that are no class ids.
    """
    import pyarrow.compute as pc  # noqa: PLC0415

    table, column, _ = _columns(task, own_name(task, name))
    values = table.data.column(task.label).to_numpy()
    if not np.issubdtype(values.dtype, np.integer) or not ((values >= 0) & (values < task.num_classes)).all():
        raise UserError(f"column {task.label!r} of {task.folder} is not of class ids in [0, {task.num_classes})")
    labels = values.astype(np.int64)
    rows = rows_of(task, name, labels, [str(i) for i in range(task.num_classes)], key=str, where=ROOT / task.folder)
    encoded = pc.struct_field(table.data.column(column), "bytes")
    sizes = pc.fill_null(pc.binary_length(encoded), 0).to_numpy().astype(np.int64)
    digest = hashlib.blake2b(np.stack([labels[rows], sizes[rows]]).data, digest_size=16).hexdigest()
    return ParquetSplit(name, table, column, rows, torch.from_numpy(labels[rows]), digest)
