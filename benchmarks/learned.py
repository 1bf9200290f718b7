"""A step of a learned soup of 72 ViT-B/32-sized models:  python -m benchmarks.learned [--models 72] [--steps 2]

Ingredients are links to a few files (88 M float32 parameters each), mixed into timm's ViT-B/32 with 1000 classes. A
minibatch has 4 images of noise, so that what is seen is the recipe's memory and not that of the activations. `stream`
re-reads every file twice a step, and `read` is its floor, that reading alone; `host` keeps bfloat16 differences to the
mean; `autograd` is the obvious way, a differentiable mix of all models in memory, of as many as fit (`--autograd`).
Each is a process of its own. Seconds a step leave out the first, which follows the loading; peak anonymous memory is
given in sizes of one model.

Writes results/measured/bench_learned.csv, or the file named by --out.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pandas as pd
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.averaging_peers import read
from benchmarks.soups import ROOT, Run, measure
from soups.descent import LearnedSettings, learned
from soups.errors import one_line_errors
from soups.files.atomic import replacing, write_json
from soups.files.tensors import LazyWeights
from store.provenance import provenance_columns
from store.workers import little_memory

NETWORK = "vit_base_patch32_clip_224"
FILES, BATCH = 4, 4
CONTENDERS = ("read", "stream", "host", "autograd")


def make_pool(folder: Path, models: int) -> list[Path]:
    """`models` names for a few files, written where they are not there yet."""
    originals = [folder / f"original_{i}.safetensors" for i in range(FILES)]
    for i, path in enumerate(originals):
        if not path.exists():
            torch.manual_seed(i)
            with replacing(path) as temporary:
                save_file(timm.create_model(NETWORK, num_classes=1000).state_dict(), temporary)
    links = [folder / f"link_{i}.safetensors" for i in range(models)]
    for i, link in enumerate(links):
        if not link.exists():
            link.hardlink_to(originals[i % FILES])
    return links


def batches(steps: int, times: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches of noise; notes when each is asked for."""
    for step in range(steps + 1):
        times.append(time.perf_counter())
        if step < steps:
            generator = torch.Generator().manual_seed(step)
            yield torch.randn(BATCH, 3, 224, 224, generator=generator), torch.arange(BATCH)


def autograd(paths: list[Path], steps: int, times: list[float]) -> None:
    """All models in memory, and autograd through their sum."""
    module = timm.create_model(NETWORK, num_classes=1000).eval()
    states = [load_file(path) for path in paths]
    logits = torch.zeros(len(paths), requires_grad=True)
    for images, labels in batches(steps, times):
        shares = logits.softmax(dim=0)
        mixed = {name: sum(s * state[name] for s, state in zip(shares, states, strict=True)) for name in states[0]}
        F.cross_entropy(torch.func.functional_call(module, mixed, (images,)), labels).backward()


def child(kind: str, paths: list[Path], steps: int, out: Path) -> None:
    """One contender; writes the times at which minibatches were asked for."""
    torch.set_num_threads(2)
    times: list[float] = []
    if kind == "read":
        for _ in batches(steps, times):
            for _ in range(2):
                read(out, paths)
    elif kind == "autograd":
        autograd(paths, steps, times)
    else:
        place = "stream" if kind == "stream" else "host"
        settings = LearnedSettings(place=place, differences=kind == "host", epochs=1, batch_size=BATCH)
        module = timm.create_model(NETWORK, num_classes=1000)
        files = [lambda path=path: LazyWeights(path) for path in paths]
        with little_memory():
            learned(module, files, lambda epoch: batches(steps, times), settings)  # type: ignore[arg-type]
    write_json(out, times)


def row(kind: str, models: int, run: Run, times: list[float], model_mib: float) -> dict[str, object]:
    """One line of the table."""
    took = [after - before for before, after in pairwise(times)]
    return {
        "contender": kind,
        "models": models,
        "steps": len(took),
        "seconds_a_step": round(statistics.median(took[1:] or took), 2),
        "peak_anonymous_mib": round(run.anonymous, 1),
        "model_sizes": round(run.anonymous / model_mib, 2),
        **provenance_columns("torch"),
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bench_learned", help="for the checkpoints, 1.4 GB")
    parser.add_argument("--models", type=int, default=72)
    parser.add_argument("--autograd", type=int, default=8, help="models of the obvious way, which holds them all")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_learned.csv")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    times_file = folder / "times.json"
    if arguments.child:
        child(arguments.child, make_pool(folder, arguments.models), arguments.steps, times_file)
        return
    size = make_pool(folder, arguments.models)[0].stat().st_size / 2**20
    rows = []
    for kind in CONTENDERS:
        models = arguments.autograd if kind == "autograd" else arguments.models
        call = [sys.executable, "-m", "benchmarks.learned", "--folder", str(folder), "--child", kind]
        run = measure([*call, "--models", str(models), "--steps", str(arguments.steps)])
        rows.append(row(kind, models, run, json.loads(times_file.read_text()), size))
        print(rows[-1], flush=True)
    with replacing(arguments.out) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
