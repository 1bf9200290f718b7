"""One split of an image benchmark, and what training and evaluation ask of any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
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
        """Names the examples and labels."""

    def __len__(self) -> int:
        """N."""


class Images(Examples, Protocol):
    """Examples that are images."""

    def pil(self, index: int) -> Image.Image:
        """One image, RGB, of its own size."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one size in memory, with the digest of the file they came from."""

    name: str
    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) int64 class ids
    digest: str  # of the content, hexadecimal
    space: LabelSpace | None = None
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> Image.Image:
        """One image."""
        # Contiguous before Pillow sees it, which copies a strided array element by element.
        return Image.fromarray(self.images[index].permute(1, 2, 0).contiguous().numpy())

    def of_classes(self, ids: Sequence[int], digest: str) -> "Split":
        """The images of the task's classes `ids` alone, which are numbered 0, 1, ... in the order of `ids`."""
        part = narrowed(self, ids)
        images = self.images[part.rows]
        return Split(self.name, images, part.labels, digest, part.space, part.groups, self.group_names)


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
