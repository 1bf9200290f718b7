"""Evaluating K models on one split:  python -m benchmarks.evaluation [--models 8] [--images 512] [--rounds 3]

K small networks of timm look at the same generated JPEGs of 500 x 375 pixels. Ours decodes each image once and keeps it
as uint8 (compute.decoded); the other makes a pass of torchvision's ImageFolder and PyTorch's DataLoader for each model,
as an evaluation script does. Both end with the same logits, up to rounding. They take turns in every round; medians are
compared. `floor` is the forward passes alone.

Writes results/measured/bench_evaluation.csv, or the file named by --out.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from configs.data import ImageFolder as FolderTask
from configs.training import Model
from eval.forward import forward
from models.classifier import Classifier
from soups.errors import one_line_errors
from soups.files.atomic import replacing
from store.provenance import provenance_columns
from store.workers import use_threads
from tasks.eval_images import eval_batches, eval_transform
from tasks.load import load_split

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "mobilenetv3_small_050"
CLASSES, BATCH = 10, 64
HALF = (0.5, 0.5, 0.5)


def make_images(folder: Path, images: int) -> None:
    """JPEGs about as large and as detailed as ImageNet's, spread over ten classes of two splits."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(images if split == "test" else CLASSES):
            coarse = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
            noisy = (smooth + generator.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
            path = folder / split / str(i % CLASSES) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy).save(path, quality=90)


def networks(count: int) -> list[Classifier]:
    """Small classifiers with random weights."""
    found = []
    for i in range(count):
        torch.manual_seed(i)
        tower = timm.create_model(NETWORK, num_classes=0)
        found.append(Classifier(tower, 1024, CLASSES, torch.tensor(HALF), torch.tensor(HALF)).eval())
    return found


def ours(models: list[Classifier], folder: Path, cache: Path) -> list[Tensor]:
    """Logits of all models, each image decoded once."""
    task = FolderTask(
        kind="image_folder",
        folder=folder,
        num_classes=CLASSES,
        train="train",
        held_out="held_out",
        test="test",
        shifts=(),
    )
    transform = eval_transform(
        Model(kind="timm", name=NETWORK, image_size=224, normalize=False, head="random", probe_c=(1.0,))
    )
    split = load_split(task, "test")
    return [forward(model, eval_batches(split, transform, batch=BATCH, decoded=cache)) for model in models]


@torch.no_grad()
def one_pass_each(models: list[nn.Module], folder: Path) -> list[Tensor]:
    """Logits of all models, each with a loader of its own."""
    steps = [transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    images = ImageFolder(str(folder / "test"), transforms.Compose([*steps, transforms.PILToTensor()]))
    return [torch.cat([model(batch) for batch, _ in DataLoader(images, BATCH)]) for model in models]


def measure(count: int, images: int, rounds: int) -> pd.DataFrame:
    """One row a contender: median seconds and the ratio to ours."""
    seconds: dict[str, list[float]] = {"ours": [], "a pass each": [], "floor": []}
    models = networks(count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, images)
        ready = torch.randint(0, 256, (images, 3, 224, 224), dtype=torch.uint8)
        for number in range(rounds):
            started = time.perf_counter()
            mine = ours(models, folder, folder / f"decoded {number}")
            seconds["ours"].append(time.perf_counter() - started)
            started = time.perf_counter()
            theirs = one_pass_each(list(models), folder)
            seconds["a pass each"].append(time.perf_counter() - started)
            started = time.perf_counter()
            for model in models:
                forward(model, ready.split(BATCH))
            seconds["floor"].append(time.perf_counter() - started)
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return pd.DataFrame(
        {
            "contender": name,
            "models": count,
            "images": images,
            "rounds": rounds,
            "seconds": round(median, 2),
            "times_ours": round(median / medians["ours"], 2),
            **provenance_columns("torch", "torchvision", "timm"),
        }
        for name, median in medians.items()
    )


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_evaluation.csv")
    arguments = parser.parse_args()
    use_threads(1)
    table = measure(arguments.models, arguments.images, arguments.rounds)
    with replacing(arguments.out) as temporary:
        table.to_csv(temporary, index=False)
    print(table.loc[:, :"times_ours"].to_string(index=False))
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
