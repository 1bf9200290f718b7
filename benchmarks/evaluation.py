"""Evaluating K models on one split:  python -m benchmarks.evaluation [--models 8] [--images 512] [--rounds 3]

K small networks of timm look at the same generated JPEGs of 500 x 375 pixels. Ours decodes each image once and keeps it
as uint8 (compute.decoded); the other makes a pass of torchvision's ImageFolder and PyTorch's DataLoader for each model,
as an evaluation script does. Both end with the same logits, up to rounding. They take turns in every round; medians are
compared. `floor` is the forward passes alone.

Writes results/measured/bench_evaluation.csv, or the file named by --out.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.run import Options, benchmark, folder_task, in_turns, save_photographs, timed
from configs.training import Model
from eval.forward import forward
from models.classifier import Classifier
from store.workers import use_threads
from tasks.eval_images import eval_batches, eval_transform
from tasks.load import load_split

NETWORK = "mobilenetv3_small_050"
CLASSES, BATCH = 10, 64
HALF = (0.5, 0.5, 0.5)


def _networks(count: int) -> list[Classifier]:
    found = []
    for i in range(count):
        torch.manual_seed(i)
        tower = timm.create_model(NETWORK, num_classes=0)
        found.append(Classifier(tower, 1024, CLASSES, torch.tensor(HALF), torch.tensor(HALF)).eval())
    return found


def _ours(models: list[Classifier], folder: Path) -> list[Tensor]:
    transform = eval_transform(
        Model(kind="timm", name=NETWORK, image_size=224, normalize=False, head="random", probe_c=(1.0,))
    )
    split = load_split(folder_task(folder, CLASSES), "test")
    cache = Path(tempfile.mkdtemp(dir=folder))
    return [forward(model, eval_batches(split, transform, batch=BATCH, decoded=cache)) for model in models]


@torch.no_grad()
def _one_pass_each(models: list[Classifier], folder: Path) -> list[Tensor]:
    steps = [transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    images = ImageFolder(str(folder / "test"), transforms.Compose([*steps, transforms.PILToTensor()]))
    return [torch.cat([model(batch) for batch, _ in DataLoader(images, BATCH)]) for model in models]


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each contender: median seconds and the ratio to ours."""
    use_threads(1)
    models = _networks(options.models)
    ready = torch.randint(0, 256, (options.images, 3, 224, 224), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, images in (("train", CLASSES), ("test", options.images)):
            save_photographs(folder / split, images, CLASSES)
        contenders = {
            "ours": partial(_ours, models, folder),
            "a pass each": partial(_one_pass_each, models, folder),
            "floor": lambda: [forward(model, ready.split(BATCH)) for model in models],
        }
        calls = in_turns({each: partial(timed, contender) for each, contender in contenders.items()}, options.rounds)
    for mine, theirs in zip(calls["ours"], calls["a pass each"], strict=True):
        torch.testing.assert_close(mine.answer, theirs.answer, atol=1e-3, rtol=1e-3)
    seconds = {each: statistics.median(call.seconds for call in made) for each, made in calls.items()}
    return [
        {"contender": each, "seconds": round(took, 2), "times_ours": round(took / seconds["ours"], 2)}
        for each, took in seconds.items()
    ]


if __name__ == "__main__":
    shown = ["contender", "models", "images", "rounds", "seconds", "times_ours"]
    packages = ["torch", "torchvision", "timm"]
    benchmark(measured, shown=shown, packages=packages, models=8, images=512, rounds=3)
