"""Greedy soups of files beside what they cannot do without:  python -m benchmarks.greedy [--folder DIR]

Pictures: the whole command `soups greedy FILES --images DIR` beside the forward passes of all models and candidates
alone, on pictures that are decoded already, by the same number of threads. The bar is 1.15.
Command: peak anonymous memory (RssAnon) of `soups greedy FILES --score COMMAND` on large files, without the command's
own. The bar is 300 MiB.

Writes results/measured/bench_greedy.csv, or the file named by --out. Networks are random, so a soup is never better
and every candidate is tried.
"""

import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from benchmarks.run import ROOT, Options, benchmark, in_turns, ratio, run, save_photographs, timed
from benchmarks.soups import make_pool
from soups.files.atomic import replacing

CLASSES, BATCH, SIDE = 10, 64, 320


def make_networks(folder: Path, name: str, models: int, classes: int) -> list[Path]:
    """Files of a network of timm, moved a little from one random start."""
    folder.mkdir(parents=True, exist_ok=True)
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
            with replacing(path) as temporary:
                save_file(moved, temporary)
    return paths


def _forward_passes(name: str, classes: int, number: int, passes: int, batch_size: int) -> float:
    """Seconds that a network takes for so many pictures, so many times, without decoding."""
    network = timm.create_model(name, num_classes=classes).eval()
    size = timm.data.resolve_data_config({}, model=network)["input_size"]
    batch = torch.randn(batch_size, *size)

    def work() -> None:
        for _ in range(passes):
            for first in range(0, number, batch_size):
                network(batch[: min(batch_size, number - first)])

    with torch.inference_mode():
        network(batch)
        return timed(work).seconds


def _command(paths: list[Path], out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "soups", "greedy", *map(str, paths), "--out", str(out), "--force", *words]


def measured(options: Options) -> list[dict[str, Any]]:
    """One row: medians over rounds, and the memory of a greedy soup of large files."""
    folder, pictures = options.folder.resolve(), options.folder.resolve() / "photographs"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    save_photographs(pictures, options.pictures, CLASSES, SIDE, SIDE)
    paths, out = make_networks(folder, options.network, options.models, CLASSES), folder / "greedy.safetensors"
    words = ["--images", str(pictures), "--network", f"timm:{options.network}", "--batch-size", str(BATCH)]
    passes = (options.network, CLASSES, options.pictures, 2 * options.models - 1, BATCH)
    calls = {
        "forward": partial(_forward_passes, *passes),
        "greedy": lambda: run(_command(paths, out, *words)).seconds,
    }
    seconds = in_turns(calls, options.rounds)
    large = make_pool(folder, options.large_models, options.large_width, options.large_models)
    score = f"{sys.executable} -c 'import sys, os; print(os.path.getsize(sys.argv[1]) % 7)' {{soup}}"
    memory = run(_command(large, out, "--score", score, "--goal", "max"))
    row = {
        "seconds": round(statistics.median(seconds["greedy"]), 2),
        "times_forward_passes": ratio(seconds["greedy"], seconds["forward"], 3),
        "large_bytes": large[0].stat().st_size,
        "large_seconds": round(memory.seconds, 2),
        "large_peak_anonymous_mib": round(memory.anonymous, 1),
    }
    return [row]


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["seconds", "times_forward_passes", "large_seconds", "large_peak_anonymous_mib"],
        packages=["torch", "timm"],
        folder=(ROOT / "runs/bench_greedy", "for files, 18 GB"),
        network=("resnet50", "of timm"),
        models=16,
        pictures=2000,
        threads=2,
        rounds=3,
        large_models=8,
        large_width=(1840, "of the transformer; 1840 is 2 GB"),
    )
