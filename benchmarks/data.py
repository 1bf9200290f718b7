"""Loading photographs, ours beside torchvision and timm:  python -m benchmarks.data [--images 256] [--rounds 3]

JPEG files of ImageNet's mean size (500 x 375 pixels, 110 kB) are made in a temporary folder, <class>/<image>, and so
are in the page cache; copies with a shorter side of 256 are made of them (compute.resized=256).
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

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_transform
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import decode_image
from torchvision.transforms import v2

from benchmarks.run import Options, benchmark, folder_task, in_turns, middle, ratio, save_photographs
from configs.schema import Experiment, load
from configs.training import Augment
from finetune.data import TrainingBatches
from finetune.length import Length
from finetune.train import ONE_PROCESS
from store.workers import use_threads
from tasks.eval_images import EvalTransform, eval_batches
from tasks.files import Files
from tasks.image_folder import load_split
from tasks.prefetch import prefetch
from tasks.resized import with_copies
from tasks.split import ImageSplit, Pictures

CLASSES = 4
SIZE, RESIZE = 224, 256  # pixels
JITTER, OPERATIONS, MAGNITUDE = 0.4, 2, 15
BATCH = 32  # images
WORKERS = (0, 1, 2)
BICUBIC = transforms.InterpolationMode.BICUBIC
REFERENCE = "torchvision"
Load = Callable[[int], Iterable[Tensor]]  # number of workers -> all images
Way = tuple[str, str, int]  # contender, transform, number of workers


def make_folder(root: Path, images: int, width: int, height: int) -> ImageSplit:
    """The training images of a folder that is made."""
    save_photographs(root / "train", images, CLASSES, width, height)
    return load_split(folder_task(root, CLASSES), "train")


def theirs(dataset: Any, collate: Callable[..., Any] | None = None) -> Load:
    """All images of a data set by DataLoader, in a random order."""

    def load_all(workers: int) -> Iterable[Tensor]:
        # As timm's and torchvision's scripts have it; worker processes start as the platform has it.
        loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, collate_fn=collate)
        return (images for images, _ in loader)

    return load_all


def steps_of(transform: str, library: Any) -> list[Any]:
    """The random transforms of torchvision's first (`transforms`) or second (`v2`) version."""
    if transform == "minimal":
        return [library.RandomResizedCrop(SIZE, (0.9, 1.0), (1.0, 1.0), interpolation=BICUBIC, antialias=True)]
    steps = [library.RandomResizedCrop(SIZE, interpolation=BICUBIC, antialias=True), library.RandomHorizontalFlip()]
    if transform == "medium":
        return [*steps, library.ColorJitter(JITTER, JITTER, JITTER)]
    return [*steps, library.RandAugment(OPERATIONS, MAGNITUDE)]


def timm_steps(transform: str) -> Any:
    """timm's random transforms; `use_prefetcher` leaves uint8 arrays, here as for a GPU."""
    crop: dict[str, Any] = {"scale": (0.9, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0} if transform == "minimal" else {}
    jitter = JITTER if transform == "medium" else None
    policy = f"rand-m{MAGNITUDE}-n{OPERATIONS}" if transform == "rand" else None
    crop |= {"color_jitter": jitter, "auto_augment": policy, "interpolation": "bicubic"}
    return create_transform(SIZE, is_training=True, use_prefetcher=True, **crop)


AUGMENT = {
    "minimal": {"kind": "minimal"},
    "medium": {"kind": "medium", "flip": 0.5, "color_jitter": JITTER},
    "rand": {"kind": "rand", "flip": 0.5, "layers": OPERATIONS, "magnitude": MAGNITUDE},
}


def ours_train(config: Experiment, images: Pictures, n: int, workers: int) -> Iterable[Tensor]:
    """What `finetune.train` iterates over; every one of n images is seeded by what it is, besides."""
    steps = n // BATCH
    batches = TrainingBatches(images, config, Length(n, BATCH, steps, steps), 0, ONE_PROCESS)
    return prefetch(batches.__getitem__, range(steps), workers)


def ours_fixed(images: ImageSplit, decoded: Path | None, workers: int) -> Iterable[Tensor]:
    """What `eval.forward` iterates over, but for a last incomplete batch, which the others drop."""
    rows = torch.arange(len(images) // BATCH * BATCH)
    transform = EvalTransform(SIZE, RESIZE, squash=False)
    return eval_batches(images, transform, batch=BATCH, rows=rows, workers=workers, decoded=decoded)


def ways(images: ImageSplit, folder: Path) -> dict[tuple[str, str], Load]:
    """(name, transform) -> what loads all images; copies and decoded images are made in a folder."""
    assert isinstance(images.stored, Files)
    root, n, found = images.stored.root, len(images), {}
    config = load("table3_clip_b32")  # its network sees images of SIZE
    small = replace(config.compute, resized=RESIZE, resized_to=folder, loader_workers=0)
    copies, pixels = with_copies(images, small), partial(decode_image, mode="RGB")

    def ours(transform: str, decoder: str, pictures: Pictures) -> Load:
        compute = replace(config.compute, decoder=decoder)
        own = replace(config, augment=Augment(**AUGMENT[transform]), compute=compute)
        return partial(ours_train, own, pictures, n)

    for transform in AUGMENT:
        steps = transforms.Compose([*steps_of(transform, transforms), transforms.PILToTensor()])
        found[REFERENCE, transform] = theirs(ImageFolder(root, steps))
        found["decode_jpeg", transform] = theirs(ImageFolder(root, v2.Compose(steps_of(transform, v2)), loader=pixels))
        found["timm", transform] = theirs(ImageDataset(str(root), transform=timm_steps(transform)), fast_collate)
        found["ours", transform] = ours(transform, "pillow", images.stored)
        found["ours_simplejpeg", transform] = ours(transform, "simplejpeg", images.stored)
        found["ours_copies", transform] = ours(transform, "pillow", copies)
        found["ours_copies_fast", transform] = ours(transform, "simplejpeg", copies)
    steps = [transforms.Resize(RESIZE, BICUBIC), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
    found[REFERENCE, "fixed"] = theirs(ImageFolder(root, transforms.Compose(steps)))
    found["ours", "fixed"] = partial(ours_fixed, images, None)
    found["ours_decoded", "fixed"] = partial(ours_fixed, images, folder / "decoded")
    return found


def _rate(load_all: Load, workers: int) -> float:
    """Images per second, from the arrival of the first batch to that of the last; not until a worker has ended."""
    images, arrivals = 0, []
    for batch in load_all(workers):
        arrivals.append(time.perf_counter())
        images += len(batch)
    return images * (len(arrivals) - 1) / len(arrivals) / (arrivals[-1] - arrivals[0])


def table(found: dict[Way, list[float]], images: ImageSplit) -> list[dict[str, Any]]:
    """A row for each way: medians of images per second over rounds, and ratios within rounds."""
    return [
        {
            "contender": name,
            "transform": transform,
            "workers": workers,
            "images": len(images),
            "bytes_per_image": round(images.stored.sizes.mean()),
            "batch_size": BATCH,
            **middle("images_per_second", rates, 1),
            "images_per_second_and_core": round(statistics.median(rates) / max(1, workers), 1),
            "times_torchvision": ratio(rates, found[REFERENCE, transform, workers], 3),
        }
        for (name, transform, workers), rates in found.items()
    ]


def measured(options: Options) -> list[dict[str, Any]]:
    """The table of all contenders."""
    use_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = make_folder(Path(folder), options.images, options.width, options.height)
        loads = ways(images, Path(folder) / "copies")
        for _ in loads["ours_decoded", "fixed"](0):  # fills the folder
            pass
        calls: dict[Way, Callable[[], float]] = {}
        for (name, transform), load_all in loads.items():
            # Decoded images are read in this process, however many decode.
            for workers in (0,) if name == "ours_decoded" else WORKERS:
                calls[name, transform, workers] = partial(_rate, load_all, workers)
        return table(in_turns(calls, options.rounds), images)


if __name__ == "__main__":
    speeds = ["images_per_second", "images_per_second_min", "images_per_second_max", "times_torchvision"]
    benchmark(
        measured,
        shown=["contender", "transform", "workers", *speeds],
        packages=["torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg"],
        images=(256, "files; several batches of 32, since one is not timed"),
        width=(500, "pixels; less is for trials"),
        height=375,
        rounds=3,
    )
