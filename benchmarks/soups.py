"""Averaging weight files, ours beside others:  python -m benchmarks.soups [--folder DIR] [--mergekit-python PYTHON]

K synthetic checkpoints with the shapes of CLIP ViT-B/32's image tower and a head of 1000 classes (88 M float32
parameters in 154 tensors, 353 MB each) are written once, a few of them under several names, and averaged by each
contender: a process of its own, its imports included, with the files in the page cache. Contenders take turns in every
round; the ratio is to the reading of all bytes in the same round. Peak anonymous memory is RssAnon of the process,
and of all processes below it, looked at every 5 ms.

Writes results/measured/bench_soups.csv, or the file named by --out.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.averaging_peers import PEERS
from soups.errors import one_line_errors
from soups.files.atomic import replacing
from soups.files.checkpoints import BLOCK, Entry
from soups.files.streamed import streamed
from store.provenance import provenance_columns

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
SUFFIXES = {OURS: ".safetensors", "mergekit": ""}  # of what a contender writes; mergekit a folder, the others .pt


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the image tower of CLIP ViT-B/32 (width 768) and a linear head, by name."""
    w, joint = width, width * 2 // 3
    tower: dict[str, tuple[int, ...]] = {
        "class_embedding": (w,),
        "positional_embedding": (50, w),
        "proj": (w, joint),
        "conv1.weight": (w, 3, 32, 32),
    }
    tower |= {f"{norm}.{part}": (w,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    block: dict[str, tuple[int, ...]] = {"attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,)}
    block |= {"attn.out_proj.weight": (w, w), "attn.out_proj.bias": (w,)}
    block |= {"mlp.c_fc.weight": (4 * w, w), "mlp.c_fc.bias": (4 * w,)}
    block |= {"mlp.c_proj.weight": (w, 4 * w), "mlp.c_proj.bias": (w,)}
    block |= {f"{norm}.{part}": (w,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    for layer in range(12):
        tower |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    named = {f"model.visual.{name}": shape for name, shape in tower.items()}
    return named | {"classification_head.weight": (1000, joint), "classification_head.bias": (1000,)}


def make_pool(folder: Path, models: int, width: int, files: int) -> list[Path]:
    """Write the checkpoints that are not there yet: an initialisation of standard normal numbers, moved a little.

    Args:
        folder: of the checkpoints.
        models: how many names.
        width: of the transformer.
        files: how many of them have content of their own; the others are further names (hard links) of these.
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
        with streamed(path, entries, dict) as file:
            for name, entry in entries.items():
                for first in range(0, entry.size, BLOCK):
                    count = min(BLOCK, entry.size - first)
                    values = start.standard_normal(count, np.float32)
                    file.write(name, first, values + np.float32(0.01) * moved.standard_normal(count, np.float32))
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
    return [sys.executable, "-m", "benchmarks.averaging_peers", contender, str(out), *map(str, paths)]


def _anonymous(process: int) -> int:
    """KiB of memory that is a process's own and of those below it; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        threads = list(Path(f"/proc/{process}/task").iterdir())
        below = {int(child) for thread in threads for child in (thread / "children").read_text().split()}
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
    return own + sum(map(_anonymous, below))


@dataclass(frozen=True)
class Run:
    """One process."""

    seconds: float
    anonymous: float  # MiB, at the peak


def measure(call: list[str]) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed.
    """
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:  # a pipe that nobody reads would stop it
        process = subprocess.Popen(call, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{call[:3]} failed: {output.read()[-2000:].decode(errors='replace')}")
    return Run(seconds, peak / 1024)


def table(runs: dict[str, list[Run]], models: int, paths: Sequence[Path], mergekit_version: str) -> pd.DataFrame:
    """A row for each contender: medians over rounds, and ratios within rounds."""
    rows: list[dict[str, Any]] = []
    for contender, found in runs.items():
        ratios = [run.seconds / floor.seconds for run, floor in zip(found, runs["read"], strict=True)]
        seconds = [run.seconds for run in found]
        rows.append(
            {
                "contender": contender,
                "models": models,
                "bytes": sum(path.stat().st_size for path in paths),
                "rounds": len(found),
                "seconds": round(statistics.median(seconds), 3),
                "seconds_min": round(min(seconds), 3),
                "seconds_max": round(max(seconds), 3),
                "times_read": round(statistics.median(ratios), 2),
                "peak_anonymous_mib": round(max(run.anonymous for run in found), 1),
                **provenance_columns("torch", "numpy", "safetensors"),
                "mergekit": mergekit_version,
            }
        )
    return pd.DataFrame(rows)


def version_of_mergekit(python: Path | None) -> str:
    """Of an environment's; empty where there is none."""
    if python is None:
        return ""
    call = [str(python), "-c", "from importlib.metadata import version; print(version('mergekit'))"]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/bench_soups", help="for the checkpoints, 2.8 GB")
    parser.add_argument("--models", type=int, default=72)
    parser.add_argument("--files", type=int, default=8, help="files on the disk; the other models are links to them")
    parser.add_argument("--width", type=int, default=768, help="of the transformer; 768 is ViT-B, less is for trials")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit-python", type=Path, help="of an environment that has mergekit")
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_soups.csv")
    arguments = parser.parse_args()
    folder, mergekit = arguments.folder.resolve(), arguments.mergekit_python
    folder.mkdir(parents=True, exist_ok=True)
    paths = make_pool(folder, arguments.models, arguments.width, arguments.files)
    contenders = [*PEERS, OURS] + (["mergekit"] if mergekit else [])
    if not mergekit:
        print("mergekit is left out: no environment that has it was named with --mergekit-python")
    measure(command("read", folder, paths, None))  # into the page cache
    runs: dict[str, list[Run]] = {contender: [] for contender in contenders}
    for _ in range(arguments.rounds):
        for contender in contenders:
            out = folder / f"out_{contender}{SUFFIXES.get(contender, '.pt')}"
            runs[contender].append(measure(command(contender, out, paths, mergekit)))
    found = table(runs, arguments.models, paths, version_of_mergekit(mergekit))
    with replacing(arguments.out) as temporary:
        found.to_csv(temporary, index=False)
    print(found[["contender", "seconds", "seconds_min", "seconds_max", "times_read", "peak_anonymous_mib"]].to_string())
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
