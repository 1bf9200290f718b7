"""Ensembles of cached logits out of core:  python -m benchmarks.ensembles [--models 72] [--images 26000]

Synthetic logits of K models on a held-out split of ImageNet's size (26,000 x 1,000 float32, 104 MB a model; 7.5 GB in
all for 72): a common and an own noise, and a signal at the label whose strength differs from model to model. The
uniform ensemble and the greedy one (Recipe 1 on logits, given each model's accuracy, as a sweep knows it) are each a
process of its own, imports included, beside the reading of every byte once. Peak anonymous memory is RssAnon, looked at
every 5 ms.

Writes results/measured/bench_ensembles.csv, or the file named by --out.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.averaging_peers import read
from benchmarks.run import ROOT, Options, benchmark, in_turns, middle, process_of, run
from eval.metrics import correct
from soups.files.atomic import write_json
from soups.recipes import GrowingLogits, greedy, uniform_ensemble
from store.arrays import cached_array, write_array

CLASSES = 1000
KINDS = ("read", "ensemble", "greedy_ensemble")


def _labels(images: int) -> Tensor:
    return torch.arange(images) % CLASSES


def _make_pool(folder: Path, models: int, images: int) -> list[Path]:
    """Write the logits that are not there yet, and the accuracy of each model beside it."""
    paths = [folder / f"logits_{images}_{i}.npy" for i in range(models)]
    missing = [(i, path) for i, path in enumerate(paths) if not path.exists()]
    if missing:
        numbers = np.random.default_rng(0)
        common, own = (numbers.standard_normal((images, CLASSES), np.float32) for _ in range(2))
    for i, path in missing:
        logits = common + np.roll(own, int(np.random.default_rng(i).integers(own.size)))
        logits[np.arange(images), _labels(images).numpy()] += 3.5 + 0.5 * np.random.default_rng(i).random()
        write_json(path.with_suffix(".json"), _accuracy({"logits": torch.from_numpy(logits)}))
        write_array(path, logits)
    return paths


def _accuracy(logits: dict[str, Tensor]) -> float:
    labels = _labels(len(logits["logits"]))
    return int(correct(logits["logits"], labels).sum()) / len(labels)


def contender(kind: str, folder: str, models: int, images: int) -> None:
    """One of `KINDS`, of a pool that is there."""
    torch.set_num_threads(2)
    paths = _make_pool(Path(folder), models, images)

    def load(path: Path) -> dict[str, Tensor]:
        return {"logits": cached_array(path, (images, CLASSES), lambda: torch.empty(0))}

    loaders = [partial(load, path) for path in paths]
    if kind == "read":
        read("", [str(path) for path in paths])
    elif kind == "ensemble":
        _accuracy(uniform_ensemble(loaders, [0.0] * len(paths)).weights)
    else:
        held_out = [json.loads(path.with_suffix(".json").read_text("utf-8")) for path in paths]
        print(f"{len(greedy(loaders, held_out, _accuracy, grow=GrowingLogits).ingredients)} members")


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each contender: medians over rounds."""
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = _make_pool(folder, options.models, options.images)
    own = (str(folder), options.models, options.images)
    runs = in_turns(
        {kind: partial(run, process_of("ensembles", "contender", kind, *own)) for kind in KINDS}, options.rounds
    )
    return [
        {
            "contender": kind,
            "bytes": sum(path.stat().st_size for path in paths),
            **middle("seconds", [each.seconds for each in found], 2),
            "peak_anonymous_mib": round(max(each.anonymous for each in found), 1),
        }
        for kind, found in runs.items()
    ]


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["contender", "seconds", "seconds_min", "seconds_max", "peak_anonymous_mib"],
        packages=["torch", "numpy"],
        folder=(ROOT / "runs/bench_ensembles", "for the logits, 7.5 GB"),
        models=72,
        images=26_000,
        rounds=3,
    )
