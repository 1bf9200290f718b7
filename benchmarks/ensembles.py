"""Ensembles of cached logits out of core:  python -m benchmarks.ensembles [--models 72] [--images 26000]

Synthetic logits of K models on a held-out split of ImageNet's size (26,000 x 1,000 float32, 104 MB a model; 7.5 GB in
all for 72): a common and an own noise, and a signal at the label whose strength differs from model to model. The
uniform ensemble and the greedy one (Recipe 1 on logits, given each model's accuracy, as a sweep knows it) are each a
process of its own, imports included, beside the reading of every byte once. Peak anonymous memory is RssAnon, looked at
every 5 ms.

Writes results/measured/bench_ensembles.csv, or the file named by --out.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.soups import ROOT, Run, measure
from eval.metrics import correct
from soups.errors import one_line_errors
from soups.files.atomic import replacing, write_json
from soups.recipes import GrowingLogits, greedy, uniform_ensemble
from store.arrays import cached_array, write_array
from store.provenance import provenance_columns

CLASSES = 1000
KINDS = ("read", "ensemble", "greedy_ensemble")


def labels_of(images: int) -> Tensor:
    """(N,) class ids, every class as often as every other."""
    return torch.arange(images) % CLASSES


def make_pool(folder: Path, models: int, images: int) -> list[Path]:
    """Write the logits that are not there yet, and the accuracy of each model beside it."""
    paths = [folder / f"logits_{images}_{i}.npy" for i in range(models)]
    missing = [(i, path) for i, path in enumerate(paths) if not path.exists()]
    if missing:
        numbers = np.random.default_rng(0)
        common, own = (numbers.standard_normal((images, CLASSES), np.float32) for _ in range(2))
    for i, path in missing:
        logits = common + np.roll(own, int(np.random.default_rng(i).integers(own.size)))
        logits[np.arange(images), labels_of(images).numpy()] += 3.5 + 0.5 * np.random.default_rng(i).random()
        write_json(path.with_suffix(".json"), accuracy({"logits": torch.from_numpy(logits)}))
        write_array(path, logits)
    return paths


def accuracy(logits: dict[str, Tensor]) -> float:
    """The share of examples whose largest logit is their label's."""
    labels = labels_of(len(logits["logits"]))
    return int(correct(logits["logits"], labels).sum()) / len(labels)


def _load(path: Path, images: int) -> dict[str, Tensor]:
    return {"logits": cached_array(path, (images, CLASSES), lambda: torch.empty(0))}


def child(kind: str, paths: list[Path], images: int) -> None:
    """One contender."""
    torch.set_num_threads(2)
    loaders = [partial(_load, path, images) for path in paths]
    if kind == "read":
        buffer = bytearray(1 << 20)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    elif kind == "ensemble":
        accuracy(uniform_ensemble(loaders, [0.0] * len(paths)).weights)
    else:
        held_out = [json.loads(path.with_suffix(".json").read_text("utf-8")) for path in paths]
        print(f"{len(greedy(loaders, held_out, accuracy, grow=GrowingLogits).ingredients)} members")


def row(kind: str, paths: list[Path], images: int, runs: list[Run]) -> dict[str, object]:
    """One line of the table: medians over rounds."""
    seconds = sorted(run.seconds for run in runs)
    return {
        "contender": kind,
        "models": len(paths),
        "images": images,
        "bytes": sum(path.stat().st_size for path in paths),
        "rounds": len(runs),
        "seconds": round(seconds[len(seconds) // 2], 2),
        "seconds_min": round(seconds[0], 2),
        "seconds_max": round(seconds[-1], 2),
        "peak_anonymous_mib": round(max(run.anonymous for run in runs), 1),
        **provenance_columns("torch", "numpy"),
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bench_ensembles", help="for the logits, 7.5 GB")
    parser.add_argument("--models", type=int, default=72)
    parser.add_argument("--images", type=int, default=26_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_ensembles.csv")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = make_pool(folder, arguments.models, arguments.images)
    if arguments.child:
        child(arguments.child, paths, arguments.images)
        return
    call = [sys.executable, "-m", "benchmarks.ensembles", "--folder", str(folder), "--models", str(len(paths))]
    call += ["--images", str(arguments.images), "--child"]
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            runs[kind].append(measure([*call, kind]))
    rows = [row(kind, paths, arguments.images, found) for kind, found in runs.items()]
    with replacing(arguments.out) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    print(pd.DataFrame(rows)[["contender", "seconds", "seconds_min", "seconds_max", "peak_anonymous_mib"]].to_string())
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
