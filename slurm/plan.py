"""What an experiment takes:  python -m slurm.plan experiment=table3_clip_b32 gpu=h100 [gpus=16] [utilisation=0.5]

Prints GPU-hours, wall time on 1, 8 and 64 GPUs and storage of each stage, with what they assume; configs/plan/*.yaml
has every assumption, typed as plan.cores_per_gpu=16. Trains and writes nothing.

python -m slurm.plan all gpu=h100 [out=FILE [force=true]]    a line for each experiment, and a csv of them
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from configs.cli import entry_point
from configs.errors import UserError
from configs.registered import experiments
from configs.schema import Experiment, load
from finetune.log import peak_flops
from slurm.cost import GIGA, Costs, Stage, costs, gpus_per_row
from soups.errors import one_line_errors
from soups.files.atomic import replacing

GPUS = (1, 8, 64)
FORCE = "force=true"
SHORT = ("gpu", "gpus", "utilisation")  # may be typed without plan.
OWN_DATA = ("demo", "own")  # how the names of experiments begin that are not the paper's
IMPORTED = ("released",)  # experiments whose rows nobody trains here


def gigabytes(size: float) -> str:
    """Bytes in decimal gigabytes or terabytes.

    >>> gigabytes(353_448_864), gigabytes(3.53e12)
    ('0.4 GB', '3.5 TB')
    """
    return f"{size / GIGA / 1000:,.1f} TB" if size >= 1000 * GIGA else f"{size / GIGA:,.1f} GB"


def duration(hours: float | None) -> str:
    """Hours in a unit that fits; a dash where a job does not fit on so few GPUs.

    >>> duration(0.005), duration(0.5), duration(7.53), duration(200), duration(None)
    ('18 s', '30 min', '7.5 h', '8.3 d', '-')
    """
    if hours is None or pd.isna(hours):
        return "-"
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} d"


def grid_of(columns: Sequence[str], left: Sequence[str]) -> Table:
    """An empty table for the terminal, whose columns are right-aligned but for some."""
    grid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return grid


def show(config: Experiment) -> None:
    """Print a line for each stage of an experiment, and what the numbers rest on."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    found, plan = costs(config), config.plan
    gpus = sorted({*GPUS, plan.gpus or 1})

    def numbers(part: Stage | Costs) -> list[str]:
        return [f"{part.gpu_hours:,.1f}", *(duration(part.wall_hours(n)) for n in gpus), gigabytes(part.storage)]

    columns = ("stage", "jobs", "GPUs a job", "most by", "GPU-hours", *(f"on {n}" for n in gpus), "kept")
    grid = grid_of(columns, ("stage", "most by"))
    for part in found.stages:
        grid.add_row(part.name, f"{len(part.jobs):,}", str(part.gpus_per_job), part.bound, *numbers(part))
    grid.add_row("all", "", "", "", *numbers(found), style="bold")
    console.print(f"{config.name}: an estimate, nothing of it measured on a cluster\n")
    console.print(grid)
    proxy = f", a proxy for {config.model.proxy_for}" if config.model.proxy_for else ""
    teraflops = (peak_flops(plan.gpu, config.compute.precision) or 0) / 1e12
    console.print()
    for sentence in (
        f"{found.rows:,} rows of a network of {found.parameters / 1e6:,.1f} million parameters{proxy}; "
        f"{found.flops:.3g} FLOPs of training.",
        f"gpu={plan.gpu}: {teraflops:,.0f} TFLOP/s in {config.compute.precision} (from memory of its data sheet), of "
        f"which {100 * plan.utilisation:.0f} % are used in training and {100 * plan.inference_utilisation:.0f} % in "
        "forward passes: assumed, not measured.",
        f"{plan.cores_per_gpu} CPU cores a GPU (assumed) decode {plan.augmented_per_core:g} images a second each, "
        f"{plan.fixed_per_core:g} at evaluation and {plan.copied_per_core:g} from decoded copies: measured on one "
        "machine with JPEGs of 500 x 375 pixels (results/measured/bench_data.csv).",
        f"A task reads {plan.read_gigabytes:g} GB/s from the shared file system (assumed), and what the node's memory "
        f"has kept, up to {plan.cache_gigabytes:g} GB, at {plan.reread_gigabytes:g} GB/s.",
        f"A row is trained by {gpus_per_row(config)} GPU(s), at no loss for working together. Wall times are of the "
        "longest job first, and of stages one after the other.",
        f"While a row trains, its state takes up to {gigabytes(found.state)} more. Recipes that end by themselves are "
        "counted at their longest.",
        "Not counted: queues, starts and restarts, saving, tables.",
    ):
        console.print(f"- {sentence}")


def paper_experiments() -> list[str]:
    """Names of the paper's experiments, in order, without those that are made of others and train nothing."""
    files = experiments()
    names = [name for name in files if not re.search(r"^(parts|towers):", files[name].read_text(), re.MULTILINE)]
    return [name for name in names if not name.startswith(OWN_DATA) and name not in IMPORTED]


def overview(names: Sequence[str], typed: Sequence[str]) -> pd.DataFrame:
    """A line for each experiment: hours, and gigabytes of 10^9 bytes; what cannot be counted has its reason.

    Args:
        names: of configs/experiment.
        typed: settings for all of them.
    """
    lines: list[dict[str, object]] = []
    for name in names:
        try:
            found = costs(load(name, *typed))
        except UserError as error:
            lines.append({"experiment": name, "not_counted": str(error).split(" (")[0]})
            continue
        numbers = {"gpu_hours": found.gpu_hours, **{f"wall_hours_{n}": found.wall_hours(n) for n in GPUS}}
        numbers |= {"kept_gb": found.storage / GIGA, "state_gb": found.state / GIGA}
        line = {"experiment": name, "rows": found.rows, "parameters": found.parameters}
        line |= {"training_flops": f"{found.flops:.4g}"} | {k: n and round(n, 2) for k, n in numbers.items()}
        lines.append(line | {"not_counted": ""})
    table = pd.DataFrame(lines)
    return table.astype({column: "Int64" for column in ("rows", "parameters") if column in table})


def show_all(typed: Sequence[str], out: Path | None) -> None:
    """Print a line for each experiment of the paper, and write them where asked."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    found = overview(paper_experiments(), typed)
    grid = grid_of(("experiment", "rows", "GPU-hours", *(f"on {n}" for n in GPUS), "kept"), ("experiment",))
    for line in found.to_dict("records"):
        if line["not_counted"]:
            console.print(f"{line['experiment']}: not counted: {line['not_counted']}", soft_wrap=True)
            continue
        walls = [duration(line[f"wall_hours_{n}"]) for n in GPUS]
        kept = gigabytes(line["kept_gb"] * GIGA)
        grid.add_row(line["experiment"], str(line["rows"]), f"{line['gpu_hours']:,.1f}", *walls, kept)
    console.print(grid)
    if out is not None:
        with replacing(out) as temporary:
            found.to_csv(temporary, index=False)
        console.print(str(out))


def refuse_out(out: Path, *, force: bool) -> None:
    """Before anything is counted: a table is a csv, and overwrites a file only if it is told to.

    Raises:
        UserError: another suffix; a file that is there.
    """
    if out.suffix != ".csv":
        raise UserError(f"out={out}: the table is written as csv, name a file that ends in .csv")
    if out.exists() and not force:
        raise UserError(f"out={out} is there already: name another file, or type {FORCE} to overwrite it")


def spelled_out(typed: Sequence[str]) -> list[str]:
    """Settings of a plan with the name of their group.

    >>> spelled_out(["experiment=demo", "gpu=h100"])
    ['experiment=demo', 'plan.gpu=h100']
    """
    return [f"plan.{setting}" if setting.split("=")[0] in SHORT else setting for setting in typed]


def main() -> None:
    """One experiment, by way of Hydra, or all of them."""
    typed = spelled_out(sys.argv[1:])
    every = [word for word in typed if word in ("all", "experiment=all")]
    if not every:
        sys.argv[1:] = typed
        entry_point(show)()
        return
    outs = [word.removeprefix("out=") for word in typed if word.startswith("out=")]
    settings = [word for word in typed if word not in (*every, FORCE) and not word.startswith("out=")]

    def work() -> None:
        out = Path(outs[-1]) if outs else None
        if out is not None:
            refuse_out(out, force=FORCE in typed)
        show_all(settings, out)

    one_line_errors(work)


if __name__ == "__main__":
    main()
