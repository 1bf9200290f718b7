"""A step of a learned soup of 72 ViT-B/32-sized models:  python -m benchmarks.learned [--models 72] [--steps 2]

Ingredients are links to a few files (88 M float32 parameters each), mixed into timm's ViT-B/32 with 1000 classes. A
minibatch has 4 images of noise, so that what is seen is the recipe's memory and not that of the activations. `stream`
re-reads every file twice a step, and `read` is its floor, that reading alone; `host` keeps bfloat16 differences to the
mean; `autograd` is the obvious way, a differentiable mix of all models in memory, of as many as fit (`--autograd`).
Each is a process of its own. Seconds a step leave out the first, which follows the loading; peak anonymous memory is
given in sizes of one model.

Writes results/measured/bench_learned.csv, or the file named by --out.
"""

import json
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.averaging_peers import read
from benchmarks.greedy import make_networks
from benchmarks.run import ROOT, Options, benchmark, process_of, run
from soups.descent import LearnedSettings, learned
from soups.files.atomic import write_json
from soups.files.weights import LazyWeights
from store.workers import little_memory

NETWORK = "vit_base_patch32_clip_224"
FILES, BATCH = 4, 4
TIMES = "times.json"
CONTENDERS = ("read", "stream", "host", "autograd")


def _make_pool(folder: Path, models: int) -> list[Path]:
    """So many names for a few files, written where they are not there yet."""
    originals = make_networks(folder, NETWORK, FILES, 1000)
    links = [folder / f"link_{i}.safetensors" for i in range(models)]
    for i, link in enumerate(links):
        if not link.exists():
            link.hardlink_to(originals[i % FILES])
    return links


def _batches(steps: int, times: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches of noise; notes when each is asked for."""
    for step in range(steps + 1):
        times.append(time.perf_counter())
        if step < steps:
            generator = torch.Generator().manual_seed(step)
            yield torch.randn(BATCH, 3, 224, 224, generator=generator), torch.arange(BATCH)


def _autograd(paths: list[Path], steps: int, times: list[float]) -> None:
    module = timm.create_model(NETWORK, num_classes=1000).eval()
    states = [load_file(path) for path in paths]
    logits = torch.zeros(len(paths), requires_grad=True)
    for images, labels in _batches(steps, times):
        shares = logits.softmax(dim=0)
        mixed = {name: sum(s * state[name] for s, state in zip(shares, states, strict=True)) for name in states[0]}
        F.cross_entropy(torch.func.functional_call(module, mixed, (images,)), labels).backward()


def contender(kind: str, folder: str, models: int, steps: int) -> None:
    """One of `CONTENDERS`; writes the times at which minibatches were asked for."""
    torch.set_num_threads(2)
    paths = _make_pool(Path(folder), models)
    times: list[float] = []
    if kind == "read":
        for _ in _batches(steps, times):
            for _ in range(2):
                read("", [str(path) for path in paths])
    elif kind == "autograd":
        _autograd(paths, steps, times)
    else:
        place = "stream" if kind == "stream" else "host"
        settings = LearnedSettings(place=place, differences=kind == "host", epochs=1, batch_size=BATCH)
        module = timm.create_model(NETWORK, num_classes=1000)
        files = [lambda path=path: LazyWeights(path) for path in paths]
        with little_memory():
            learned(module, files, lambda epoch: _batches(steps, times), settings)  # type: ignore[arg-type]
    write_json(Path(folder) / TIMES, times)


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each contender."""
    folder = options.folder.resolve()
    size = _make_pool(folder, options.models)[0].stat().st_size / 2**20
    rows = []
    for kind in CONTENDERS:
        models = options.autograd if kind == "autograd" else options.models
        found = run(process_of("learned", "contender", kind, str(folder), models, options.steps))
        took = [after - before for before, after in pairwise(json.loads((folder / TIMES).read_text()))]
        row = {
            "contender": kind,
            "models": models,
            "steps": len(took),
            "seconds_a_step": round(statistics.median(took[1:] or took), 2),
            "peak_anonymous_mib": round(found.anonymous, 1),
            "model_sizes": round(found.anonymous / size, 2),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["contender", "models", "steps", "seconds_a_step", "peak_anonymous_mib", "model_sizes"],
        packages=["torch"],
        folder=(ROOT / "runs/bench_learned", "for the checkpoints, 1.4 GB"),
        models=72,
        autograd=(8, "models of the obvious way, which holds them all"),
        steps=3,
    )
