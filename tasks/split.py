"""One split of an image benchmark: in memory, or as files that are read when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from configs.errors import UserError


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

    def pixels(self, rows: Sequence[int], size: int) -> Tensor:
        """(B, 3, size, size) uint8, as they are evaluated."""


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

    def pixels(self, rows: Sequence[int], size: int) -> Tensor:
        """Images as they are; the embedded benchmark is drawn at the size it is evaluated at."""
        del size
        return self.images[list(rows)]


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Image files, decoded when they are asked for."""

    name: str
    paths: tuple[Path, ...]
    labels: Tensor  # (N,) int64 class ids
    digest: str  # of the files' names and sizes

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> Image.Image:
        """One image, decoded.

        Raises:
            UserError: the file is missing, truncated or no image.
        """
        try:
            with Image.open(self.paths[index]) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError) as error:  # PIL raises SyntaxError for broken PNGs
            raise UserError(f"{self.paths[index]} cannot be read ({error}): replace the file or take it away") from None

    def pixels(self, rows: Sequence[int], size: int) -> Tensor:
        """CLIP's evaluation transform: the shorter side to `size` (bicubic), then the square in the middle."""
        made = []
        for row in rows:
            image = self.pil(row)
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            resized = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - size) // 2, (height - size) // 2
            made.append(np.asarray(resized.crop((left, top, left + size, top + size))))
        return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()
