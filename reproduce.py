"""Every stage of one experiment, on this machine:  python reproduce.py experiment=demo

Fine-tunes the sweep, evaluates it, cooks soups and ensembles, evaluates those, writes tables and figures. What is done
is skipped, so a second call takes seconds and a killed one continues. The stages are also commands of their own:
python -m finetune, python -m eval, python -m soups, python -m analysis, each with the same experiment=...

On a SLURM cluster:  python reproduce.py experiment=table3_clip_b32 cluster=slurm_1gpu
Prints the jobs that are left and their sbatch lines; with submit=true it sends them. slurm/README.md tells more.
"""

import sys
import time

import configs.first_contact  # noqa: F401 - says in one line what is not installed, so it comes before what may be not

# isort: split
import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.released import published_instead, write_instead
from analysis.report import Report, analyse
from analysis.seeds import over_seeds
from configs.cli import entry_point, parts_of
from configs.schema import Experiment, replicate
from eval.pool import evaluate_all, model_folders
from slurm.reproduce import reproduce
from soups.cook import cook_all, summary
from store.runs import RunFolder
from store.workers import use_threads
from tasks.load import load_split


def run_one(config: Experiment, console: Console) -> Report:
    """All stages of one sweep."""
    # Imported here: plans for a cluster, --help and mistyped settings need not wait for the models' libraries.
    from finetune.imported import check_imports  # noqa: PLC0415
    from finetune.sweep import train_sweep  # noqa: PLC0415

    console.rule(f"{config.name}: {config.sweep.size} fine-tuned models and the initialisation")
    check_imports(config)
    for split in (config.task.train, config.task.held_out, *config.task.reported):
        load_split(config.task, split)  # what is wrong with any of them is said before hours of training
    train_sweep(config, console)
    evaluate_all(config, model_folders(config), console)
    cook_all(config, config.recipes, console)
    console.print(summary(config, config.recipes))
    evaluate_all(config, model_folders(config), console)
    return analyse(config)


def show(table: pd.DataFrame, console: Console) -> None:
    """The table on the terminal; single shifts stand in the files only, so that it fits 100 columns."""
    wanted = ["Method", "Test", "Mean of shifts", "Test − best", "Shifts − best"]
    table = table[[column for column in wanted if column in table]] if "Held-out" in table else table
    grid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns:
        grid.add_column(column, justify="left" if column == "Method" else "right", no_wrap=True)
    for row in table.itertuples(index=False):
        grid.add_row(*row)
    console.print(grid)


def run_parts(parts: list[Experiment], whole: Experiment) -> None:
    """All stages of each experiment that another is made of, one after the other."""
    started = time.monotonic()
    for part in parts:
        if part.towers:
            continue  # made of other experiments' models, and drawn by python -m analysis
        if part.cluster.kind == "slurm":
            others = [typed for typed in sys.argv[1:] if not typed.startswith("experiment=")]
            reproduce(part, [f"experiment={part.name}", *others])
        else:
            run(part)
    if whole.cluster.kind != "slurm":
        print(f"{whole.name}: {len(parts)} experiments, {time.monotonic() - started:.0f} s. Next:")
        print(f"  python -m analysis artefact=all experiment={whole.name}")


def run(config: Experiment) -> None:
    """All stages, of every replicate where the experiment has some; then what was written and what to run next."""
    if config.parts:
        run_parts(parts_of(config, sys.argv[1:]), config)
        return
    if config.cluster.kind == "slurm":
        reproduce(config, sys.argv[1:])
        return
    if published_instead(config):
        print(*write_instead(config), sep="\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 110)  # a log may be wider than the usual terminal
    started = time.monotonic()
    use_threads(config.cluster.threads)
    if config.replicates:
        reports = {seed: run_one(replicate(config, seed), console) for seed in config.replicates}
        report = over_seeds(config, {seed: each.tidy for seed, each in reports.items()})
    else:
        report = run_one(config, console)
    show(report.table, console)
    console.print(f"{time.monotonic() - started:.0f} s. Written:")
    for file in report.files:
        console.print(f"  {file}", soft_wrap=True)
    root = RunFolder.of(config).root
    console.print(f"Models, soups and logits are in {root}. Next:")
    console.print("  python reproduce.py experiment=demo_seeds    the same with three sweep seeds")
    console.print("  python -m finetune --help                    every stage and setting")


if __name__ == "__main__":
    entry_point(run)()
