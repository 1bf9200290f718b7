"""Checkpoints of one run: their order in time, the last or the best of them, and what each weighs in an average."""

import json
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from math import isnan, sqrt
from pathlib import Path

from soups.errors import UserError
from soups.files.folders import short_names
from soups.scores import given_scores

NUMBER = re.compile(r"\d+\.\d+|\d+")
STATE = "trainer_state.json"


def factors(kind: str, taken: int) -> tuple[float, float]:
    """What a running sum of `taken` models is multiplied by before the next is added to it, and what that one weighs.

    Kinds are "uniform", all alike; "ema:0.99", average <- 0.99 x average + 0.01 x model; and "1-sqrt", the weights
    sqrt(j + 1) - sqrt(j) of models j = 0, 1, ..., with which the update that led to model j of n counts
    1 - sqrt(j / n), as if the learning rate had been decayed so; unlike their sum, these weights do not depend on n.

    Source: Tian et al. 2025 (arXiv 2507.17634) for weights and decay of the learning rate; Haegele et al. 2024 for
    1 - sqrt.
    """
    if kind == "uniform":
        return 1.0, 1.0
    if kind == "1-sqrt":
        return 1.0, sqrt(taken + 1) - sqrt(taken)
    name, _, text = kind.partition(":")
    if name == "ema" and re.fullmatch(r"0?\.\d+", text) and 0 < float(text) < 1:
        return (float(text), 1 - float(text)) if taken else (1.0, 1.0)
    raise UserError(f"weights {kind!r}: write uniform, 1-sqrt, or ema:DECAY with a decay between 0 and 1, as ema:0.99")


def shares(kind: str, count: int) -> list[float]:
    """The weights of models along a run, the earliest first, in any scale.

    >>> shares("ema:0.5", 3), [round(share, 2) for share in shares("1-sqrt", 3)]
    ([0.25, 0.25, 0.5], [1.0, 0.41, 0.32])
    """
    found: list[float] = []
    for taken in range(count):
        kept, added = factors(kind, taken)
        found = [share * kept for share in found] + [added]
    return found


def in_time_order(paths: Sequence[Path]) -> list[Path]:
    """Sorted by the whole numbers in their names, such as epochs and steps; else a UserError.

    >>> [str(path) for path in in_time_order([Path("e=1-loss=0.5.ckpt"), Path("e=0-loss=0.9.ckpt")])]
    ['e=0-loss=0.9.ckpt', 'e=1-loss=0.5.ckpt']
    """

    def typed(path: Path) -> str:
        return os.path.abspath(path)  # noqa: PTH100  # one folder may be typed in several ways

    def key(path: Path) -> list[int]:
        return [int(number) for number in NUMBER.findall(typed(path)) if "." not in number]

    found = sorted(paths, key=key)
    for one, other in pairwise(found):
        alike = NUMBER.sub("", typed(one)) == NUMBER.sub("", typed(other))
        if not alike or key(one) == key(other) or any(a > b for a, b in zip(key(one), key(other), strict=True)):
            raise UserError(
                f"{one} and {other}: their names do not say which is the earlier of one run. They may differ in "
                "numbers alone, none of which falls as others rise; name the files of one run, without last.ckpt"
            )
    return found


def logged(path: Path, metric: str) -> float:
    """What transformers' Trainer logged for a checkpoint at the step at which it was saved; else a UserError."""
    file = (path if path.is_dir() else path.parent) / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in state["log_history"] if row["step"] == state["global_step"]]
    except FileNotFoundError:
        raise UserError(f"--by {metric}: {file} is not there; name a .json, .jsonl or .csv of scores by file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    values = {row[metric] for row in rows if metric in row}
    if len(values) == 1 and isinstance(value := values.pop(), (int, float)) and not isnan(value):
        return value
    known = ", ".join(sorted({name for row in rows for name in row} - {"step", "epoch"})) or "nothing"
    raise UserError(
        f"{file}: not one number is logged as {metric!r} at step {state['global_step']}, where {known} is; evaluate "
        "whenever you save, or name a .json, .jsonl or .csv of scores by file"
    )


def chosen(
    paths: Sequence[Path], *, last: int | None = None, top: int | None = None, by: str | None = None, goal: str = ""
) -> list[Path]:
    """The `last`, or by scores the `top` checkpoints of a run, in the order of time; of equal ones the later."""
    if last is None and top is None and by is None and not goal:
        return list(paths)
    scored = (top is not None, by is not None, goal in ("max", "min"))
    if (last is None) == (top is None) or len(set(scored)) > 1:
        raise UserError("type --last N; or --top N --by FILE-OR-METRIC and --goal max or min, all three")
    count = last or top or 0
    if not 1 <= count <= len(paths):
        raise UserError(f"--{'last' if last is not None else 'top'} {count}: there are {len(paths)} files")
    found = in_time_order(paths)
    if by is None:
        return found[-count:]
    if Path(by).suffix in (".json", ".jsonl", ".csv"):
        given = given_scores(by, found, short_names(found))
        missing = [path for i, path in enumerate(found) if i not in given]
        if missing:
            raise UserError(f"{by} has no score of {missing[0]}")
    else:
        given = {i: logged(path, by) for i, path in enumerate(found)}
    sign = -1 if goal == "max" else 1
    best = sorted(given, key=lambda i: (sign * given[i], -i))[:count]
    return [found[i] for i in sorted(best)]
