"""All rows of a sweep on this machine."""

from functools import partial
from typing import Any

from rich.console import Console

from configs.schema import Experiment
from finetune.length import refuse_unequal_shares
from finetune.start import initialise, wait_for_starts
from finetune.train import train_row
from soups.files.atomic import read_jsonl
from store.processes import Processes, end_processes, first_decides, start_processes, started_processes
from store.rows import require_trainable, row_config, score_of, teachers
from store.runs import RunFolder, done_row, write_manifest
from store.staging import staged
from store.workers import spread, use_threads


def describe(done: dict[str, Any]) -> str:
    """One line about a finished row."""
    score = done["held_out"]
    name = "initialisation" if done["row"] == 0 else f"row {done['row']}"
    if done["status"] == "diverged":
        return f"{name}: diverged after {done['seconds']:.0f} s; recipes leave it out"
    return f"{name}: held-out {100 * score_of(score):.1f} % (n = {score['n']}), {done['seconds']:.0f} s"


def train_here(config: Experiment) -> None:
    """The row `sweep.index`, or all rows: over worker processes, or together by those that torchrun started."""
    use_threads(config.cluster.threads)
    config, index = staged(config), config.sweep.index
    rows = range(1, config.sweep.size + 1) if index is None else [index] if index else []
    for row in rows if started_processes() > 1 and config.sweep.imported is None else ():
        # Said by each process alone: later, one would wait for another that has ended.
        refuse_unequal_shares(row_config(config, row).optim, started_processes())
    if index is None and started_processes() == 1:
        train_sweep(config)
        return
    processes, console = start_processes(), Console()
    if index is None:
        train_together(config, processes, console)
    else:
        wait_for_starts(config, index, processes)
        done = train_row(config, index, console)
        if processes.is_main:
            print(describe(done))
    end_processes()


def train_sweep(config: Experiment, console: Console | None = None) -> None:
    """Train, or import, every row that is not done, over the cluster's worker processes, and write the manifest."""
    console, run = console or Console(), RunFolder.of(config)
    is_imported = config.sweep.imported is not None
    use_threads(config.cluster.threads)
    require_trainable(config)
    rows = [row for row in range(1, config.sweep.size + 1) if not done_row(config, row)]
    if done_row(config, 0) is None:
        console.print(f"{'importing' if is_imported else 'fitting'} the initialisation ...")
    console.print(describe(initialise(config)))

    def epochs_done(members: list[int]) -> int:
        logs = (run.ingredient(row) / "metrics.jsonl" for row in members)
        return sum("epoch" in line for log in logs if log.exists() for line in read_jsonl(log))

    def rows_done(members: list[int]) -> int:
        return sum(run.is_done(row) for row in members)

    if is_imported:
        groups, units, done_units = [("importing {} models", rows)], dict.fromkeys(rows, 1), rows_done
    else:
        # The longest first, so that no worker is left alone with one at the end.
        units, done_units = {row: row_config(config, row).optim.epochs for row in rows}, epochs_done
        first, distilled = _in_order(config, sorted(rows, key=lambda row: (-units[row], row)))
        groups = [("fine-tuning {} models, epochs", first), ("distilling {} models, epochs", distilled)]
    for title, members in groups:
        spread(
            title.format(len(members)),
            [partial(train_row, config, row) for row in members],
            workers=config.cluster.workers,
            threads=config.cluster.threads,
            units=sum(units[row] for row in members),
            done_units=partial(done_units, members),
            report=describe,
            console=console,
        )
    write_manifest(config)


def _in_order(config: Experiment, rows: list[int]) -> tuple[list[int], list[int]]:
    """The rows that start from row 0 alone, and those that are distilled from others."""
    first = [row for row in rows if not teachers(config, row)]
    return first, [row for row in rows if row not in first]


def train_together(config: Experiment, processes: Processes, console: Console) -> None:
    """The same by all processes that torchrun started, one row after the other; the first one prints what is done."""
    first, distilled = _in_order(config, list(range(1, config.sweep.size + 1)))
    for row in (0, *first, *distilled):
        done = train_row(config, row, console)
        if processes.is_main:
            console.print(describe(done))
    first_decides(lambda: write_manifest(config), processes)
