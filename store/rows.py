"""The rows of a sweep, and what names each: row i is a pure function of (sweep seed, i, field name)."""

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from configs.errors import UserError
from configs.registered import read_table
from configs.schema import SEARCHED, Experiment, checked, dump
from configs.training import Choice, Distribution, Integers, LogUniform, Sweep, ZeroOrUniform, arithmetic
from soups.chance import uniform
from soups.files.atomic import digest_of, read_json

GROUPS = ("task", "model", "optim", "augment", "regularizer")  # what rows can differ in
# What does not change a row's weights: where things lie on a disk, what their owners call them, and what only reports.
LEFT_OUT = {
    "task": {"folder", "listings", "path_column", "split_column", "counts", "numbered"}
    | {"title", "titles", "proxy_for"}
    | {"test", "shifts", "annotations", "subsets", "objectnet", "objectnet_border"}
    | {"overlap_allowed", "bootstrap_unit"},
    "model": {"proxy_for"},
}
BY_SPLIT = ("folders", "take", "metrics")  # settings of a task that count only for the splits that train and select
# Files whose name counts and whose folder does not.
FILES = {"task": ("names", "held_out_index", "table"), "model": ("weights",)}


def score_of(held_out: dict[str, Any]) -> float:
    """A model's score in a record of held-out: by the task's metric, else the share of right answers."""
    return held_out["score"] if "score" in held_out else held_out["correct"] / held_out["n"]


def inverse(distribution: Distribution, u: float) -> float | int | str:
    """The value below which a share `u` in [0, 1) of the distribution lies.

    >>> inverse(Integers(kind="integers", low=4, high=7), 0.999)
    7
    >>> inverse(ZeroOrUniform(kind="zero_or_uniform", zero=0.5, low=0.0, high=1.0), 0.75)
    0.5
    """
    match distribution:
        case LogUniform():
            return 10 ** (distribution.low + u * (distribution.high - distribution.low))
        case ZeroOrUniform():
            if u < distribution.zero:
                return 0.0
            rest = (u - distribution.zero) / (1 - distribution.zero)
            return distribution.low + rest * (distribution.high - distribution.low)
        case Integers():
            return distribution.low + math.floor(u * (distribution.high - distribution.low + 1))
        case Choice():
            return distribution.values[math.floor(u * len(distribution.values))]


def draw(config: Experiment, row: int) -> dict[str, Any]:
    """The values that only this row has, by dotted field name; none of row 0, the initialisation.

    In a list times a grid, row 1 + i x G + j is the i-th of the list with the j-th of the grid's G combinations, whose
    last field changes fastest.
    """
    if row == 0:
        return {}
    sweep = config.sweep
    laws = {f"{group}.{field}": law for group, fields in sweep.draw.items() for field, law in fields.items()}
    if laws:
        return {field: inverse(law, uniform(sweep.seed, row, field)) for field, law in laws.items()}
    axes = {f"{group}.{field}": values for group, fields in sweep.grid.items() for field, values in fields.items()}
    listed: Sequence[dict[Any, dict[str, Any]]] = (
        sweep.listed or ({},) if sweep.file is None else read_table(sweep.file)
    )
    if sweep.file is not None and len(listed) != sweep.rows:
        raise UserError(f"{sweep.file} has {len(listed)} rows, but sweep.rows={sweep.rows}")
    combinations = list(product(*axes.values()))
    i, j = divmod(row - 1, len(combinations))
    line = listed[i % len(listed)]  # rows that differ by their random stream alone share one empty line
    own = {f"{group}.{field}": value for group, fields in line.items() for field, value in fields.items()}
    return own | dict(zip(axes, combinations[j], strict=True))


@cache
def _best_settings(run: Path) -> dict[str, Any]:
    """`optim` and `augment` of the row of a finished search that is best on held-out, of equals the first."""

    def read(row: int, name: str) -> Any:
        path = run / "ingredients" / f"{row:03d}" / name
        if not path.exists():
            raise UserError(
                f"sweep.best_of: row {row} of {run} is not finished, so that its best settings are not known; run "
                f"python reproduce.py experiment={run.name} first"
            )
        return read_json(path)

    rows = range(1, checked(Sweep, read(0, "config.json")["sweep"]).size + 1)
    done = {row: read(row, "done.json") for row in rows}
    scores = {row: score_of(each["held_out"]) for row, each in done.items() if each["status"] == "done"}
    if not scores:
        raise UserError(f"sweep.best_of: every row of {run} diverged")
    best = read(max(scores, key=lambda row: (scores[row], -row)), "config.json")
    return {group: best[group] for group in SEARCHED}


def require_trainable(config: Experiment) -> None:
    """Refuse, with a UserError, rows that take settings or heads from runs that are not finished, or no rows at all."""
    if config.towers:
        raise UserError(
            f"{config.name} trains nothing, it is made of the rows that `towers` names: python -m analysis "
            f"artefact=figuree1 experiment={config.name}"
        )
    if config.sweep.best_of is not None:
        _best_settings(config.sweep.best_of)
    if config.model.head_of or "model.head_of" in config.sweep.varied:
        rows = range(1, config.sweep.size + 1)
        for run in dict.fromkeys(row_config(config, row).model.head_of for row in rows):
            if run is not None:
                require_head(config, run)


def require_head(config: Experiment, run: str) -> None:
    """Raise a UserError where rows have the head of another run that is not there."""
    folder = config.paths.runs / run / "ingredients" / "000"
    if not (folder / "done.json").exists():
        raise UserError(
            f"model.head_of={run}: {folder} holds no finished row 0: make it first (configs/sweep/vit_g_probes.yaml)"
        )


def row_config(config: Experiment, row: int) -> Experiment:
    """The experiment with a row's own values in place; a UserError names a varied field that is wrong."""
    values = dump(config)
    if config.sweep.best_of is not None:
        with suppress(UserError):  # until that search is finished, its own settings let it be planned
            values |= _best_settings(config.sweep.best_of)
    values["sweep"]["index"] = row
    for field, value in draw(config, row).items():
        group, _, name = field.partition(".")
        if group not in GROUPS:
            raise UserError(f"the sweep varies {field}, but rows can differ in {', '.join(GROUPS)} only")
        values[group][name] = value
    return checked(Experiment, values)


def teachers(config: Experiment, row: int) -> tuple[int, ...]:
    """The rows that must be trained before this one, since it is distilled from them."""
    distill = row_config(config, row).regularizer.distill if row else None
    return distill.rows if distill is not None else ()


def meaning(own: Experiment) -> dict[str, Any]:
    """The settings on which a row's weights depend, without defaults, so that a setting added later renames no row.

    Row 0 is the initialisation, without training's settings. Precisions are those of training's forward passes and of
    evaluation's, by which the probe is made and recipes sort.
    """
    row, compute = own.sweep.index or 0, own.compute
    precision, evaluated = (arithmetic(each, tf32=compute.tf32) for each in (compute.precision, compute.evaluates_in))
    parts: dict[str, Any] = {}
    for group in GROUPS if row else ("task", "model"):
        settings = getattr(own, group)
        dumped = TypeAdapter(type(settings)).dump_python(settings, mode="json", exclude_defaults=True)
        parts[group] = {name: value for name, value in dumped.items() if name not in LEFT_OUT.get(group, ())}
    task, used = parts["task"], (own.task.train, own.task.held_out)
    for name in BY_SPLIT:
        found = {split: value for split, value in task.pop(name, {}).items() if split in used}
        task |= {name: found} if found else {}
    for group, names in FILES.items():
        parts[group] |= {name: Path(parts[group][name]).name for name in names if name in parts[group]}
    if row:
        parts |= {"precision": precision, "seed": own.sweep.seed, "row": row}
        if compute.resized is not None:
            parts["resized"] = [compute.resized, compute.resized_quality]
        if compute.decoder != "pillow":
            parts["decoder"] = compute.decoder
    parts |= {"evaluated": evaluated} if evaluated != precision else {}
    return parts | ({"imported": True, "row": row} if own.sweep.imported is not None else {})


def identity(config: Experiment, row: int) -> str:
    """32 hex digits that name what training this row means; where it runs and what only reports are left out."""
    return digest_of(meaning(row_config(config, row)))
