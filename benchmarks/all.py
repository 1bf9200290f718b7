"""All benchmarks, and one table of what they are measured against:  python -m benchmarks.all [NAME ...] [--table]

Runs the benchmarks one after the other (or those that are named, as in `data soups`), which write
results/measured/bench_*.csv, then prints a line for each bar: ours, the best peer, the floor, the target. With --table
it only prints. A clone with changes that are not committed is refused, since a number belongs to a commit.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import pandas as pd

from benchmarks.run import MEASURED, ROOT
from configs.errors import UserError
from soups.errors import one_line_errors
from store.provenance import provenance

# Short ones first.
NAMES = ("training", "evaluation", "data", "probe", "curvature", "along", "soups", "learned", "ensembles", "greedy")

Rows = Any  # a benchmark's table by contender
Value = Callable[[Rows], float]


@dataclass(frozen=True)
class Bar:
    """One number and what it is measured against."""

    what: str
    benchmark: str
    ours: Value
    target: float
    at_least: bool = False  # the target is a lower bound, not an upper one
    peer: Value | None = None  # the best other way
    floor: float | None = None  # what cannot be beaten
    only: Mapping[str, str] = field(default_factory=dict)  # column -> value of the rows that count


def _loads(what: str, target: float, transform: str, contender: str) -> Bar:
    """A bar of training images a second, in those of torchvision's loader with Pillow."""
    return Bar(
        f"Training images from {what}: speed, in torchvision's",
        "data",
        lambda rows: rows.times_torchvision[contender],
        target,
        at_least=True,
        peer=lambda rows: max(rows.times_torchvision[name] for name in ("torchvision", "timm", "decode_jpeg")),
        only={"transform": transform},
    )


BARS = (
    Bar(
        "Uniform soup of 72 files of 353 MB: time, in readings of all bytes",
        "soups",
        lambda rows: rows.times_read["ours"],
        2.5,
        peer=lambda rows: rows.times_read.drop(["ours", "read"]).min(),
        floor=1,
    ),
    Bar(
        "The same: peak memory, MiB",
        "soups",
        lambda rows: rows.peak_anonymous_mib["ours"],
        300,
        peer=lambda rows: rows.peak_anonymous_mib.drop(["ours", "read"]).min(),
    ),
    Bar(
        "Three recipes on checkpoints of 7 B parameters: peak memory, MiB",
        "large",
        lambda rows: rows.peak_anonymous_mib[["ours"]].max(),
        300,
        peer=lambda rows: rows.peak_anonymous_mib.drop("ours").max(),
    ),
    Bar(
        "Greedy soup of files and images: time, in forward passes of all candidates",
        "greedy",
        lambda rows: rows.times_forward_passes.iloc[0],
        1.15,
        floor=1,
    ),
    Bar(
        "Greedy soup scored by a command: peak memory, MiB",
        "greedy",
        lambda rows: rows.large_peak_anonymous_mib.iloc[0],
        300,
    ),
    Bar(
        "Learned soup of 72 files of 353 MB: time of a step, in readings of all bytes twice",
        "learned",
        lambda rows: rows.seconds_a_step["stream"] / rows.seconds_a_step["read"],
        1.3,
        floor=1,
    ),
    Bar(
        "Greedy ensemble of 72 x 26,000 x 1,000 logits: time, in readings",
        "ensembles",
        lambda rows: rows.seconds["greedy_ensemble"] / rows.seconds["read"],
        3,
        floor=1,
    ),
    Bar(
        "Linear probe: time, in scikit-learn's to the same optimum",
        "probe",
        lambda rows: rows.seconds["ours"] / rows.seconds["scikit-learn, tol=1e-06"],
        0.2,
        peer=lambda rows: 1.0,
    ),
    Bar(
        "Second derivative of the loss: time, in that of double backward",
        "curvature",
        lambda rows: rows.times_double_backward["ours"],
        1.5,
        peer=lambda rows: rows.times_double_backward["curvlinops"],
    ),
    Bar(
        "The same: memory, in that of double backward",
        "curvature",
        lambda rows: rows.memory_of_double_backward["ours"],
        0.25,
        peer=lambda rows: rows.memory_of_double_backward["curvlinops"],
    ),
    Bar(
        "Average of every tenth step of 100 M parameters: time, in % of a step",
        "along",
        lambda rows: rows.percent_of_step["update"],
        2,
        peer=lambda rows: rows.percent_of_step["AveragedModel"],
    ),
    _loads("smaller copies, minimal augmentation", 3, "minimal", "ours_copies_fast"),
    _loads("originals, minimal augmentation", 1.3, "minimal", "ours_simplejpeg"),
    _loads("smaller copies, RandAugment", 2, "rand", "ours_copies_fast"),
)


def lines() -> list[dict[str, str]]:
    """A line for each bar, from the files in results/measured."""
    found = []
    for bar in BARS:
        file = MEASURED / f"bench_{bar.benchmark}.csv"
        if bar.benchmark == "large" and not file.exists():  # it takes 55 GB, and is no part of `make bench`
            continue
        rows = pd.read_csv(file)
        for column, value in {"workers": 0, **bar.only}.items():
            rows = rows[rows[column] == value] if column in rows else rows
        by_name = rows.set_index("contender") if "contender" in rows else rows
        line = {"What": bar.what, "Target": f"{'at least' if bar.at_least else 'at most'} {bar.target:g}"}
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
