"""The rows of a sweep: row i is a pure function of (sweep seed, i, field name)."""

import math
from typing import Any

from configs.chance import uniform
from configs.errors import UserError
from configs.schema import Choice, Distribution, Experiment, Integers, LogUniform, ZeroOrUniform, dump, parse_values
from store.runs import digest_of


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


def draw(config: Experiment, row: int) -> dict[str, float | int | str]:
    """The drawn values of a row, by dotted field name; row 0, the initialisation, draws nothing."""
    if row == 0:
        return {}
    sweep = config.sweep
    return {field: inverse(law, uniform(sweep.seed, row, field)) for field, law in sweep.drawn.items()}


def row_config(config: Experiment, row: int) -> Experiment:
    """The experiment with a row's drawn values in place.

    Raises:
        UserError: a drawn field does not exist, or a drawn value is outside its limits.
    """
    values = dump(config)
    values["sweep"]["index"] = row
    for field, value in draw(config, row).items():
        group, name = field.split(".")
        if name not in values[group]:
            raise UserError(f"sweep.draw names {field}, which is not a setting; configs/schema.py lists them")
        values[group][name] = value
    return parse_values(values)


def identity(config: Experiment, row: int) -> str:
    """32 hex digits that name what training this row means.

    Settings that cannot change its weights on one machine (where it runs, how many rows there are, recipes,
    tables) are left out, so that a sweep can grow and move.
    """
    values = dump(row_config(config, row))
    parts: dict[str, Any] = {name: values[name] for name in ("task", "model")}
    if row > 0:
        parts |= {name: values[name] for name in ("optim", "augment")} | {"seed": config.sweep.seed, "row": row}
    return digest_of(parts)
