"""How many examples a split must have, and which of train are held out, whatever the files are."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.data import Task
from configs.errors import UserError
from soups.chance import uniform


def parted(task: Task, name: str) -> bool:
    """Whether a split is held-out that is taken from train, or the rest of train."""
    rules = (task.held_out_per_class, task.held_out_share, task.held_out_index)
    return any(rule is not None for rule in rules) and name in (task.train, task.held_out)


def noun(task: Task) -> str:
    """What examples are called in messages."""
    return "texts" if task.is_text else "images"


def source(task: Task, name: str) -> str:
    """The split whose files have the images of split `name`: train, where held-out is a part of it, and by the paper's
    protocol for GLUE the test split for held-out.
    """
    if task.protocol == "paper" and name == task.held_out:
        return task.test
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
    """(N,) which examples are held out, by keyed draws.

    Of a share, those whose draw is below it, about as many as it says and at least one of each class: each example has
    its place whatever stands beside it. Of a number for each class, those with the lowest draws.

    Args:
        task: says which share, or how many of each class.
        labels: (N,) class ids.
        classes: their names, which are part of the keys of images.
        key: names image i within its class, or is what text i says.
        where: of these examples, for the error.

    Raises:
        UserError: a class would have no example left.
    """
    # One key has one draw. Texts have it in all classes: equal ones are in one split, whatever their labels.
    keys = [key(row) if task.is_text else f"{classes[label]}/{key(row)}" for row, label in enumerate(labels.tolist())]
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(len(classes) + 1))
    rows_of_class = [order[ends[label] : ends[label + 1]].tolist() for label in range(len(classes))]
    if task.held_out_share is not None:
        chosen = _below_share(keys, rows_of_class, task.held_out_share)
    else:
        chosen = _lowest(keys, rows_of_class, classes, key, task.held_out_per_class or 0)
    held_out = np.array([each in chosen for each in keys])
    for rows, name in zip(rows_of_class, classes, strict=True):
        if held_out[rows].all() or (task.held_out_per_class or 0) >= len(rows):
            share = task.held_out_share
            rule = f"per_class={task.held_out_per_class}" if share is None else f"share={share}"
            raise UserError(
                f"task.held_out_{rule} leaves none of the {len(rows)} {noun(task)} of class {name!r} "
                f"in {where} to train on"
            )
    return held_out


def _below_share(keys: Sequence[str], rows_of_class: Sequence[Sequence[int]], share: float) -> set[str]:
    """Those whose draw is below the share; of a class without such, the one with the lowest."""
    draws = {each: uniform("held_out", each) for each in dict.fromkeys(keys)}
    chosen = {each for each, draw in draws.items() if draw < share}
    for rows in rows_of_class:
        own = {keys[row] for row in rows}
        if own and own.isdisjoint(chosen):
            chosen.add(min(own, key=lambda each: (draws[each], each)))
    return chosen


def _lowest(
    keys: Sequence[str],
    rows_of_class: Sequence[Sequence[int]],
    classes: Sequence[str],
    key: Callable[[int], str],
    per_class: int,
) -> set[str]:
    """Of each class those with the lowest draws, so many rows or, where several have one key, the most below that.

    Those that stand in two classes stay in train.
    """
    owners = Counter(each for rows in rows_of_class for each in {keys[row] for row in rows})
    chosen = set()
    for rows, name in zip(rows_of_class, classes, strict=True):
        copies = Counter(keys[row] for row in rows)
        first = {keys[row]: row for row in reversed(rows)}  # of the rows with one key
        draws = sorted((uniform("held_out", name, key(row)), key(row), each) for each, row in first.items())
        left = per_class
        for _, _, each in draws:
            if owners[each] == 1 and copies[each] <= left:
                chosen.add(each)
                left -= copies[each]
    return chosen


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
