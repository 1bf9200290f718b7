"""How many examples a split must have, and which of train are held out, whatever the files are."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.chance import uniform
from configs.errors import UserError
from configs.schema import Task


def parted(task: Task, name: str) -> bool:
    """Whether a split is held-out that is taken from train, or the rest of train."""
    rules = (task.held_out_per_class, task.held_out_share, task.held_out_index)
    return any(rule is not None for rule in rules) and name in (task.train, task.held_out)


def noun(task: Task) -> str:
    """What examples are called in messages."""
    return "texts" if task.is_text else "images"


def source(task: Task, name: str) -> str:
    """The split whose files have the images of split `name`: train, where held-out is a part of it."""
    return task.train if parted(task, name) else name


def own_name(task: Task, name: str) -> str:
    """What the data call the split with the images of split `name`."""
    own = source(task, name)
    return task.folders.get(own, own)


def check_count(task: Task, name: str, where: Path, count: int) -> None:
    """Refuse a split that is not whole.

    Args:
        task: says in `task.counts` how many images there are.
        name: of a split as its files have it.
        where: its folder or file.
        count: how many images are there.

    Raises:
        UserError: there should be more or fewer.
    """
    expected = (task.counts or {}).get(name, count)
    if count != expected:
        raise UserError(
            f"{where} has {count:,} {noun(task)}, but split {name!r} has {expected:,}: restore what is missing or take "
            "away what does not belong; for a subset of your own, task.counts=null"
        )


def drawn(
    task: Task, labels: NDArray[np.int64], classes: Sequence[str], key: Callable[[int], str], *, where: Path
) -> NDArray[np.bool_]:
    """(N,) the examples of each class whose keyed draws are the lowest, wherever and beside whatever they stand.

    Args:
        task: says how many of each class, or which share, rounded and at least one.
        labels: (N,) class ids.
        classes: their names, which are part of the keys.
        key: names example i within its class.
        where: of these examples, for the error.

    Raises:
        UserError: a class would have no example left.
    """
    held_out = np.zeros(len(labels), dtype=np.bool_)
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(len(classes) + 1))
    for label, name in enumerate(classes):
        rows = order[ends[label] : ends[label + 1]].tolist()
        share = task.held_out_share
        per_class = (task.held_out_per_class or 0) if share is None else max(1, round(share * len(rows)))
        if len(rows) <= per_class:
            rule = f"per_class={per_class}" if share is None else f"share={share}"
            raise UserError(
                f"task.held_out_{rule} leaves none of the {len(rows)} {noun(task)} of class {name!r} "
                f"in {where} to train on"
            )
        draws = sorted((uniform("held_out", name, key(row)), key(row), row) for row in rows)
        held_out[[row for _, _, row in draws[:per_class]]] = True
    return held_out


def rows_of(
    task: Task,
    name: str,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    *,
    key: Callable[[int], str],
    where: Path,
) -> NDArray[np.int64]:
    """Which examples of `source(task, name)` are split `name`'s; all, or those that are held out, or the others.

    Raises:
        UserError: not as many examples as `task.counts` says, or none left of a class.
    """
    check_count(task, source(task, name), where, len(labels))
    if not parted(task, name):
        return np.arange(len(labels))
    held_out = drawn(task, labels, classes, key, where=where)
    return np.flatnonzero(held_out == (name == task.held_out))
