"""One split of a benchmark: what training and evaluation ask of any, and images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tasks.label_space import LabelSpace

Split = TypeVar("Split", bound="Examples")


class Stored(Protocol):
    """Where examples are: images in memory (`Pixels`), in files (tasks.files), in a table (tasks.parquet), or texts.

    It is sent to the processes that load images.
    """

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each example as it is stored."""

    def content(self, index: int, last: int | None = None) -> bytes:
        """An example as it is stored; only its last so many bytes where a number is given."""

    def called(self, index: int) -> str:
        """What an example is called in messages."""

    def of(self, rows: Tensor) -> "Stored":
        """Only the examples `rows`, (n,) int64, in this order."""


class StoredImages(Stored, Protocol):
    """Where images are."""

    def pil(self, index: int) -> Image.Image:
        """One image, RGB.

        Raises:
            UserError: it is missing, or cannot be decoded to its end.
        """


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images of one size in memory."""

    images: Tensor  # (N, 3, H, W) uint8

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of the pixels of each image."""
        return np.full(len(self.images), self.images[0].numel() if len(self.images) else 0)

    def content(self, index: int, last: int | None = None) -> bytes:
        """The pixels of an image."""
        pixels = self.images[index].numpy().tobytes()
        return pixels if last is None else pixels[-last:]

    def called(self, index: int) -> str:
        """Its place."""
        return f"image {index}"

    def pil(self, index: int) -> Image.Image:
        """One image."""
        # Contiguous before Pillow sees it, which copies a strided array element by element.
        return Image.fromarray(self.images[index].permute(1, 2, 0).contiguous().numpy())

    def of(self, rows: Tensor) -> "Pixels":
        """Only some of them."""
        return Pixels(self.images[rows])


@dataclass(frozen=True, eq=False)
class Examples:
    """Images or texts and labels that are used together, wherever they are."""

    name: str
    stored: Stored
    labels: Tensor  # (N,) int64 class ids, of the reported classes where there is a space
    digest: str  # hexadecimal, of the content and not of the place
    space: LabelSpace | None = None  # from the task's classes to the reported ones; None where they are the same
    groups: Tensor | None = None  # (N,) int64 ids of the groups of which the worst is reported, -1 for none
    group_names: tuple[str, ...] = ()  # in the order of their ids

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each example as it is stored."""
        return self.stored.sizes

    def content(self, index: int, last: int | None = None) -> bytes:
        """An example as it is stored; only its last so many bytes where a number is given."""
        return self.stored.content(index, last)

    def called(self, index: int) -> str:
        """What an example is called in messages."""
        return self.stored.called(index)

    def rows_of(self, ids: Sequence[int]) -> tuple[Tensor, Tensor, LabelSpace | None]:
        """Which examples are about the task's classes `ids`, their labels among these, and what of them is reported.

        Raises:
            UserError: the split reports none of them.
        """
        space, kept = (None, tuple(ids)) if self.space is None else self.space.of_classes(ids)
        return (*renumbered(self.labels, kept), space)

    def of_classes(self: Split, ids: Sequence[int], digest: str) -> Split:
        """The examples of the task's classes `ids` alone, which are numbered 0, 1, ... in the order of `ids`."""
        rows, labels, space = self.rows_of(ids)
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, stored=self.stored.of(rows), labels=labels, digest=digest, space=space, groups=groups)


@dataclass(frozen=True, eq=False)
class ImageSplit(Examples):
    """Images and labels."""

    stored: StoredImages

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W) uint8, of a split in memory."""
        assert isinstance(self.stored, Pixels)
        return self.stored.images

    def pil(self, index: int) -> Image.Image:
        """One image, RGB; raises as `StoredImages.pil`."""
        return self.stored.pil(index)


def renumbered(labels: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which examples are of the classes `ids`, and the place of their class in `ids`.

    >>> renumbered(torch.tensor([5, 2, 0, 2]), [2, 5])
    (tensor([0, 1, 3]), tensor([1, 0, 0]))
    """
    places = torch.full((max(int(labels.max()), *ids) + 1,), -1)
    places[list(ids)] = torch.arange(len(ids))
    rows = (places[labels] >= 0).nonzero().flatten()
    return rows, places[labels[rows]]
