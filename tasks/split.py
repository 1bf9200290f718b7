"""One split of an image benchmark, and what training asks of any."""

from dataclasses import dataclass
from typing import Protocol

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
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())
