"""Write smaller copies of the training photographs, once:  python -m tasks.resized experiment=NAME compute.resized=256

A random crop of 224 pixels does not need a photograph of 500 x 375: most of the time of a training batch is decoding
pixels that are thrown away. Copies with a shorter side of `compute.resized` pixels are JPEG files of quality
`compute.resized_quality` in a few large files below `compute.resized_to`, which are read in place.

Training makes copies that are missing by itself. This command makes them before, without a GPU: start it as often as
there are machines (as a SLURM array, for example), and they share the work. Killed, it goes on where it stopped.

Examples:
  python -m tasks.resized experiment=table3_clip_b32 compute.resized=256 compute.loader_workers=8
"""

import io
import sys
from dataclasses import dataclass
from functools import partial

from PIL import Image
from rich.progress import track

from configs.cli import entry_point
from configs.errors import UserError
from configs.schema import Experiment
from configs.training import Compute
from soups.files.atomic import digest_of, write_json
from store.shards import SHARD, Shards
from tasks.load import load_split
from tasks.prefetch import prefetch
from tasks.split import ImageSplit, Pictures, Pixels

INDEX = "index.json"
LOCKS = "type compute.resized_to=FOLDER of a file system with locks"


@dataclass(frozen=True)
class Copies:
    """Smaller copies of a split's images."""

    shards: Shards

    def content(self, index: int) -> bytes:
        """The JPEG bytes of a copy; a `UserError` where its file is missing or damaged."""
        try:
            return self.shards.read(index).to_pybytes()
        except ValueError as error:
            path = self.shards.path(index // SHARD)
            raise UserError(
                f"{path} is damaged ({error}): delete it and {path.parent / INDEX}, and run the same again, which "
                "makes it anew"
            ) from None

    def pil(self, index: int) -> Image.Image:
        """A copy, RGB."""
        return Image.open(io.BytesIO(self.content(index))).convert("RGB")


def smaller(image: Image.Image, side: int, quality: int) -> bytes:
    """An RGB image as a JPEG file whose shorter side has at most `side` pixels (bicubic, antialiased)."""
    shorter = min(image.size)
    if shorter > side:
        width, height = (round(length * side / shorter) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _make_shard(images: ImageSplit, shards: Shards, compute: Compute, number: int, *, wait: bool = False) -> None:
    side, quality = compute.resized, compute.resized_quality
    assert side is not None  # since copies are wanted
    shards.write(number, lambda row: smaller(images.pil(row), side, quality), LOCKS, wait=wait)


def with_copies(images: ImageSplit, compute: Compute) -> Pictures:
    """Smaller copies of a split's photographs, made where they are missing; its own images where none are wanted.

    Any number of processes may call it at once: each file is written by one of them, and all wait for the last.

    Raises:
        UserError: images in memory, an image that cannot be decoded, or a full disk.
    """
    if compute.resized is None:
        return images.stored
    if isinstance(images.stored, Pixels):
        raise UserError(
            f"compute.resized={compute.resized}: the images of {images.name} are in memory, and have no copies: type "
            "compute.resized=null"
        )
    settings = {"images": images.digest, "side": compute.resized, "quality": compute.resized_quality, "shard": SHARD}
    shards = Shards(compute.resized_to / digest_of(settings)[:16], len(images))
    if not (shards.folder / INDEX).exists():
        numbers = [number for number in range(-(-shards.n // SHARD)) if not shards.path(number).exists()]
        make = partial(_make_shard, images, shards, compute)
        print(f"copying {len(images):,} images of {images.name} to {shards.folder}", flush=True)
        made = prefetch(make, numbers, min(compute.loader_workers, len(numbers)))
        for _ in track(made, "files", len(numbers), disable=not sys.stdout.isatty()):
            pass
        for number in numbers:  # which another process may still be writing
            make(number, wait=True)
        write_json(shards.folder / INDEX, settings | {"n": len(images)})
    return Copies(shards)


def resize(config: Experiment) -> None:
    """Make the copies of an experiment's training images."""
    if config.compute.resized is None:
        raise UserError("no size is named: type compute.resized=256 for copies with a shorter side of 256 pixels")
    images = load_split(config.task, config.task.train)
    assert isinstance(images, ImageSplit)  # compute.resized is refused for texts
    copies = with_copies(images, config.compute)
    assert isinstance(copies, Copies)
    folder = copies.shards.folder
    size = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    print(f"{len(images):,} copies in {folder}, {size / 1e9:,.2f} GB. Next: python -m finetune with the same settings")


if __name__ == "__main__":
    entry_point(resize)()
