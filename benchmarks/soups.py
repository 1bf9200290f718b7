"""Averaging weight files, ours beside others:  python -m benchmarks.soups [--folder DIR] [--mergekit-python PYTHON]

K synthetic checkpoints with the shapes of CLIP ViT-B/32's image tower and a head of 1000 classes (88 M float32
parameters in 154 tensors, 353 MB each) are written once, a few of them under several names, and averaged by each
contender: a process of its own, its imports included, with the files in the page cache. Contenders take turns in every
round; the ratio is to the reading of all bytes in the same round. Peak anonymous memory is RssAnon of the process,
and of all processes below it, looked at every 5 ms.

Writes results/measured/bench_soups.csv, or the file named by --out.
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transformer import VisionTransformer

from benchmarks.run import ROOT, Options, benchmark, in_turns, middle, process_of, ratio, run
from soups.files.checkpoints import BLOCK, Entry, streamed

PEERS = ("read", "loop", "timm")  # of benchmarks/averaging_peers.py
OURS = "ours"
MERGEKIT_PYTHON = {"type": Path, "help": "of an environment that has mergekit"}  # an option
SUFFIXES = {OURS: ".safetensors", "mergekit": ""}  # of what a contender writes; mergekit a folder, the others .pt


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the image tower of CLIP ViT-B/32 (width 768) and a linear head, by name."""
    joint = width * 2 // 3
    with torch.device("meta"):
        tower = VisionTransformer(224, 32, width, 12, max(1, width // 64), 4, output_dim=joint).state_dict()
    named = {f"model.visual.{name}": tuple(tensor.shape) for name, tensor in tower.items()}
    return named | {"classification_head.weight": (1000, joint), "classification_head.bias": (1000,)}


def make_pool(folder: Path, models: int, width: int, files: int) -> list[Path]:
    """Write the checkpoints that are not there yet: an initialisation of standard normal numbers, moved a little.

    Of so many names, `files` have content of their own; the others are further names (hard links) of these.
    """
    entries = {name: Entry("F32", shape) for name, shape in shapes(width).items()}
    paths = [folder / f"model_{i}_of_width_{width}.safetensors" for i in range(models)]
    for i, path in enumerate(paths):
        if path.exists():
            continue
        if i >= files:
            path.hardlink_to(paths[i % files])
            continue
        start, moved = np.random.default_rng(0), np.random.default_rng(i + 1)
        with streamed(path, entries, dict) as write:
            for name, entry in entries.items():
                for first in range(0, entry.size, BLOCK):
                    count = min(BLOCK, entry.size - first)
                    values = start.standard_normal(count, np.float32)
                    write(name, first, values + np.float32(0.01) * moved.standard_normal(count, np.float32))
    return paths


def command(contender: str, out: Path, paths: Sequence[Path], mergekit: Path | None) -> list[str]:
    """How a contender is started."""
    if contender == OURS:
        return [sys.executable, "-m", "soups", "uniform", *map(str, paths), "--out", str(out), "--force"]
    if contender == "mergekit":
        assert mergekit is not None
        config = out.with_suffix(".yaml")
        models = "".join(f"  - {{model: {path}, parameters: {{weight: 1.0}}}}\n" for path in paths)
        config.write_text(f"merge_method: linear\nmodels:\n{models}dtype: float32\n")
        return [str(mergekit.with_name("mergekit-pytorch")), str(config), str(out)]
    return process_of("averaging_peers", contender, str(out), [str(path) for path in paths])


def version_of_mergekit(python: Path | None) -> str:
    """Of an environment's; empty where there is none."""
    if python is None:
        return ""
    call = [str(python), "-c", "from importlib.metadata import version; print(version('mergekit'))"]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each contender: medians over rounds, and ratios within rounds."""
    folder, mergekit = options.folder.resolve(), options.mergekit_python
    folder.mkdir(parents=True, exist_ok=True)
    paths = make_pool(folder, options.models, options.width, options.files)
    if not mergekit:
        print("mergekit is left out: no environment that has it was named with --mergekit-python")
    calls = {
        contender: command(contender, folder / f"out_{contender}{SUFFIXES.get(contender, '.pt')}", paths, mergekit)
        for contender in [*PEERS, OURS, *(["mergekit"] if mergekit else [])]
    }
    run(calls["read"])  # into the page cache
    runs = in_turns({contender: partial(run, call) for contender, call in calls.items()}, options.rounds)
    seconds = {contender: [each.seconds for each in found] for contender, found in runs.items()}
    return [
        {
            "contender": contender,
            "bytes": sum(path.stat().st_size for path in paths),
            **middle("seconds", seconds[contender], 3),
            "times_read": ratio(seconds[contender], seconds["read"], 2),
            "peak_anonymous_mib": round(max(each.anonymous for each in found), 1),
            "mergekit": version_of_mergekit(mergekit),
        }
        for contender, found in runs.items()
    ]


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["contender", "seconds", "seconds_min", "seconds_max", "times_read", "peak_anonymous_mib"],
        packages=["torch", "numpy", "safetensors"],
        folder=(ROOT / "runs/bench_soups", "for the checkpoints, 2.8 GB"),
        models=72,
        files=(8, "files on the disk; the other models are links to them"),
        width=(768, "of the transformer; 768 is ViT-B, less is for trials"),
        rounds=5,
        mergekit_python=MERGEKIT_PYTHON,
    )
