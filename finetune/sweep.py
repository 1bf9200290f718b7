"""All rows of a sweep on this machine."""

from functools import partial
from typing import Any

from rich.console import Console

from configs.schema import Experiment
from finetune.rows import identity, row_config, teachers
from finetune.train import initialise, train_row
from store.atomic import read_jsonl
from store.runs import RunFolder, finished, read_pool, score_of, write_manifest
from store.workers import spread, use_threads


def describe(done: dict[str, Any]) -> str:
    """One line about a finished row."""
    score = done["held_out"]
    name = "initialisation" if done["row"] == 0 else f"row {done['row']}"
    if done["status"] == "diverged":
        return f"{name}: diverged after {done['seconds']:.0f} s; recipes leave it out"
    return f"{name}: held-out {100 * score_of(score):.1f} % (n = {score['n']}), {done['seconds']:.0f} s"


def _epochs_done(run: RunFolder, rows: list[int]) -> int:
    logs = (run.ingredient(row) / "metrics.jsonl" for row in rows)
    return sum("epoch" in line for log in logs if log.exists() for line in read_jsonl(log))


def _rows_done(run: RunFolder, rows: list[int]) -> int:
    return sum((run.ingredient(row) / "done.json").exists() for row in rows)


def import_sweep(config: Experiment, rows: list[int], console: Console) -> None:
    """Make finished rows of the checkpoints in `sweep.imported`, over the cluster's worker processes."""
    spread(
        f"importing {len(rows)} models",
        [partial(train_row, config, row) for row in rows],
        workers=config.cluster.workers,
        threads=config.cluster.threads,
        units=len(rows),
        done_units=partial(_rows_done, RunFolder.of(config), rows),
        report=describe,
        console=console,
    )


def train_sweep(config: Experiment, console: Console | None = None) -> None:
    """Train, or import, every row that is not done, over the cluster's worker processes, and write the manifest."""
    console = console or Console()
    run = RunFolder.of(config)
    use_threads(config.cluster.threads)
    rows = [row for row in range(1, config.sweep.size + 1) if not finished(run.ingredient(row), identity(config, row))]
    if finished(run.ingredient(0), identity(config, 0)) is None:
        console.print(f"{'importing' if config.sweep.imported else 'fitting'} the initialisation ...")
    console.print(describe(initialise(config)))
    if config.sweep.imported is not None:
        import_sweep(config, rows, console)
        write_manifest(run, read_pool(run, config.sweep.size))
        return
    epochs = {row: row_config(config, row).optim.epochs for row in rows}
    # The longest first, so that no worker is left alone with one at the end; those that are distilled after the others.
    order = sorted(rows, key=lambda row: (-epochs[row], row))
    first = [row for row in order if not teachers(config, row)]
    for title, some in (("fine-tuning", first), ("distilling", [row for row in order if row not in first])):
        spread(
            f"{title} {len(some)} models, epochs",
            [partial(train_row, config, row) for row in some],
            workers=config.cluster.workers,
            threads=config.cluster.threads,
            units=sum(epochs[row] for row in some),
            done_units=partial(_epochs_done, run, some),
            report=describe,
            console=console,
        )
    write_manifest(run, read_pool(run, config.sweep.size))
