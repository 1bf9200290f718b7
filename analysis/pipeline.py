"""All stages of one experiment on this machine, one after the other, and what is printed at their end."""

import time
from collections.abc import Sequence
from functools import partial

import pandas as pd
from rich import get_console
from rich.console import Console
from rich.table import Table

from analysis.artefacts import draw
from analysis.commands import reports_of, sweeps_of, wide_log
from analysis.ending import ending, reminder
from analysis.page.write import write_report
from analysis.tables.table3 import Report, analyse
from configs.cli import record_words
from configs.schema import Experiment
from eval.pool import evaluate_all, model_folders
from finetune.start import check_imports
from finetune.sweep import train_sweep
from soups.experiment.soups import make_soups, summary
from store.again import remember
from store.workers import use_threads
from tasks.check import refuse_overlaps
from tasks.load import check_annotations, load_split


def _run_one(config: Experiment, console: Console) -> Report:
    """All stages of one sweep."""
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
    make_soups(config, config.recipes, console)
    console.print(summary(config, config.recipes))
    evaluate_all(config, model_folders(config), console)
    return analyse(config)


def _show(table: pd.DataFrame, caption: str, console: Console) -> None:
    """The table and its caption on the terminal; single shifts stand in the files only, so that it fits 100 columns."""
    if "Held-out" in table:
        test = str(table.columns[list(table.columns).index("Held-out") + 1])
        wanted = ["Method", test, "Mean of shifts", f"{test} − best", "Shifts − best"]
        table = table[[column for column in wanted if column in table]]
    grid = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in table.columns:  # where it is too narrow, a cell goes on in the next line: no number is cut
        grid.add_column(column, justify="left" if column == "Method" else "right", overflow="fold")
    for row in table.itertuples(index=False):
        grid.add_row(*row)
    console.print(grid)
    console.print(caption, highlight=False, markup=False)


def run_here(config: Experiment, words: Sequence[str]) -> None:
    """All stages, for every replicate where there are some; then a sentence, where to look and what is next."""
    wide_log(record=True)
    console = get_console()
    started = time.monotonic()
    use_threads(config.cluster.threads)
    if config.towers:  # made of other experiments' rows, so that there is nothing to train
        print(*draw(config, "figuree1", [config]), sep="\n")
        return
    record_words(config, words)
    report = reports_of(config, partial(_run_one, console=console))[-1]
    pages = [write_report(each, typed=words) for each in sweeps_of(config)]
    console.export_text(clear=True)  # what follows is said again by the next call
    _show(report.table, report.caption, console)
    for line in ending(config, words, report.tidy, pages, time.monotonic() - started):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    remember(config, words, console.export_text())
