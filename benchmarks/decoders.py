"""Whether models are as good when images are read faster:  python -m benchmarks.decoders [--classes 100] [--seeds 5]

The drawings of the embedded benchmark are enlarged to 256 x 256 pixels and written as JPEG files, and its CLIP is
fine-tuned on them, with the same seeds, in four ways: images decoded and resized by Pillow; by simplejpeg and PyTorch
(compute.decoder=simplejpeg); from smaller copies (compute.resized=128), by Pillow and by simplejpeg. The accuracy is
that on drawings which no training sees; Pillow decodes them in all four. A difference to Pillow is paired by seed, and
its interval is Student's over seeds: what it cannot tell, 5 seeds do not show.

Writes results/measured/bench_decoders.csv, or the file named by --out.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats

from benchmarks.run import ROOT, Options, benchmark
from configs.schema import Experiment, load
from finetune.sweep import train_sweep
from store.runs import read_pool
from tasks.emoji.load import load_split

WAYS = {
    "pillow": [],
    "simplejpeg": ["compute.decoder=simplejpeg"],
    "copies": ["compute.resized=128"],
    "copies, simplejpeg": ["compute.resized=128", "compute.decoder=simplejpeg"],
}


def _make_folder(root: Path, classes: int) -> None:
    """<root>/<split>/<class>/<image>: the drawings of train, and those of held-out and test as one split."""
    for name, folder in (("train", "train"), ("held_out", "unseen"), ("test", "unseen")):
        split = load_split(name, classes=range(classes))
        for index, label in enumerate(split.labels.tolist()):
            path = root / folder / f"class_{label:03d}" / f"{name}_{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            split.pil(index).resize((256, 256), Image.Resampling.BICUBIC).save(path, quality=90)


def _experiment(folder: Path, way: str, classes: int, seeds: int, epochs: int) -> Experiment:
    """A row for each seed, all with the same settings, in a run folder of its own."""
    data = ["task=image_folder", f"task.folder={folder / 'images'}", f"task.num_classes={classes}", "task.shifts=[]"]
    data += ["+task.folders.held_out=unseen", "+task.folders.test=unseen", "task.overlap_allowed=1"]  # nothing selects
    sweep = ["~sweep.draw", "sweep.rows=null", f"+sweep.grid.optim.seed={list(range(1, seeds + 1))}"]
    training = [f"optim.epochs={epochs}", "optim.lr=5e-4", "augment.kind=rand", "augment.layers=1", "augment.crop=0.5"]
    place = [f"paths.runs={folder}", f"name={way.replace(', ', '_')}", "model.templates=null", "model.probe_c=[1]"]
    return load("demo", *data, *sweep, *training, *place, *WAYS[way])


def _row(way: str, found: dict[str, list[float]], images: int) -> dict[str, Any]:
    """Means over seeds, and the paired difference to Pillow with its 95 % interval."""
    differences = np.subtract(found[way], found["pillow"])
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences) if way != "pillow" else 0.0
    return {
        "way": way,
        "images": images,
        "accuracy": round(float(np.mean(found[way])), 2),
        "difference": round(float(differences.mean()), 2),
        "low": round(float(differences.mean() - half), 2),
        "high": round(float(differences.mean() + half), 2),
    }


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each way."""
    folder = options.folder.resolve()
    _make_folder(folder / "images", options.classes)
    images = len(list((folder / "images/unseen").rglob("*.jpg")))
    sizes = (options.classes, options.seeds, options.epochs)
    found: dict[str, list[float]] = {}
    for way in WAYS:
        config = _experiment(folder, way, *sizes)
        train_sweep(config)
        found[way] = [100 * row.held_out_score for row in read_pool(config)[1:]]
    return [_row(way, found, images) for way in WAYS]


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["way", "seeds", "images", "accuracy", "difference", "low", "high"],
        packages=["torch", "torchvision", "timm"],
        folder=(ROOT / "runs/bench_decoders", "for images and models"),
        classes=100,
        seeds=5,
        epochs=6,
    )
