"""What an experiment takes:  python -m slurm.plan experiment=table3_clip_b32 gpu=h100 [gpus=16] [utilisation=0.5]

Prints GPU-hours, wall time on 1, 8 and 64 GPUs and storage of each stage, with what they assume; configs/plan/*.yaml
has every assumption, typed as plan.cores_per_gpu=16. Trains and writes nothing.

python -m slurm.plan all gpu=h100 [out=FILE]    a line for each experiment of the paper, and a csv of them
"""

import re
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from configs.cli import entry_point, one_line_errors
from configs.errors import UserError
from configs.schema import CONFIGS, Experiment, load
from finetune.meter import peak_flops
from slurm.costs import GIGA, Costs, Stage, costs, gpus_per_row
from store.atomic import replacing

GPUS = (1, 8, 64)
SHORT = ("gpu", "gpus", "utilisation")  # may be typed without plan.
OWN_DATA = ("demo", "own")  # how names of experiments begin that are not the paper's
IMPORTED = ("released",)  # whose rows nobody trains here


def gigabytes(size: float) -> str:
    """Bytes in decimal gigabytes or terabytes.

    >>> gigabytes(353_448_864), gigabytes(3.53e12)
    ('0.4 GB', '3.5 TB')
    """
    return f"{size / GIGA / 1000:,.1f} TB" if size >= 1000 * GIGA else f"{size / GIGA:,.1f} GB"


def time(hours: float | None) -> str:
    """Hours in a unit that fits; a dash where a job does not fit on so few GPUs.

    >>> time(0.005), time(0.5), time(7.53), time(200), time(None)
    ('18 s', '30 min', '7.5 h', '8.3 d', '-')
    """
    if hours is None:
        return "-"
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} d"


def _line(part: Stage | Costs, gpus: tuple[int, ...]) -> list[str]:
    return [f"{part.gpu_hours:,.1f}", *(time(part.wall_hours(n)) for n in gpus), gigabytes(part.storage)]


def stage_table(found: Costs, gpus: tuple[int, ...]) -> Table:
    """A line for each stage, and their sum."""
    grid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("stage", "jobs", "GPUs a job", "most by", "GPU-hours", *(f"on {n}" for n in gpus), "kept"):
        grid.add_column(column, justify="left" if column in ("stage", "most by") else "right", no_wrap=True)
    for part in found.stages:
        grid.add_row(part.name, f"{len(part.jobs):,}", str(part.gpus_per_job), part.bound, *_line(part, gpus))
    grid.add_row("all", "", "", "", *_line(found, gpus), style="bold")
    return grid


def assumptions(config: Experiment, found: Costs) -> list[str]:
    """What the numbers rest on, in sentences."""
    plan = config.plan
    flops = (peak_flops(plan.gpu, config.compute.precision) or 0) / 1e12
    proxy = f", a proxy for {config.model.proxy_for}" if config.model.proxy_for else ""
    return [
        f"{found.rows:,} rows of a network of {found.parameters / 1e6:,.1f} million parameters{proxy}; "
        f"{found.flops:.3g} FLOPs of training.",
        f"gpu={plan.gpu}: {flops:,.0f} TFLOP/s in {config.compute.precision} (from memory of its data sheet), of which "
        f"{100 * plan.utilisation:.0f} % are used in training and {100 * plan.inference_utilisation:.0f} % in forward "
        "passes: assumed, not measured.",
        f"{plan.cores_per_gpu} CPU cores a GPU (assumed) decode {plan.augmented_per_core:g} images a second each, "
        f"{plan.fixed_per_core:g} at evaluation and {plan.copied_per_core:g} from decoded copies: measured on one "
        "machine with JPEGs of 500 x 375 pixels (results/measured/bench_data.csv).",
        f"A task reads {plan.read_gigabytes:g} GB/s from the shared file system (assumed), and what the node's memory "
        f"has kept, up to {plan.cache_gigabytes:g} GB, at {plan.reread_gigabytes:g} GB/s.",
        f"A row is trained by {gpus_per_row(config)} GPU(s), at no loss for working together. Wall times are of the "
        "longest job first, and of stages one after the other.",
        f"While a row trains, its state takes up to {gigabytes(found.state)} more. Recipes that end by themselves are "
        "counted at their longest.",
        "Not counted: queues, starts and restarts, saving, the fit of the probe, tables.",
    ]


def show(config: Experiment) -> None:
    """Print the table of an experiment."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = costs(config)
    n = config.plan.gpus
    console.print(f"{found.name}: an estimate, nothing of it measured on a cluster\n", highlight=False)
    console.print(stage_table(found, tuple(sorted({*GPUS, n or 1}))))
    console.print()
    for sentence in assumptions(config, found):
        console.print(f"- {sentence}", highlight=False)


def paper_experiments() -> list[str]:
    """Names of the paper's experiments, in order; those made of others, or of others' models, train nothing."""
    files = sorted((CONFIGS / "experiment").glob("*.yaml"))
    names = [path.stem for path in files if not re.search(r"^(parts|towers):", path.read_text(), re.MULTILINE)]
    return [name for name in names if not name.startswith(OWN_DATA) and name not in IMPORTED]


def overview(names: list[str], typed: list[str]) -> pd.DataFrame:
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
        walls = {f"wall_hours_{n}": found.wall_hours(n) for n in GPUS}
        storage = {"kept_gb": found.storage / GIGA, "state_gb": found.state / GIGA}
        hours = {"gpu_hours": found.gpu_hours, "compute_hours": sum(part.compute for part in found.stages)}
        numbers = {key: None if n is None else round(n, 2) for key, n in (hours | walls | storage).items()}
        sizes = {"experiment": name, "rows": found.rows, "parameters": found.parameters}
        lines.append(sizes | {"training_flops": f"{found.flops:.4g}"} | numbers | {"not_counted": ""})
    table = pd.DataFrame(lines)
    return table.astype({column: "Int64" for column in ("rows", "parameters") if column in table})


def show_all(typed: list[str], out: Path | None) -> None:
    """Print a line for each experiment of the paper, and write them where asked."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = overview(paper_experiments(), typed)
    grid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("experiment", "rows", "GPU-hours", *(f"on {n}" for n in GPUS), "kept"):
        grid.add_column(column, justify="left" if column == "experiment" else "right", no_wrap=True)
    for line in found.to_dict("records"):
        if line["not_counted"]:
            console.print(f"{line['experiment']}: not counted: {line['not_counted']}", highlight=False, soft_wrap=True)
            continue
        walls = [line[f"wall_hours_{n}"] for n in GPUS]
        shown = [time(None if pd.isna(hours) else hours) for hours in walls]
        grid.add_row(
            line["experiment"],
            str(line["rows"]),
            f"{line['gpu_hours']:,.1f}",
            *shown,
            gigabytes(line["kept_gb"] * GIGA),
        )
    console.print(grid)
    if out is not None:
        with replacing(out) as temporary:
            found.to_csv(temporary, index=False)
        console.print(str(out))


def spelled_out(typed: list[str]) -> list[str]:
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
    settings = [word for word in typed if word not in every and not word.startswith("out=")]
    one_line_errors(lambda: show_all(settings, Path(outs[-1]) if outs else None))


if __name__ == "__main__":
    main()
