"""Images as a network sees them at evaluation: resized and cropped without chance, so they need decoding only once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from configs.errors import UserError
from configs.training import Model
from soups.files.atomic import digest_of
from store.shards import SHARD, Shards
from tasks.prefetch import prefetch
from tasks.split import ImageSplit, Pixels

LOCKS = "type compute.decoded=FOLDER of a file system with locks"


@dataclass(frozen=True)
class EvalTransform:
    """Bicubic resize, then centre crop, which is not larger; CLIP's preprocessing before the normalisation."""

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


def eval_transform(model: Model) -> EvalTransform:
    """The transform of what a network sees at evaluation."""
    size = model.evaluated_at
    return EvalTransform(size, model.eval_resize or size, model.squash)


def _batch(images: ImageSplit, transform: EvalTransform, rows: Tensor) -> Tensor:
    # Stacked; by a worker at once where the other process will read them.
    return default_collate([transform(images.pil(row)) for row in rows.tolist()])


def _make_shard(images: ImageSplit, transform: EvalTransform, shards: Shards, number: int) -> int:
    """Decode the images of a shard, unless another process does."""
    shards.write(number, lambda row: transform(images.pil(row)).numpy().tobytes(), LOCKS)
    return number


def _decoded_once(
    images: ImageSplit, transform: EvalTransform, batches: Sequence[Tensor], workers: int, folder: Path
) -> Iterator[Tensor]:
    """The batches from shards; missing ones are made in the order in which they are needed, damaged ones anew."""
    key = digest_of({"images": images.digest, "transform": transform.key})
    shards = Shards(folder / key, len(images))
    numbers = dict.fromkeys((torch.cat(list(batches)) // SHARD).tolist())
    missing = [number for number in numbers if not shards.path(number).exists()]
    make = partial(_make_shard, images, transform, shards)
    made, waiting = prefetch(make, missing, workers if missing else 0), set(missing)

    def pixels(row: int) -> NDArray[np.uint8]:
        number = row // SHARD
        while number in waiting:
            waiting.remove(next(made))
        try:
            content = shards.read(row)
        except ValueError as error:
            print(f"decoded images {shards.path(number)} are damaged ({error}): decoding them anew", flush=True)
            shards.delete(number)
            make(number)
            content = shards.read(row)
        return np.frombuffer(content, np.uint8).reshape(3, transform.size, transform.size)

    for rows in batches:
        yield torch.from_numpy(np.stack([pixels(row) for row in rows.tolist()]))


def eval_batches(
    images: ImageSplit,
    transform: EvalTransform,
    *,
    batch: int,
    rows: Tensor | None = None,
    workers: int = 0,
    decoded: Path | None = None,
) -> Iterator[Tensor]:
    """(b, 3, size, size) uint8 batches in order, of `batch` images but for the last; none of no images.

    Args:
        images: in files or in memory. Images that the transform keeps as they are are given as they are stored.
        rows: (N,) int64, which of them; all where None.
        workers: processes that decode before batches are asked for; 0 decodes here. The batches do not depend on it.
        decoded: a folder that keeps transformed images, so that they are decoded once, by whichever process is first;
            the bytes are those of a fresh decoding. Only shards with one of `rows` are made.
    """
    rows = torch.arange(len(images)) if rows is None else rows
    if len(rows) == 0:
        return
    batches = rows.split(batch)
    if isinstance(images.stored, Pixels) and transform.keeps(images.images):
        yield from (images.images[each] for each in batches)
    elif decoded is None:
        yield from prefetch(partial(_batch, images, transform), batches, workers)
    else:
        yield from _decoded_once(images, transform, batches, workers, decoded)
