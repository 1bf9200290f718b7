"""One split of a benchmark: its examples, wherever they are stored, their labels, and the classes that it reports."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from configs.errors import UserError

Split = TypeVar("Split", bound="Examples")


class Pictures(Protocol):
    """Images that training reads. They are sent to the processes that load images."""

    def content(self, index: int) -> bytes:
        """An image as it is stored."""

    def pil(self, index: int) -> Image.Image:
        """One image, RGB; a `UserError` where it is missing, or cannot be decoded to its end."""


class Stored(Protocol):
    """N examples: images in memory, in files or in a table, or texts. It is sent to the processes that load images."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each example as it is stored."""

    def content(self, index: int, last: int | None = None) -> bytes:
        """An example as it is stored; only its last so many bytes where a number is given."""

    def called(self, index: int) -> str:
        """The name of an example in messages."""

    def of(self, rows: Tensor) -> "Stored":
        """Only the examples `rows`, (n,) int64, in this order."""


class StoredImages(Stored, Pictures, Protocol):
    """N images of a split."""


def ending(content: bytes, last: int | None) -> bytes:
    """The last so many bytes; all of them where no number is given."""
    return content if last is None else content[-last:]


def decoded(file: Path | io.BytesIO, name: str, remedy: str = "") -> Image.Image:
    """An image, converted to RGB as torchvision's loader does it; an orientation in its EXIF is ignored.

    Raises:
        UserError: it is missing, cannot be decoded to its end, or has more than 8 bits; the message has its name.
    """
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError("its pixels have more than 8 bits, which would be cut off at 255: save it with 8")
            return image.convert("RGB")
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        raise UserError(f"image {name} cannot be decoded ({error}){remedy}") from error


class Pixels:
    """Images of one size in memory: (N, 3, H, W) uint8."""

    def __init__(self, images: Tensor):
        self.images = images
        self.sizes = np.full(len(images), images[0].numel() if len(images) else 0)

    def content(self, index: int, last: int | None = None) -> bytes:
        """The pixels of an image, or their last bytes."""
        return ending(self.images[index].numpy().tobytes(), last)

    def called(self, index: int) -> str:
        """The place of an image."""
        return f"image {index}"

    def pil(self, index: int) -> Image.Image:
        """One image, RGB."""
        # Contiguous before Pillow sees it, which copies a strided array element by element.
        return Image.fromarray(self.images[index].permute(1, 2, 0).contiguous().numpy())

    def of(self, rows: Tensor) -> "Pixels":
        """Only the images `rows`."""
        return Pixels(self.images[rows])


@dataclass(frozen=True)
class LabelSpace:
    """Reported class j is the network's classes `ids[j]`, one or several, whichever of them has the highest logit.

    Source: ImageNet-R and -A are reported over their own 200 classes (Hendrycks et al. 2021), ObjectNet over 113 that
    are 125 of ImageNet's (Barbu et al. 2019); no other logit takes part.
    """

    ids: tuple[tuple[int, ...], ...]  # each in [0, size)
    size: int  # C, how many classes the network has

    @classmethod
    def subset(cls, ids: Sequence[int], size: int) -> "LabelSpace":
        """Only the classes `ids`, reported in this order."""
        return cls(tuple((i,) for i in ids), size)

    def __len__(self) -> int:
        return len(self.ids)

    def project(self, logits: Tensor) -> Tensor:
        """(N, C) logits of the network to (N, len(ids)) of the reported classes; a `ValueError` for another C.

        >>> LabelSpace(((2, 0), (3,)), 4).project(torch.tensor([[1.0, 9.0, 3.0, 2.0]]))
        tensor([[3., 2.]])
        """
        if logits.ndim != 2 or logits.shape[1] != self.size:
            raise ValueError(f"need (N, {self.size}) logits, got {tuple(logits.shape)}")
        most = max(map(len, self.ids))
        # A class with fewer ids than another names its first again, which does not change a maximum.
        padded = torch.tensor([[*several, *several[:1] * (most - len(several))] for several in self.ids])
        return logits[:, padded.to(logits.device)].amax(dim=2)

    def of_classes(self, ids: Sequence[int]) -> tuple["LabelSpace", tuple[int, ...]]:
        """What is left for a network of the classes `ids` alone, and which reported classes that are.

        A reported class stays while one of its ids does; a `UserError` where none is left.
        """
        place = {old: new for new, old in enumerate(ids)}
        left = [tuple(place[i] for i in several if i in place) for several in self.ids]
        kept = tuple(j for j, several in enumerate(left) if several)
        if not kept:
            raise UserError("task.classes and task.parts leave a split without any class: take more, or drop the split")
        return LabelSpace(tuple(left[j] for j in kept), len(ids)), kept


def project(space: LabelSpace | None, logits: Tensor) -> Tensor:
    """Logits over what a split reports; without a space of its own, that is the network's classes."""
    return logits if space is None else space.project(logits)


@dataclass(frozen=True, eq=False)
class Examples:
    """Images or texts, and labels."""

    name: str
    stored: Stored
    labels: Tensor  # (N,) int64 class ids, of the reported classes where there is a space
    digest: str  # hexadecimal, of the content and not of the place
    space: LabelSpace | None = None  # from the task's classes to the reported ones; None where they are the same
    groups: Tensor | None = None  # (N,) int64 ids of the groups of which the worst is reported, -1 for none
    group_names: tuple[str, ...] = ()  # in the order of their ids

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, ids: Sequence[int]) -> tuple[Tensor, Tensor, LabelSpace | None]:
        """The examples of the task's classes `ids`: their rows, their labels among these, and the reported classes.

        Raises:
            UserError: the split reports none of them.
        """
        space, kept = (None, tuple(ids)) if self.space is None else self.space.of_classes(ids)
        places = torch.full((max(int(self.labels.max()), *kept) + 1,), -1)
        places[list(kept)] = torch.arange(len(kept))
        rows = (places[self.labels] >= 0).nonzero().flatten()
        return rows, places[self.labels[rows]], space

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
        """(N, 3, H, W) uint8 images of a split in memory."""
        assert isinstance(self.stored, Pixels)
        return self.stored.images

    def pil(self, index: int) -> Image.Image:
        """One image, RGB; raises as `Pictures.pil`."""
        return self.stored.pil(index)
