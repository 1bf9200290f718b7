"""What all benchmarks share: their options, contenders that take turns, processes that are measured, and the table."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
from PIL import Image

from configs.data import ImageFolder
from soups.errors import one_line_errors
from soups.files.atomic import replacing
from store.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "results/measured"
Options = argparse.Namespace
K = TypeVar("K")
T = TypeVar("T")


def benchmark(
    measured: Callable[[Options], Iterable[Mapping[str, Any]]],
    *,
    name: str | None = None,
    shown: Sequence[str] = (),
    packages: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Run a benchmark as a command: read its options, measure, write the table and print some of its columns.

    Args:
        measured: the rows of the table, by the options. Its module's docstring is what --help prints.
        name: of the table, results/measured/NAME.csv, where --out names no other file; by default bench_MODULE.
        shown: columns to print; all where none is named.
        packages: those whose versions stand in the table, beside the machine; None: the numbers depend on neither.
        options: each with its default, or its default and what --help says, or the arguments of `add_argument`.
    """
    document = sys.modules[measured.__module__].__doc__
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    name = name or f"bench_{Path(sys.argv[0]).stem}"
    for option, given in {**options, "out": MEASURED / f"{name}.csv"}.items():
        default, text = given if isinstance(given, tuple) else (given, None)
        words = given if isinstance(given, dict) else {"type": type(default), "default": default, "help": text}
        parser.add_argument(f"--{option.replace('_', '-')}", **words)
    arguments = parser.parse_args()

    def work() -> None:
        rows = measured(arguments)
        table = pd.DataFrame(rows if packages is None else _in_context(rows, arguments, packages))
        with replacing(arguments.out) as temporary:
            table.to_csv(temporary, index=False)
        print(table[list(shown) or list(table)].to_string(index=False))
        print(arguments.out)

    one_line_errors(work)


def _in_context(
    rows: Iterable[Mapping[str, Any]], options: Options, packages: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows, each with the options that are numbers or words, the commit, the machine and versions of some packages."""
    given = {name: value for name, value in vars(options).items() if type(value) in (int, float, str)}
    origin = provenance()
    place = {name: origin[name] for name in ("commit", "modified", "python")}
    place |= {name: origin["machine"][name] for name in ("processor", "cores")}
    versions = {package: version(package) for package in packages}
    for row in rows:
        yield {**given, **row, **place, **versions}


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A call that was made."""

    seconds: float
    processor_seconds: float  # of all threads
    answer: T


def timed(call: Callable[[], T]) -> Timed[T]:
    """Make a call."""
    started, used = time.perf_counter(), time.process_time()
    answer = call()
    return Timed(time.perf_counter() - started, time.process_time() - used, answer)


def in_turns(contenders: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """What each contender returns in each round; they take turns, so that what else the machine does hits all alike."""
    found: dict[K, list[T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            found[name].append(contender())
    return found


def middle(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, smallest and largest of some rounds, as columns NAME, NAME_min and NAME_max."""
    found = {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    return {column: round(value, digits) for column, value in found.items()}


def ratio(values: Sequence[float], reference: Sequence[float], digits: int) -> float:
    """The median of the ratios within rounds."""
    return round(statistics.median(a / b for a, b in zip(values, reference, strict=True)), digits)


def anonymous_mib(process: int) -> float:
    """MiB of memory that is a process's own (RssAnon) and of those below it; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        threads = list(Path(f"/proc/{process}/task").iterdir())
        below = {int(child) for thread in threads for child in (thread / "children").read_text().split()}
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
    return own / 1024 + sum(map(anonymous_mib, below))


@dataclass(frozen=True)
class Run:
    """One process."""

    seconds: float
    anonymous: float  # MiB, at the peak, looked at every 5 ms
    printed: str


def run(call: Sequence[str]) -> Run:
    """Run a command to its end; a `RuntimeError` where it failed."""
    started, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe that nobody reads would stop it
        process = subprocess.Popen(call, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, anonymous_mib(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        output.seek(0)
        printed = output.read()
    if process.returncode != 0:
        raise RuntimeError(f"{call[:3]} failed: {printed[-2000:]}")
    return Run(seconds, peak, printed)


def process_of(module: str, function: str, *arguments: object) -> list[str]:
    """The command that calls a function of a benchmark in a process of its own, its imports and its memory included.

    Arguments are numbers, words or lists of them.
    """
    words = ", ".join(map(repr, arguments))
    return [sys.executable, "-c", f"from benchmarks.{module} import {function}; {function}({words})"]


def save_photographs(folder: Path, images: int, classes: int, width: int = 500, height: int = 375) -> None:
    """Write those of <folder>/<class>/<image>.jpg that are not there yet.

    They have smooth colours and the grain of a camera, which makes 500 x 375 pixels, ImageNet's mean, about 110 kB.
    """
    for number in range(images):
        path, chance = folder / f"{number % classes:03d}" / f"{number:06d}.jpg", np.random.default_rng(number)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(chance.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC))
        grain = chance.normal(0, 12, (height, width, 1))
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=95)


def folder_task(root: Path, classes: int) -> ImageFolder:
    """Images in <root>/train and <root>/test."""
    splits = {"train": "train", "held_out": "held_out", "test": "test", "shifts": ()}
    return ImageFolder(kind="image_folder", folder=root, num_classes=classes, **splits)
