"""Images as a network sees them at evaluation: resized and cropped without chance, so they need decoding only once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from configs.errors import UserError
from configs.training import Model
from soups.files.atomic import digest_of
from store.decoded import Shards
from tasks.ahead import made_ahead
from tasks.split import ImageSplit, Pixels


@dataclass(frozen=True)
class FixedTransform:
    """Bicubic resize, then centre crop; CLIP's preprocessing before the normalisation.

    Raises:
        UserError: the crop is larger than the resized image.
    """

    size: int  # pixels, square, of the crop
    resize: int  # pixels to which the shorter side is resized
    squash: bool  # resize both sides to it, whatever the aspect

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise UserError(f"model.eval_resize={self.resize} is smaller than the {self.size} pixels of the crop")

    @property
    def key(self) -> str:
        """Names it; equal keys give equal images, as far as versions of Pillow do."""
        return f"bicubic {'squash' if self.squash else 'shorter'} {self.resize} crop {self.size}"

    def __call__(self, image: Image.Image) -> Tensor:
        """A PIL image, RGB, to (3, size, size) uint8."""
        sides = [self.resize, self.resize] if self.squash else [self.resize]
        resized = resize(image, sides, InterpolationMode.BICUBIC)
        return pil_to_tensor(center_crop(resized, [self.size, self.size])).contiguous()

    def keeps(self, images: Tensor) -> bool:
        """Whether it changes nothing of (N, 3, H, W) images."""
        return images.shape[-2:] == (self.size, self.size) and self.resize == self.size


def of_model(model: Model) -> FixedTransform:
    """What the network sees at evaluation.

    Raises:
        UserError: `model.eval_resize` is smaller than what the network sees.
    """
    size = model.evaluated_at
    return FixedTransform(size, model.eval_resize or size, model.squash)


@dataclass(frozen=True)
class _Batches(Dataset[Tensor]):
    """Batches, each made whole by one process."""

    images: ImageSplit
    transform: FixedTransform
    parts: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, part: int) -> Tensor:
        # Stacked; by a worker at once where the other process will read them.
        return default_collate([self.transform(self.images.pil(row)) for row in self.parts[part].tolist()])


@dataclass(frozen=True)
class _Missing(Dataset[int]):
    """Shards of decoded images, each written whole by one process."""

    images: ImageSplit
    transform: FixedTransform
    shards: Shards
    firsts: Sequence[int]

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, index: int) -> int:
        first = self.firsts[index]
        if not self.shards.path(first).exists():  # another process may have been faster
            _write(self.images, self.transform, self.shards, first)
        return first


def _decoded_once(
    images: ImageSplit, transform: FixedTransform, parts: Sequence[Tensor], workers: int, folder: Path
) -> Iterator[Tensor]:
    """The batches from shards; missing ones are made in the order in which they are needed."""
    key = digest_of({"images": images.digest, "transform": transform.key})
    shards = Shards(folder / key, len(images), (3, transform.size, transform.size))
    missing = [first for first in shards.needed(torch.cat(list(parts))) if not shards.path(first).exists()]
    waiting = set(missing)
    made = made_ahead(_Missing(images, transform, shards, missing), workers if missing else 0)
    whole: set[int] = set()
    for part in parts:
        needed = shards.needed(part)
        while not waiting.isdisjoint(needed):
            waiting.remove(next(made))
        for first in needed:
            if first not in whole:
                _mend(images, transform, shards, first)
                whole.add(first)
        yield shards.read(part)


def _mend(images: ImageSplit, transform: FixedTransform, shards: Shards, first: int) -> None:
    """Make a shard anew that is damaged, or has no digest of its content, and say so."""
    try:
        shards.check(first)
    except ValueError as error:
        print(f"decoded images {shards.path(first)} are damaged ({error}): decoding them anew", flush=True)
        _write(images, transform, shards, first)


def _write(images: ImageSplit, transform: FixedTransform, shards: Shards, first: int) -> None:
    shards.write(first, (transform(images.pil(row)).numpy() for row in shards.rows(first)))


def fixed_batches(
    images: ImageSplit,
    transform: FixedTransform,
    *,
    batch: int,
    rows: Tensor | None = None,
    workers: int = 0,
    decoded: Path | None = None,
) -> Iterator[Tensor]:
    """(b, 3, size, size) uint8 batches in order, of `batch` images but for the last; none of no images.

    Args:
        images: in files or in memory. Of those that the transform keeps as they are, the stored bytes are given.
        transform: what to make of each.
        batch: images at once.
        rows: (N,) int64, which of them; all where None.
        workers: processes that decode ahead; 0 decodes here. The batches do not depend on it.
        decoded: a folder that keeps transformed images, so that they are decoded once, by whichever process is first;
            the bytes are those of a fresh decoding. Only shards with one of `rows` are made.

    Raises:
        UserError: an image that cannot be decoded, or a full disk.
    """
    rows = torch.arange(len(images)) if rows is None else rows
    if len(rows) == 0:
        return
    parts = rows.split(batch)
    if isinstance(images.stored, Pixels) and transform.keeps(images.images):
        yield from (images.images[part] for part in parts)
    elif decoded is None:
        yield from made_ahead(_Batches(images, transform, parts), workers)
    else:
        yield from _decoded_once(images, transform, parts, workers, decoded)
