"""One split of an image benchmark, and what training and evaluation ask of any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tasks.label_space import LabelSpace


class Examples(Protocol):
    """Images or texts and labels that are used together."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 class ids, of the reported classes where there is a space."""

    @property
    def space(self) -> LabelSpace | None:
        """From the task's classes to the reported ones; None where they are the same."""

    @property
    def groups(self) -> Tensor | None:
        """(N,) int64 ids of the groups of which the worst is reported, -1 for an example in none; None without."""

    @property
    def group_names(self) -> tuple[str, ...]:
        """What the groups are called, in the order of their ids."""

    @property
    def digest(self) -> str:
        """Names the split, its examples and labels, by content and not by where they lie."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each example as it is stored."""

    def content(self, index: int, last: int | None = None) -> bytes:
        """An example as it is stored; only its last so many bytes where a number is given."""

    def called(self, index: int) -> str:
        """What an example is called in messages."""

    def __len__(self) -> int:
        """N."""


class Images(Examples, Protocol):
    """Examples that are images."""

    def pil(self, index: int) -> Image.Image:
        """One image, RGB, of its own size."""


class Stored(Protocol):
    """Where the images of a split are: in memory (`Pixels`), in files (tasks.files) or in a table (tasks.parquet).

    It is sent to the processes that load images.
    """

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each image as it is stored."""

    def content(self, index: int, last: int | None = None) -> bytes:
        """An image as it is stored; only its last so many bytes where a number is given."""

    def called(self, index: int) -> str:
        """What an image is called in messages."""

    def pil(self, index: int) -> Image.Image:
        """One image, RGB.

        Raises:
            UserError: it is missing, or cannot be decoded to its end.
        """

    def of(self, rows: Tensor) -> "Stored":
        """Only the images `rows`, (n,) int64, in this order."""


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
class ImageSplit:
    """Images and labels that are used together, wherever the images are."""

    name: str
    stored: Stored
    labels: Tensor  # (N,) int64 class ids, of the reported classes where there is a space
    digest: str  # hexadecimal, of the content
    space: LabelSpace | None = None
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each image as it is stored."""
        return self.stored.sizes

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W) uint8, of a split in memory."""
        assert isinstance(self.stored, Pixels)
        return self.stored.images

    def content(self, index: int, last: int | None = None) -> bytes:
        """An image as it is stored; only its last so many bytes where a number is given."""
        return self.stored.content(index, last)

    def called(self, index: int) -> str:
        """What an image is called in messages."""
        return self.stored.called(index)

    def pil(self, index: int) -> Image.Image:
        """One image, RGB; raises as `Stored.pil`."""
        return self.stored.pil(index)

    def of_classes(self, ids: Sequence[int], digest: str) -> "ImageSplit":
        """The images of the task's classes `ids` alone, which are numbered 0, 1, ... in the order of `ids`."""
        part = narrowed(self, ids)
        stored = self.stored.of(part.rows)
        return ImageSplit(self.name, stored, part.labels, digest, part.space, part.groups, self.group_names)


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What a split of some classes has of the whole."""

    rows: Tensor  # (n,) int64, which examples
    labels: Tensor  # (n,) int64, renumbered
    space: LabelSpace | None
    kept: tuple[int, ...]  # the reported classes that are left, as they were numbered
    groups: Tensor | None


def narrowed(images: Examples, ids: Sequence[int]) -> Narrowed:
    """The part of a split that is about the task's classes `ids`.

    Raises:
        UserError: the split reports none of them.
    """
    space, kept = (None, tuple(ids)) if images.space is None else images.space.of_classes(ids)
    rows, labels = renumbered(images.labels, kept)
    return Narrowed(rows, labels, space, kept, None if images.groups is None else images.groups[rows])


def renumbered(labels: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which examples are of the classes `ids`, and the place of their class in `ids`.

    >>> renumbered(torch.tensor([5, 2, 0, 2]), [2, 5])
    (tensor([0, 1, 3]), tensor([1, 0, 0]))
    """
    places = torch.full((max(int(labels.max()), *ids) + 1,), -1)
    places[list(ids)] = torch.arange(len(ids))
    rows = (places[labels] >= 0).nonzero().flatten()
    return rows, places[labels[rows]]
