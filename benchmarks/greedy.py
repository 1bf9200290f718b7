"""Greedy soups of files beside what they cannot do without:  python -m benchmarks.greedy [--folder DIR]

Pictures: the whole command `soups greedy FILES --images DIR` beside the forward passes of all models and candidates
alone, on pictures that are decoded already, by the same number of threads. The bar is 1.15.
Command: peak anonymous memory (RssAnon) of `soups greedy FILES --score COMMAND` on large files, without the command's
own. The bar is 300 MiB.

Writes results/measured/bench_greedy.csv, or the file named by --out. Networks are random, so a soup is never better
and every candidate is tried.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.soups import ROOT, Run, make_pool, measure
from soups.errors import one_line_errors
from soups.files.atomic import replacing
from store.provenance import provenance_columns


def make_networks(folder: Path, name: str, models: int, classes: int) -> list[Path]:
    """Files of a network of timm, moved a little from one random start."""
    torch.manual_seed(0)
    start = timm.create_model(name, num_classes=classes).state_dict()
    paths = [folder / f"{name}_{i}.safetensors" for i in range(models)]
    for i, path in enumerate(paths):
        if not path.exists():
            generator = torch.Generator().manual_seed(i)
            moved = {
                key: t + 0.01 * t.std() * torch.randn(t.shape, generator=generator) if t.ndim > 1 else t
                for key, t in start.items()
            }
            save_file(moved, path)
    return paths


def make_pictures(folder: Path, number: int, classes: int, side: int) -> Path:
    """Noisy JPEG files in a folder for each class."""
    for i in range(number):
        path = folder / f"{i % classes:03d}" / f"{i}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((side, side)).save(path)
    return folder


def forward_passes(name: str, classes: int, number: int, passes: int, batch_size: int) -> float:
    """Seconds that a network takes for so many pictures, so many times, without decoding."""
    network = timm.create_model(name, num_classes=classes).eval()
    size = timm.data.resolve_data_config({}, model=network)["input_size"]
    batch = torch.randn(batch_size, *size)
    with torch.inference_mode():
        network(batch)
        started = time.perf_counter()
        for _ in range(passes):
            for first in range(0, number, batch_size):
                network(batch[: min(batch_size, number - first)])
    return time.perf_counter() - started


def greedy_command(paths: list[Path], out: Path, *words: str) -> list[str]:
    """How a greedy soup is made."""
    return [sys.executable, "-m", "soups", "greedy", *map(str, paths), "--out", str(out), "--force", *words]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bench_greedy", help="for files, 18 GB")
    parser.add_argument("--network", default="resnet50", help="of timm")
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large-models", type=int, default=8)
    parser.add_argument("--large-width", type=int, default=1840, help="of the transformer; 1840 is 2 GB")
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_greedy.csv")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    pictures = make_pictures(folder / "pictures", arguments.pictures, 10, 320)
    paths = make_networks(folder, arguments.network, arguments.models, 10)
    out, batch = folder / "greedy.safetensors", 64
    passes = 2 * arguments.models - 1
    seconds: list[float] = []
    ratios: list[float] = []
    for _ in range(arguments.rounds):
        forwards = forward_passes(arguments.network, 10, arguments.pictures, passes, batch)
        images = ["--images", str(pictures), "--network", f"timm:{arguments.network}", "--batch-size", str(batch)]
        run = measure(greedy_command(paths, out, *images))
        seconds.append(run.seconds)
        ratios.append(run.seconds / forwards)
    large = make_pool(folder, arguments.large_models, arguments.large_width, arguments.large_models)
    score = f"{sys.executable} -c 'import sys, os; print(os.path.getsize(sys.argv[1]) % 7)' {{soup}}"
    memory: Run = measure(greedy_command(large, out, "--score", score, "--goal", "max"))
    found = pd.DataFrame(
        [
            {
                "network": arguments.network,
                "models": arguments.models,
                "pictures": arguments.pictures,
                "threads": arguments.threads,
                "rounds": arguments.rounds,
                "seconds": round(statistics.median(seconds), 2),
                "times_forward_passes": round(statistics.median(ratios), 3),
                "large_models": arguments.large_models,
                "large_bytes": large[0].stat().st_size,
                "large_seconds": round(memory.seconds, 2),
                "large_peak_anonymous_mib": round(memory.anonymous, 1),
                **provenance_columns("torch", "timm"),
            }
        ]
    )
    with replacing(arguments.out) as temporary:
        found.to_csv(temporary, index=False)
    print(
        found[["seconds", "times_forward_passes", "large_seconds", "large_peak_anonymous_mib"]].to_string(index=False)
    )
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
