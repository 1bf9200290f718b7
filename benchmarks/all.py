"""All benchmarks, and one table of what they are measured against:  python -m benchmarks.all [NAME ...] [--table]

Runs the benchmarks one after the other (or those that are named, as in `data soups`), which write
results/measured/bench_*.csv, then prints a line for each bar: ours, the best peer, the floor, the target. With --table
it only prints. A clone with changes that are not committed is refused, since a number belongs to a commit.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from typing import Any

import pandas as pd

from benchmarks.run import MEASURED, ROOT
from configs.errors import UserError
from soups.errors import one_line_errors
from store.provenance import provenance

# Short ones first.
NAMES = ("training", "evaluation", "data", "probe", "curvature", "along", "soups", "learned", "ensembles", "greedy")

Value = Callable[[Any], float]  # of a benchmark's table by contender
PEAK, DOUBLE, TORCHVISION = "peak_anonymous_mib", "times_double_backward", "times_torchvision"  # columns
LOADERS = ["torchvision", "timm", "decode_jpeg"]  # other ways to load images


@dataclass(frozen=True)
class Bar:
    """One number and what it is measured against."""

    benchmark: str
    ours: Value
    target: float
    peer: Value | None = None  # the best other way
    floor: float | None = None  # what cannot be beaten
    transform: str | None = None  # of the rows that count
    at_least: bool = False  # the target is a lower bound, not an upper one


def _of(contender: str, column: str) -> Value:
    return lambda rows: rows[column][contender]


def _ratio(contender: str, reference: str, column: str) -> Value:
    return lambda rows: rows[column][contender] / rows[column][reference]


def _of_one(column: str) -> Value:
    return lambda rows: rows[column].iloc[0]


def _least_of_others(column: str) -> Value:
    return lambda rows: rows[column].drop(["ours", "read"]).min()


def _loads(target: float, transform: str, contender: str) -> Bar:
    """A bar of training images a second, in those of torchvision's loader with Pillow."""
    ours, peer = _of(contender, TORCHVISION), lambda rows: rows[TORCHVISION][LOADERS].max()
    return Bar("data", ours, target, peer, transform=transform, at_least=True)


BARS = {
    "Uniform soup of 72 files of 353 MB: time, in readings of all bytes": Bar(
        "soups", _of("ours", "times_read"), 2.5, _least_of_others("times_read"), floor=1
    ),
    "The same: peak memory, MiB": Bar("soups", _of("ours", PEAK), 300, _least_of_others(PEAK)),
    "Three recipes on checkpoints of 7 B parameters: peak memory, MiB": Bar(
        "large", lambda rows: rows[PEAK][["ours"]].max(), 300, lambda rows: rows[PEAK].drop("ours").max()
    ),
    "Greedy soup of files and images: time, in forward passes of all candidates": Bar(
        "greedy", _of_one("times_forward_passes"), 1.15, floor=1
    ),
    "Greedy soup scored by a command: peak memory, MiB": Bar("greedy", _of_one(f"large_{PEAK}"), 300),
    "Learned soup of 72 files of 353 MB: time of a step, in readings of all bytes twice": Bar(
        "learned", _ratio("stream", "read", "seconds_a_step"), 1.3, floor=1
    ),
    "Greedy ensemble of 72 x 26,000 x 1,000 logits: time, in readings": Bar(
        "ensembles", _ratio("greedy_ensemble", "read", "seconds"), 3, floor=1
    ),
    "Linear probe: time, in scikit-learn's to the same optimum": Bar(
        "probe", _ratio("ours", "scikit-learn, tol=1e-06", "seconds"), 0.2, lambda rows: 1.0
    ),
    "Second derivative of the loss: time, in that of double backward": Bar(
        "curvature", _of("ours", DOUBLE), 1.5, _of("curvlinops", DOUBLE)
    ),
    "The same: memory, in that of double backward": Bar(
        "curvature", _of("ours", "memory_of_double_backward"), 0.25, _of("curvlinops", "memory_of_double_backward")
    ),
    "Average of every tenth step of 100 M parameters: time, in % of a step": Bar(
        "along", _of("update", "percent_of_step"), 2, _of("AveragedModel", "percent_of_step")
    ),
    "Training images from smaller copies, minimal augmentation: speed, in torchvision's": _loads(
        3, "minimal", "ours_copies_fast"
    ),
    "Training images from originals, minimal augmentation: speed, in torchvision's": _loads(
        1.3, "minimal", "ours_simplejpeg"
    ),
    "Training images from smaller copies, RandAugment: speed, in torchvision's": _loads(2, "rand", "ours_copies_fast"),
}


def lines() -> list[dict[str, str]]:
    """A line for each bar, from the files in results/measured."""
    found = []
    for what, bar in BARS.items():
        file = MEASURED / f"bench_{bar.benchmark}.csv"
        if bar.benchmark == "large" and not file.exists():  # it takes 55 GB, and is no part of `make bench`
            continue
        rows = pd.read_csv(file)
        if bar.transform:
            rows = rows[(rows["transform"] == bar.transform) & (rows["workers"] == 0)]
        by_name = rows.set_index("contender") if "contender" in rows else rows
        line = {"What": what, "Target": f"{'at least' if bar.at_least else 'at most'} {bar.target:g}"}
        try:
            ours, peer = bar.ours(by_name), bar.peer and bar.peer(by_name)
        except (KeyError, AttributeError):  # the file is older than the benchmark
            found.append(line | {"Ours": "not measured yet"})
            continue
        line |= {"Ours": _shown(ours), "Best peer": "" if peer is None or isnan(peer) else _shown(peer)}
        line |= {"Floor": "" if bar.floor is None else f"{bar.floor:g}"}
        line |= {"Processor": rows.processor.iloc[0].replace("(R)", "").removesuffix(" Processor")}
        met = ours >= bar.target if bar.at_least else ours <= bar.target
        found.append(line | {"Met": "yes" if met else "no"})
    return found


def _shown(value: float) -> str:
    """Three digits, and all of those before the point.

    >>> _shown(0.1794), _shown(5629.8)
    ('0.179', '5,630')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table() -> str:
    """The bars as Markdown, as README has them."""
    columns = ["What", "Ours", "Best peer", "Floor", "Target", "Met", "Processor"]
    return pd.DataFrame(lines(), columns=columns).fillna("").to_markdown(index=False, disable_numparse=True)


def main() -> None:
    """Run the benchmarks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them where none is named"
    )
    parser.add_argument("--table", action="store_true", help="print the table of what was measured, and run nothing")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        raise UserError(f"there is no benchmark {unknown[0]!r}: type some of {', '.join(NAMES)}")
    if not arguments.table:
        if provenance()["modified"] is not False:
            raise UserError(
                "the clone has changes that are not committed: commit them, so that the numbers have a commit"
            )
        for name in arguments.names or NAMES:
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=True)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(table())


if __name__ == "__main__":
    one_line_errors(main)
