"""Loading photographs, ours beside torchvision and timm:  python -m benchmarks.data [--images 512] [--rounds 5]

JPEGs of ImageNet's mean size (500 x 375 pixels, 110 kB) are generated in a temporary folder, <class>/<image>, and read
once, so that they are in the page cache. Every contender decodes, transforms and collates them to uint8 batches
(B, 3, 224, 224); making floats and normalising is left to the network everywhere. Each has one core: with 0 workers
it works in this process, with 1 in another one. Time runs from the first batch to the last, so that a worker's start
and end are not counted. Contenders take turns in every round; the ratio is to torchvision in the same round, with the
same transform and number of workers.

train: a random crop of 8 % to 100 % of the image, 3/4 to 4/3 wide to high, resized to 224 (bicubic), then a flip.
  torchvision   ImageFolder, RandomResizedCrop, RandomHorizontalFlip, PILToTensor, DataLoader
  timm          ImageDataset, create_transform without colour jitter, fast_collate, DataLoader: what timm's own
                create_loader puts together, but for its prefetcher, which is for GPUs
  ours          ImageSplit, TrainingBatches with augment.kind=rand and no operations (timm's crop with the bicubic
                filter and torchvision's flip, as timm has it; kind=medium would draw the filter), made_ahead;
                besides, every image is seeded by what it is
fixed: the shorter side to 256 (bicubic), the centre crop of 224; for one core, so that the rows compare.
  torchvision   ImageFolder, Resize, CenterCrop, PILToTensor, DataLoader
  ours          fixed_batches, which decodes each time
  ours_decoded  fixed_batches with a folder of decoded images (compute.decoded), which was filled before

Writes results/measured/bench_data.csv, or the file named by --out.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from configs.data import ImageFolder as FolderTask
from configs.training import Augment
from finetune.data import TrainingBatches
from finetune.length import Length
from finetune.train import ALONE
from soups.errors import one_line_errors
from soups.files.atomic import replacing
from store.provenance import provenance_columns
from store.workers import use_threads
from tasks.ahead import made_ahead
from tasks.files import Files
from tasks.fixed import FixedTransform, fixed_batches
from tasks.image_folder import load_split
from tasks.split import ImageSplit

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 4
SIZE, RESIZE = 224, 256  # pixels
BATCH = 32  # images
BICUBIC = transforms.InterpolationMode.BICUBIC
REFERENCE = "torchvision"


@dataclass(frozen=True)
class Contender:
    """One way to load all images."""

    name: str
    transform: str  # train or fixed
    workers: int


def save_photograph(path: Path, width: int, height: int, number: int) -> None:
    """A JPEG with smooth colours and the grain of a camera, which makes 500 x 375 pixels about 110 kB."""
    chance = np.random.default_rng(number)
    colours = Image.fromarray(chance.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC))
    grain = chance.normal(0, 12, (height, width, 1))
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=95)


def make_folder(root: Path, images: int, width: int, height: int) -> ImageSplit:
    """Write the images to root/train and read each once."""
    for number in range(images):
        path = root / "train" / f"class_{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_photograph(path, width, height, number)
        path.read_bytes()
    task = FolderTask(
        kind="image_folder", folder=root, num_classes=CLASSES, train="train", held_out="val", test="test", shifts=()
    )
    return load_split(task, "train")


def theirs(dataset: Any, workers: int, collate: Callable[..., Any] | None = None) -> Iterable[Tensor]:
    """The images of a DataLoader's (images, labels), in a random order."""
    # As timm's and torchvision's scripts have it; worker processes start as the platform has it.
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, collate_fn=collate)
    return (images for images, _ in loader)


def _files(images: ImageSplit) -> Files:
    assert isinstance(images.stored, Files)
    return images.stored


def torchvision_train(images: ImageSplit, workers: int) -> Iterable[Tensor]:
    """Plain torchvision."""
    steps = [transforms.RandomResizedCrop(SIZE, interpolation=BICUBIC), transforms.RandomHorizontalFlip()]
    return theirs(ImageFolder(_files(images).root, transforms.Compose([*steps, transforms.PILToTensor()])), workers)


def timm_train(images: ImageSplit, workers: int) -> Iterable[Tensor]:
    """timm's data set, transform and collation."""
    # `use_prefetcher` leaves uint8 arrays, here as for a GPU.
    transform = create_transform(
        SIZE, is_training=True, color_jitter=None, interpolation="bicubic", use_prefetcher=True
    )
    return theirs(ImageDataset(str(_files(images).root), transform=transform), workers, fast_collate)


def ours_train(images: ImageSplit, workers: int) -> Iterable[Tensor]:
    """What `finetune.train` iterates over."""
    steps = len(images) // BATCH
    length = Length(len(images), BATCH, steps, steps)
    augment = Augment(kind="rand")  # type: ignore[call-arg]  # mypy sees no dataclass in `closed`
    return made_ahead(TrainingBatches(images, augment, SIZE, length, 0, ALONE), workers)


def torchvision_fixed(images: ImageSplit, workers: int) -> Iterable[Tensor]:
    """Plain torchvision."""
    steps = [transforms.Resize(RESIZE, BICUBIC), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
    return theirs(ImageFolder(_files(images).root, transforms.Compose(steps)), workers)


def ours_fixed(images: ImageSplit, workers: int, decoded: Path | None = None) -> Iterable[Tensor]:
    """What `eval.forward` iterates over, but for a last incomplete batch, which the others drop."""
    rows = torch.arange(len(images) // BATCH * BATCH)
    transform = FixedTransform(SIZE, RESIZE, squash=False)
    return fixed_batches(images, transform, batch=BATCH, rows=rows, workers=workers, decoded=decoded)


Load = Callable[[ImageSplit, int], Iterable[Tensor]]
WAYS: dict[tuple[str, str], Load] = {
    (REFERENCE, "train"): torchvision_train,
    ("timm", "train"): timm_train,
    ("ours", "train"): ours_train,
    (REFERENCE, "fixed"): torchvision_fixed,
    ("ours", "fixed"): ours_fixed,
}


def rate(batches: Iterable[Tensor]) -> float:
    """Images per second, from the arrival of the first batch to that of the last; not until a worker has ended."""
    images, arrivals = 0, []
    for batch in batches:
        arrivals.append(time.perf_counter())
        images += len(batch)
    return images * (len(arrivals) - 1) / len(arrivals) / (arrivals[-1] - arrivals[0])


def compare(images: ImageSplit, decoded: Path, rounds: int) -> dict[Contender, list[float]]:
    """Images per second of every contender in every round."""
    ways = {
        Contender(name, transform, workers): partial(load, images, workers)
        for (name, transform), load in WAYS.items()
        for workers in (0, 1)
    }
    # Decoded images are read in this process, however many decode.
    kept = partial(ours_fixed, images, 0, decoded)
    ways[Contender("ours_decoded", "fixed", 0)] = kept
    for _ in kept():  # fills the folder
        pass
    found: dict[Contender, list[float]] = {contender: [] for contender in ways}
    for _ in range(rounds):
        for contender, load in ways.items():
            found[contender].append(rate(load()))
    return found


def table(found: dict[Contender, list[float]], images: ImageSplit) -> pd.DataFrame:
    """A row for each contender: medians over rounds, and ratios within rounds."""
    paths = [_files(images).path(row) for row in range(len(images))]
    rows: list[dict[str, Any]] = []
    for contender, rates in found.items():
        reference = found[Contender(REFERENCE, contender.transform, contender.workers)]
        rows.append(
            {
                "contender": contender.name,
                "transform": contender.transform,
                "workers": contender.workers,
                "images": len(images),
                "bytes_per_image": round(statistics.mean(path.stat().st_size for path in paths)),
                "batch_size": BATCH,
                "rounds": len(rates),
                "images_per_second": round(statistics.median(rates), 1),
                "images_per_second_min": round(min(rates), 1),
                "images_per_second_max": round(max(rates), 1),
                "times_torchvision": round(statistics.median(a / b for a, b in zip(rates, reference, strict=True)), 3),
                **provenance_columns("torch", "torchvision", "timm", "numpy"),
                "pillow": version("pillow"),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="files; several batches of 32, since one is not timed")
    parser.add_argument("--width", type=int, default=500, help="pixels; less is for trials")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_data.csv")
    arguments = parser.parse_args()
    use_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = make_folder(Path(folder), arguments.images, arguments.width, arguments.height)
        found = table(compare(images, Path(folder) / "decoded", arguments.rounds), images)
    with replacing(arguments.out) as temporary:
        found.to_csv(temporary, index=False)
    shown = ["contender", "transform", "workers", "images_per_second", "images_per_second_min", "images_per_second_max"]
    print(found[[*shown, "times_torchvision"]].to_string())
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
