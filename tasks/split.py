"""One split of an image benchmark, and what training asks of any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor


class Images(Protocol):
    """Images and labels that are used together."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 class ids."""

    @property
    def digest(self) -> str:
        """Names the images and labels."""

    def __len__(self) -> int:
        """N."""

    def pil(self, index: int) -> Image.Image:
        """One image, RGB, of its own size."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one size in memory, with the digest of the file they came from."""

    name: str
    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) int64 class ids
    digest: str  # sha256 of the file, hexadecimal

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> Image.Image:
        """One image."""
        # Contiguous before Pillow sees it, which copies a strided array element by element.
        return Image.fromarray(self.images[index].permute(1, 2, 0).contiguous().numpy())

    def of_classes(self, ids: Sequence[int], digest: str) -> "Split":
        """The images of these classes alone, which are numbered 0, 1, ... in the order of `ids`."""
        rows, labels = renumbered(self.labels, ids)
        return Split(self.name, self.images[rows], labels, digest)


def renumbered(labels: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which examples are of the classes `ids`, and the place of their class in `ids`.

    >>> renumbered(torch.tensor([5, 2, 0, 2]), [2, 5])
    (tensor([0, 1, 3]), tensor([1, 0, 0]))
    """
    places = torch.full((max(int(labels.max()), *ids) + 1,), -1)
    places[list(ids)] = torch.arange(len(ids))
    rows = (places[labels] >= 0).nonzero().flatten()
    return rows, places[labels[rows]]
