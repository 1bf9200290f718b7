"""Loading photographs, ours beside torchvision and timm:  python -m benchmarks.data [--images 256] [--rounds 3]

JPEG files of ImageNet's mean size (500 x 375 pixels, 110 kB) are made in a temporary folder, <class>/<image>, and read
once, so that they are in the page cache; copies with a shorter side of 256 are made of them (compute.resized=256).
Every contender decodes, transforms and collates images to uint8 batches (B, 3, 224, 224); making floats and
normalising is left to the network everywhere. With 0 workers it works in this process, on one core, with 1 or 2 in as
many others. Time runs from the first batch to the last, so that a worker's start and end are not counted. Contenders
take turns in every round; a ratio is to torchvision in the same round, with the same transform and workers.

Transforms:
  minimal  a random crop of 90 % to 100 % of the image, resized to 224 (bicubic)
  medium   a random crop of 8 % to 100 %, 3/4 to 4/3 wide to high, a flip and colour jitter (0.4)
  rand     the same crop, a flip and RandAugment with 2 operations of magnitude 15, within the random search's range
  fixed    the shorter side to 256 (bicubic), the centre crop of 224: evaluation
Contenders:
  torchvision          ImageFolder, which decodes with Pillow, torchvision's transforms, DataLoader
  decode_jpeg          the same with torchvision's own decoder, and its transforms of uint8 tensors
  timm                 ImageDataset, create_transform, fast_collate, DataLoader: timm's own create_loader without its
                       prefetcher, which is for GPUs
  ours                 TrainingBatches or eval_batches, which decode with Pillow
  ours_simplejpeg      compute.decoder=simplejpeg
  ours_copies          compute.resized=256
  ours_copies_fast     both
  ours_decoded         eval_batches with a folder of decoded images (compute.decoded), which was filled before

Writes results/measured/bench_data.csv, or the file named by --out.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from configs.data import ImageFolder as FolderTask
from configs.schema import load
from configs.training import Augment
from finetune.data import TrainingBatches
from finetune.length import Length
from finetune.train import ONE_PROCESS
from soups.errors import one_line_errors
from soups.files.atomic import replacing
from store.provenance import provenance_columns
from store.workers import use_threads
from tasks.eval_images import EvalTransform, eval_batches
from tasks.files import Files
from tasks.image_folder import load_split
from tasks.prefetch import prefetch
from tasks.resized import with_copies
from tasks.split import ImageSplit

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 4
SIZE, RESIZE = 224, 256  # pixels
JITTER, OPERATIONS, MAGNITUDE = 0.4, 2, 15
BATCH = 32  # images
WORKERS = (0, 1, 2)
BICUBIC = transforms.InterpolationMode.BICUBIC
REFERENCE = "torchvision"


@dataclass(frozen=True)
class Contender:
    """One way to load all images."""

    name: str
    transform: str  # minimal, medium, rand or fixed
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


def steps_of(transform: str, library: Any) -> list[Any]:
    """The random transforms of torchvision's first (`transforms`) or second (`v2`) version."""
    if transform == "minimal":
        return [library.RandomResizedCrop(SIZE, (0.9, 1.0), (1.0, 1.0), interpolation=BICUBIC, antialias=True)]
    steps = [library.RandomResizedCrop(SIZE, interpolation=BICUBIC, antialias=True), library.RandomHorizontalFlip()]
    if transform == "medium":
        return [*steps, library.ColorJitter(JITTER, JITTER, JITTER)]
    return [*steps, library.RandAugment(OPERATIONS, MAGNITUDE)]


def torchvision_train(transform: str, images: ImageSplit, workers: int) -> Iterable[Tensor]:
    """Plain torchvision."""
    steps = transforms.Compose([*steps_of(transform, transforms), transforms.PILToTensor()])
    return theirs(ImageFolder(_files(images).root, steps), workers)


def pixels_of_file(path: str) -> Tensor:
    """(3, H, W) uint8, by torchvision's decoder."""
    return decode_jpeg(torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8), ImageReadMode.RGB)


def decode_jpeg_train(transform: str, images: ImageSplit, workers: int) -> Iterable[Tensor]:
    """torchvision without Pillow."""
    return theirs(ImageFolder(_files(images).root, v2.Compose(steps_of(transform, v2)), loader=pixels_of_file), workers)


def timm_train(transform: str, images: ImageSplit, workers: int) -> Iterable[Tensor]:
    """timm's data set, transform and collation."""
    crop: dict[str, Any] = {"scale": (0.9, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0} if transform == "minimal" else {}
    jitter = JITTER if transform == "medium" else None
    policy = f"rand-m{MAGNITUDE}-n{OPERATIONS}" if transform == "rand" else None
    # `use_prefetcher` leaves uint8 arrays, here as for a GPU.
    made = create_transform(
        SIZE,
        is_training=True,
        color_jitter=jitter,
        auto_augment=policy,
        interpolation="bicubic",
        use_prefetcher=True,
        **crop,
    )
    return theirs(ImageDataset(str(_files(images).root), transform=made), workers, fast_collate)


AUGMENT = {
    "minimal": {"kind": "minimal"},
    "medium": {"kind": "medium", "flip": 0.5, "color_jitter": JITTER},
    "rand": {"kind": "rand", "flip": 0.5, "layers": OPERATIONS, "magnitude": MAGNITUDE},
}


def ours_train(transform: str, images: ImageSplit, workers: int, decoder: str = "pillow") -> Iterable[Tensor]:
    """What `finetune.train` iterates over; every image is seeded by what it is, besides."""
    steps = len(images) // BATCH
    length = Length(len(images), BATCH, steps, steps)
    augment = Augment(**AUGMENT[transform])  # type: ignore[arg-type, call-arg]  # mypy sees no dataclass in `closed`
    batches = TrainingBatches(images, augment, SIZE, length, 0, ONE_PROCESS, decoder=decoder)
    return prefetch(batches, workers)


def torchvision_fixed(images: ImageSplit, workers: int) -> Iterable[Tensor]:
    """Plain torchvision."""
    steps = [transforms.Resize(RESIZE, BICUBIC), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
    return theirs(ImageFolder(_files(images).root, transforms.Compose(steps)), workers)


def ours_fixed(images: ImageSplit, workers: int, decoded: Path | None = None) -> Iterable[Tensor]:
    """What `eval.forward` iterates over, but for a last incomplete batch, which the others drop."""
    rows = torch.arange(len(images) // BATCH * BATCH)
    transform = EvalTransform(SIZE, RESIZE, squash=False)
    return eval_batches(images, transform, batch=BATCH, rows=rows, workers=workers, decoded=decoded)


Load = Callable[[int], Iterable[Tensor]]  # of a number of workers


def ways(images: ImageSplit, folder: Path) -> dict[tuple[str, str], Load]:
    """(name, transform) -> what loads all images; copies and decoded images are made in a folder."""
    small = replace(load("table3_clip_b32").compute, resized=RESIZE, resized_to=folder, loader_workers=0)
    copies = with_copies(images, small)
    found: dict[tuple[str, str], Load] = {}
    for transform in AUGMENT:
        for name, load_all in (
            (REFERENCE, torchvision_train),
            ("decode_jpeg", decode_jpeg_train),
            ("timm", timm_train),
        ):
            found[name, transform] = partial(load_all, transform, images)
        for name, split in (("ours", images), ("ours_copies", copies)):
            found[name, transform] = partial(ours_train, transform, split)
            fast = "ours_simplejpeg" if split is images else "ours_copies_fast"
            found[fast, transform] = partial(ours_train, transform, split, decoder="simplejpeg")
    found[REFERENCE, "fixed"] = partial(torchvision_fixed, images)
    found["ours", "fixed"] = partial(ours_fixed, images)
    found["ours_decoded", "fixed"] = partial(ours_fixed, images, decoded=folder / "decoded")
    return found


def rate(batches: Iterable[Tensor]) -> float:
    """Images per second, from the arrival of the first batch to that of the last; not until a worker has ended."""
    images, arrivals = 0, []
    for batch in batches:
        arrivals.append(time.perf_counter())
        images += len(batch)
    return images * (len(arrivals) - 1) / len(arrivals) / (arrivals[-1] - arrivals[0])


def compare(images: ImageSplit, folder: Path, rounds: int) -> dict[Contender, list[float]]:
    """Images per second of every contender in every round."""
    loads = ways(images, folder)
    for _ in loads["ours_decoded", "fixed"](0):  # fills the folder
        pass
    found: dict[Contender, list[float]] = {
        Contender(name, transform, workers): []
        for name, transform in loads
        # Decoded images are read in this process, however many decode.
        for workers in ((0,) if name == "ours_decoded" else WORKERS)
    }
    for _ in range(rounds):
        for contender, rates in found.items():
            rates.append(rate(loads[contender.name, contender.transform](contender.workers)))
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
                "images_per_second_and_core": round(statistics.median(rates) / max(1, contender.workers), 1),
                "times_torchvision": round(statistics.median(a / b for a, b in zip(rates, reference, strict=True)), 3),
                **provenance_columns("torch", "torchvision", "timm", "numpy"),
                "pillow": version("pillow"),
                "simplejpeg": version("simplejpeg"),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="files; several batches of 32, since one is not timed")
    parser.add_argument("--width", type=int, default=500, help="pixels; less is for trials")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_data.csv")
    arguments = parser.parse_args()
    use_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = make_folder(Path(folder), arguments.images, arguments.width, arguments.height)
        found = table(compare(images, Path(folder) / "copies", arguments.rounds), images)
    with replacing(arguments.out) as temporary:
        found.to_csv(temporary, index=False)
    shown = ["contender", "transform", "workers", "images_per_second", "images_per_second_min", "images_per_second_max"]
    print(found[[*shown, "times_torchvision"]].to_string())
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
