"""The rows of a sweep: row i is a pure function of (sweep seed, i, field name).

python -m finetune.rows experiment=demo    lists them, with what differs from row to row; nothing is trained
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from configs.chance import uniform
from configs.errors import UserError
from configs.schema import Experiment, dump, parse_values
from configs.training import Choice, Distribution, Integers, LogUniform, Sweep, ZeroOrUniform
from store.runs import digest_of
from store.tables import read_table

REPORTING = {  # of a task, what training does not depend on
    "test",
    "shifts",
    "counts",
    "metrics",
    "annotations",
    "subsets",
    "numbered",
    "objectnet",
    "objectnet_border",
    "bootstrap_unit",
    "proxy_for",
}


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


def _listed(sweep: Sweep) -> Sequence[dict[Any, dict[str, Any]]]:
    """The nested values of each line of the sweep's file, or its own list."""
    if sweep.file is None:
        return sweep.listed or ({},)
    table = read_table(sweep.file)
    if len(table) != sweep.rows:
        raise UserError(f"{sweep.file} has {len(table)} rows, but sweep.rows={sweep.rows}")
    return table


def draw(config: Experiment, row: int) -> dict[str, Any]:
    """What is a row's own, by dotted field name; row 0, the initialisation, has nothing of its own.

    Of a random sweep these are draws. Of a list times a grid, row 1 + i x G + j is the i-th of the list with the j-th
    of the grid's G combinations, whose last field changes fastest.

    Raises:
        UserError: the sweep's file is missing, damaged, or has another number of rows than the sweep.
    """
    if row == 0:
        return {}
    sweep = config.sweep
    laws = {f"{group}.{field}": law for group, fields in sweep.draw.items() for field, law in fields.items()}
    if laws:
        return {field: inverse(law, uniform(sweep.seed, row, field)) for field, law in laws.items()}
    axes = {f"{group}.{field}": values for group, fields in sweep.grid.items() for field, values in fields.items()}
    listed = _listed(sweep)
    combinations = list(product(*axes.values()))
    if sweep.file is None and not sweep.listed and not axes:
        return {}
    i, j = divmod(row - 1, len(combinations))
    own = {f"{group}.{field}": value for group, fields in listed[i].items() for field, value in fields.items()}
    return own | dict(zip(axes, combinations[j], strict=True))


def row_config(config: Experiment, row: int) -> Experiment:
    """The experiment with a row's own values in place.

    Raises:
        UserError: a varied field does not exist, or a value is outside its limits.
    """
    values = dump(config)
    values["sweep"]["index"] = row
    for field, value in draw(config, row).items():
        group, name = field.split(".")
        if name not in values[group]:
            raise UserError(f"the sweep varies {field}, which is not a setting; configs/training.py lists them")
        values[group][name] = value
    return parse_values(values)


def teachers(config: Experiment, row: int) -> tuple[int, ...]:
    """The rows that must be trained before this one, since it is distilled from them."""
    distill = row_config(config, row).regularizer.distill if row else None
    return distill.rows if distill is not None else ()


def identity(config: Experiment, row: int) -> str:
    """32 hex digits that name what training this row means.

    Settings that cannot change its weights on one machine (where it runs, how many rows there are, which splits
    report, recipes, tables) are left out, so that a sweep can grow and move.
    """
    values = dump(row_config(config, row))
    task = {name: value for name, value in values["task"].items() if name not in REPORTING}
    for by_split in ("folders", "take"):
        own = task[by_split] or {}
        task[by_split] = {split: value for split, value in own.items() if split in (task["train"], task["held_out"])}
    parts: dict[str, Any] = {"task": task, "model": values["model"]}
    if row > 0:
        parts |= {name: values[name] for name in ("optim", "augment", "regularizer")}
        parts |= {"precision": values["compute"]["precision"], "seed": config.sweep.seed, "row": row}
    if config.sweep.imported is not None:
        parts |= {"imported": True, "row": row}
    return digest_of(parts)


if __name__ == "__main__":
    import shlex
    import sys

    from configs.cli import entry_point
    from finetune.listing import print_rows

    entry_point(lambda config: print_rows(config, shlex.join(sys.argv[1:])))()
