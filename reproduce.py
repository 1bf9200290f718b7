"""Every stage of one experiment, on this machine:  python reproduce.py experiment=demo

Fine-tunes the sweep, evaluates it, cooks soups and ensembles, evaluates those, writes tables and figures. What is done
is skipped, so a second call takes seconds and a killed one continues. The stages are also commands of their own:
python -m finetune, python -m eval, python -m soups, python -m analysis, each with the same experiment=...

On a SLURM cluster:  python reproduce.py experiment=table3_clip_b32 cluster=slurm_1gpu
Prints the jobs that are left and their sbatch lines; with submit=true it sends them. slurm/README.md tells more.
"""

import shlex
import sys
import time
from collections.abc import Sequence

import configs.first_contact  # noqa: F401 - says in one line what is not installed, so it comes before what may be not

# isort: split
import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.artefacts import draw
from analysis.ending import ending, reminder
from analysis.page.write import write_report
from analysis.released import published_instead, write_instead
from analysis.tables.sweep_seeds import over_seeds
from analysis.tables.table3 import Report, analyse
from configs.cli import entry_point, parts_as_typed, record_words
from configs.errors import UserError
from configs.schema import Experiment, replicate
from eval.pool import evaluate_all, model_folders
from slurm.submit import reproduce
from soups.experiment.cook import cook_all, summary
from store.workers import use_threads
from tasks.files import ROOT
from tasks.load import check_annotations, load_split
from tasks.overlaps import refuse_overlaps


def run_one(config: Experiment, console: Console) -> Report:
    """All stages of one sweep."""
    # Imported here: plans for a cluster, --help and mistyped settings need not wait for the models' libraries.
    from finetune.start import check_imports  # noqa: PLC0415
    from finetune.sweep import train_sweep  # noqa: PLC0415

    console.rule(f"{config.name}: {config.sweep.size} fine-tuned models and the initialisation")
    if reminder(config):
        console.print(reminder(config), highlight=False)
    check_imports(config)
    check_annotations(config.task)
    for split in (config.task.train, config.task.held_out, *config.task.reported):
        load_split(config.task, split)  # what is wrong with any of them is said before hours of training
    refuse_overlaps(config.task, config.paths.runs)
    train_sweep(config, console)
    evaluate_all(config, model_folders(config), console)
    cook_all(config, config.recipes, console)
    console.print(summary(config, config.recipes))
    evaluate_all(config, model_folders(config), console)
    return analyse(config)


def show(table: pd.DataFrame, caption: str, console: Console) -> None:
    """The table and its caption on the terminal; single shifts stand in the files only, so that it fits 100 columns."""
    if "Held-out" in table:
        test = str(table.columns[list(table.columns).index("Held-out") + 1])
        wanted = ["Method", test, "Mean of shifts", f"{test} − best", "Shifts − best"]
        table = table[[column for column in wanted if column in table]]
    grid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns:
        grid.add_column(column, justify="left" if column == "Method" else "right", no_wrap=True)
    for row in table.itertuples(index=False):
        grid.add_row(*row)
    console.print(grid)
    console.print(caption, highlight=False, markup=False)


def missing_data(parts: Sequence[Experiment]) -> list[str]:
    """A line for each data set that experiments need and whose folder is not on this machine."""
    lines: dict[str, None] = {}
    for part in parts:
        task, place = part.task, part.cluster.stage or part.task.folder
        on_hub = task.kind in ("parquet", "glue") and not place.is_absolute()  # a name there, not a folder
        if not on_hub and not (ROOT / place).exists():
            said = f"MISSING DATA: {place} ({task.name}) is not on this machine"
            lines[f"{said}: docs/datasets.md says where to get it, task.folder=DIR names another place"] = None
    return list(lines)


def run_parts(whole: Experiment, typed: Sequence[str]) -> None:
    """All stages of each experiment that another is made of, one after the other."""
    started, parts = time.monotonic(), parts_as_typed(whole, typed)
    for part, words in parts:
        if not part.towers:  # made of other experiments' models, and drawn by python -m analysis
            run(part, words)
    print(f"{whole.name}: {len(parts)} experiments, {time.monotonic() - started:.0f} s. Next:")
    print(f"  python -m analysis artefact=all {shlex.join(typed)}")


def run(config: Experiment, typed: Sequence[str] | None = None) -> None:
    """All stages, of every replicate where the experiment has some; then a sentence, where to look and what is next.

    Args:
        config: of the experiment.
        typed: the words that make it; None: those of the command line.
    """
    words = sys.argv[1:] if typed is None else list(typed)
    if config.recipe:
        raise UserError(f"recipe={config.recipe} is for python -m soups: here type recipes=[{config.recipe}]")
    if config.cluster.kind == "slurm":
        parts = parts_as_typed(config, words)
        if config.submit:
            for part, typed_for_it in parts:
                record_words(part, typed_for_it)
        reproduce(parts)
        for line in missing_data([part for part, _ in parts]):
            print(line)
        return
    if config.parts:
        run_parts(config, words)
        return
    if published_instead(config):
        print(*write_instead(config), sep="\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 110)  # a log may be wider than the usual terminal
    started = time.monotonic()
    use_threads(config.cluster.threads)
    if config.towers:  # made of other experiments' rows, so that there is nothing to train
        print(*draw(config, "figuree1", [config], console), sep="\n")
        return
    record_words(config, words)
    if config.replicates:
        replicates = {seed: replicate(config, seed) for seed in config.replicates}
        reports = {seed: run_one(each, console) for seed, each in replicates.items()}
        report = over_seeds(config, {seed: each.tidy for seed, each in reports.items()})
        pages = [write_report(each, typed=words) for each in replicates.values()]
    else:
        report = run_one(config, console)
        pages = [write_report(config, typed=words)]
    show(report.table, report.caption, console)
    for line in ending(config, words, report.tidy, pages, time.monotonic() - started):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    entry_point(run)()
