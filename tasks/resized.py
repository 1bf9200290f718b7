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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch import Tensor

from configs.cli import entry_point
from configs.errors import UserError
from configs.schema import Experiment
from configs.training import Compute
from soups.files.atomic import digest_of, replacing, write_json
from store.runs import lock
from tasks.load import load_split
from tasks.prefetch import prefetch
from tasks.split import ImageSplit, Pixels

SHARD = 4096  # images in a file: about 120 MB of copies with a shorter side of 256
GROUP = 256  # images that are in memory together while a file is written
SCHEMA = pa.schema([("jpeg", pa.binary()), ("digest", pa.uint64())])
INDEX = "index.json"


@dataclass(frozen=True, eq=False)
class Copies:
    """Smaller copies of N images, in Arrow files that are mapped into memory."""

    folder: Path
    rows: NDArray[np.int64]  # (N,) places in the files

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each copy."""
        return np.array([len(self.content(index)) for index in range(len(self.rows))], dtype=np.int64)

    def content(self, index: int, last: int | None = None) -> bytes:
        """The JPEG bytes of a copy.

        Raises:
            UserError: its file is missing or damaged.
        """
        number, place = divmod(int(self.rows[index]), SHARD)
        path = shard_path(self.folder, number)
        try:
            batch = _opened(path)[place // GROUP]
            content = batch.column(0)[place % GROUP].as_buffer().to_pybytes()
            whole = xxhash.xxh3_64_intdigest(content) == batch.column(1)[place % GROUP].as_py()
        except (OSError, pa.ArrowException, IndexError) as error:
            raise UserError(f"{path} cannot be read ({error}): {_REMEDY.format(path.parent / INDEX)}") from None
        if not whole:
            raise UserError(f"{path} is damaged: {_REMEDY.format(path.parent / INDEX)}")
        return content if last is None else content[-last:]

    def called(self, index: int) -> str:
        """The place of a copy, for messages."""
        return f"copy {self.rows[index]} in {self.folder}"

    def pil(self, index: int) -> Image.Image:
        """A copy, RGB; raises as `content`."""
        return Image.open(io.BytesIO(self.content(index))).convert("RGB")

    def of(self, rows: Tensor) -> "Copies":
        """Only the images `rows`, in this order."""
        return replace(self, rows=self.rows[rows.numpy()])


_REMEDY = "delete it and {}, and run the same again, which makes it anew"


def shard_path(folder: Path, number: int) -> Path:
    """The file with the images SHARD * number, SHARD * number + 1, ..."""
    return folder / f"{number:05d}.arrow"


@cache
def _opened(path: Path) -> list[pa.RecordBatch]:
    """Batches of GROUP images in a file; a copy's bytes are read when they are asked for."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def smaller(image: Image.Image, side: int, quality: int) -> bytes:
    """An RGB image as a JPEG file whose shorter side has at most `side` pixels (bicubic, antialiased)."""
    shorter = min(image.size)
    if shorter > side:
        width, height = (round(length * side / shorter) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _groups(images: ImageSplit, number: int, side: int, quality: int) -> Iterator[pa.RecordBatch]:
    """The copies in a file, so many at a time."""
    rows = range(number * SHARD, min((number + 1) * SHARD, len(images)))
    for first in range(rows.start, rows.stop, GROUP):
        copies = [smaller(images.pil(row), side, quality) for row in range(first, min(first + GROUP, rows.stop))]
        digests = [xxhash.xxh3_64_intdigest(copy) for copy in copies]
        yield pa.record_batch([pa.array(copies, pa.binary()), pa.array(digests, pa.uint64())], schema=SCHEMA)


def _make_shard(images: ImageSplit, folder: Path, side: int, quality: int, number: int, *, wait: bool = False) -> None:
    """Write a file that is missing, unless another process is writing it and nobody waits for that."""
    path = shard_path(folder, number)
    if path.exists():
        return
    with path.with_suffix(".lock").open("a") as held:
        if not lock(held, "type compute.resized_to=FOLDER of a file system with locks", wait=wait):
            return
        if not path.exists():
            with replacing(path) as temporary, pa.ipc.new_file(str(temporary), SCHEMA) as writer:
                for group in _groups(images, number, side, quality):
                    writer.write_batch(group)
        path.with_suffix(".lock").unlink(missing_ok=True)  # whoever waits for it looks for the file first


def with_copies(images: ImageSplit, compute: Compute) -> ImageSplit:
    """The split with smaller copies in place of its photographs, made where they are missing; itself where none are
    wanted.

    Any number of processes may call it at once: each file is written by one of them, and all wait for the last.

    Args:
        images: in files or tables, with the digest by which their copies are found again.
        compute: with `resized`, the pixels of the copies' shorter side, and `loader_workers` that make them.

    Raises:
        UserError: images in memory, an image that cannot be decoded, or a full disk.
    """
    if compute.resized is None:
        return images
    if isinstance(images.stored, Pixels):
        raise UserError(
            f"compute.resized={compute.resized}: the images of {images.name} are in memory, and have no copies: type "
            "compute.resized=null"
        )
    settings = {"images": images.digest, "side": compute.resized, "quality": compute.resized_quality, "shard": SHARD}
    folder = compute.resized_to / digest_of(settings)[:16]
    if not (folder / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [n for n in range(-(-len(images) // SHARD)) if not shard_path(folder, n).exists()]
        make = partial(_make_shard, images, folder, compute.resized, compute.resized_quality)
        print(f"copying {len(images):,} images of {images.name} to {folder}", flush=True)
        made = prefetch(make, numbers, min(compute.loader_workers, len(numbers)))
        for _ in track(made, "files", len(numbers), disable=not sys.stdout.isatty()):
            pass
        for number in numbers:  # which another process may still be writing
            make(number, wait=True)
        write_json(folder / INDEX, settings | {"n": len(images)})
    return replace(images, stored=Copies(folder, np.arange(len(images))))


def resize(config: Experiment) -> None:
    """Make the copies of an experiment's training images.

    Raises:
        UserError: compute.resized is not set; or as `with_copies`.
    """
    if config.compute.resized is None:
        raise UserError("no size is named: type compute.resized=256 for copies with a shorter side of 256 pixels")
    images = load_split(config.task, config.task.train)
    assert isinstance(images, ImageSplit)  # compute.resized is refused for texts
    copies = with_copies(images, config.compute).stored
    assert isinstance(copies, Copies)
    size = sum(path.stat().st_size for path in copies.folder.glob("*.arrow"))
    print(
        f"{len(images):,} copies in {copies.folder}, {size / 1e9:,.2f} GB. Next: python -m finetune with the same "
        "settings"
    )


if __name__ == "__main__":
    entry_point(resize)()
