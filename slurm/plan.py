"""What an experiment takes:  python -m slurm.plan experiment=table3_clip_b32 gpu=h100 [gpus=16] [utilisation=0.5]

Prints GPU-hours, wall time on 1, 8 and 64 GPUs and storage of each stage, with what they assume; configs/plan/*.yaml
has every assumption, typed as plan.cores_per_gpu=16. Trains and writes nothing.

python -m slurm.plan all gpu=h100 [out=FILE [force=true]]    a line for each experiment, and a csv of them
"""

import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.filesize import decimal
from tabulate import tabulate

from configs.cli import entry_point
from configs.errors import UserError
from configs.registered import experiments
from configs.schema import Experiment, load
from finetune.log import peak_flops
from slurm.cost import GIGA, Stage, costs, gpus_per_row, total
from soups.errors import one_line_errors
from soups.files.atomic import replacing

GPUS = (1, 8, 64)  # for which wall time is printed
FORCE = "force=true"
SHORT = ("gpu", "gpus", "utilisation")  # may be typed without plan.
OWN_DATA = ("demo", "own")  # how the names of experiments begin that are not the paper's
IMPORTED = "released"  # the experiment whose rows nobody trains here


def duration(hours: float | None) -> str:
    """Hours in a unit that fits; a dash for None.

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


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """A table for the terminal, whose columns are right-aligned but for some."""
    aligned = ["left" if column in left else "right" for column in columns]
    return tabulate(rows, columns, tablefmt="plain", disable_numparse=True, colalign=aligned if rows else None)


def show(config: Experiment) -> None:
    """Print a line for each stage of an experiment, and what the numbers rest on."""
    found, plan = costs(config), config.plan
    gpus = sorted({*GPUS, plan.gpus or 1})

    def numbers(*stages: Stage) -> list[str]:
        hours, walls, kept = total(stages, gpus)
        return [f"{hours:,.1f}", *map(duration, walls), decimal(kept)]

    columns = ("stage", "jobs", "GPUs a job", "most by", "GPU-hours", *(f"on {n}" for n in gpus), "kept")
    rows = [[s.name, f"{len(s.jobs):,}", str(s.gpus_per_job), s.bound, *numbers(s)] for s in found.stages]
    print(f"{config.name}: an estimate, nothing of it measured on a cluster\n")
    print(table(columns, [*rows, ["all", "", "", "", *numbers(*found.stages)]], ("stage", "most by")))
    proxy = f", a proxy for {config.model.proxy_for}" if config.model.proxy_for else ""
    teraflops = (peak_flops(plan.gpu, config.compute.precision) or 0) / 1e12
    print()
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
        f"While a row trains, its state takes up to {decimal(found.state)} more. Recipes that end by themselves are "
        "counted at their longest.",
        "Not counted: queues, starts and restarts, saving, tables.",
    ):
        print(textwrap.fill(f"- {sentence}", 120))


def paper_experiments() -> list[str]:
    """Names of the paper's experiments, in order, without those that are made of others and train nothing."""
    files = {name: file for name, file in experiments().items() if not name.startswith(OWN_DATA) and name != IMPORTED}
    return [name for name in files if not re.search(r"^(parts|towers):", files[name].read_text(), re.MULTILINE)]


def overview(names: Sequence[str], typed: Sequence[str]) -> pd.DataFrame:
    """A line for each experiment: hours, and gigabytes of 10^9 bytes; what cannot be counted has its reason."""
    lines: list[dict[str, object]] = []
    for name in names:
        try:
            found = costs(load(name, *typed))
        except UserError as error:
            lines.append({"experiment": name, "not_counted": str(error).split(" (")[0]})
            continue
        hours, walls, kept = total(found.stages, GPUS)
        numbers = {"gpu_hours": hours, **{f"wall_hours_{n}": wall for n, wall in zip(GPUS, walls, strict=True)}}
        numbers |= {"kept_gb": kept / GIGA, "state_gb": found.state / GIGA}
        line = {"experiment": name, "rows": found.rows, "parameters": found.parameters}
        line |= {"training_flops": f"{found.flops:.4g}"} | {k: n and round(n, 2) for k, n in numbers.items()}
        lines.append(line | {"not_counted": ""})
    table = pd.DataFrame(lines)
    return table.astype({column: "Int64" for column in ("rows", "parameters") if column in table})


def show_all(typed: Sequence[str], out: Path | None, *, force: bool) -> None:
    """Print a line for each experiment of the paper, and write them where asked."""
    if out is not None and out.suffix != ".csv":
        raise UserError(f"out={out}: the table is written as csv, name a file that ends in .csv")
    if out is not None and out.exists() and not force:
        raise UserError(f"out={out} is there already: name another file, or type {FORCE} to overwrite it")
    found = overview(paper_experiments(), typed)
    rows = []
    for line in found.to_dict("records"):
        if line["not_counted"]:
            print(f"{line['experiment']}: not counted: {line['not_counted']}")
            continue
        walls, kept = [duration(line[f"wall_hours_{n}"]) for n in GPUS], decimal(round(line["kept_gb"] * GIGA))
        rows.append([line["experiment"], str(line["rows"]), f"{line['gpu_hours']:,.1f}", *walls, kept])
    print(table(("experiment", "rows", "GPU-hours", *(f"on {n}" for n in GPUS), "kept"), rows, ("experiment",)))
    if out is not None:
        with replacing(out) as temporary:
            found.to_csv(temporary, index=False)
        print(out)


def main() -> None:
    """One experiment, by way of Hydra, or all of them."""
    typed = [f"plan.{word}" if word.split("=")[0] in SHORT else word for word in sys.argv[1:]]
    if {"all", "experiment=all"}.isdisjoint(typed):
        sys.argv[1:] = typed
        entry_point(show, whole=True)()
        return
    outs = [Path(word.removeprefix("out=")) for word in typed if word.startswith("out=")]
    settings = [word for word in typed if word not in ("all", "experiment=all", FORCE) and not word.startswith("out=")]
    one_line_errors(lambda: show_all(settings, outs[-1] if outs else None, force=FORCE in typed))


if __name__ == "__main__":
    main()
