"""The examples of a split: how many there must be, and which of train are held out, whatever the files are."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.data import Task
from configs.errors import UserError
from soups.chance import uniform


def is_parted(task: Task, name: str) -> bool:
    """Whether a split is held-out that is taken from train, or the rest of train."""
    rules = (task.held_out_per_class, task.held_out_share, task.held_out_index)
    return any(rule is not None for rule in rules) and name in (task.train, task.held_out)


def source(task: Task, name: str) -> str:
    """The split whose files have split `name`: train where held-out is a part of it, test by the paper's protocol."""
    if task.protocol == "paper" and name == task.held_out:
        return task.test
    return task.train if is_parted(task, name) else name


def own_name(task: Task, name: str) -> str:
    """The data's own name for the split with the images of split `name`."""
    own = source(task, name)
    return task.folders.get(own, own)


def check_count(task: Task, name: str, where: Path, count: int) -> None:
    """Refuse a split, whose files are at `where`, with more or fewer examples than `task.counts` says."""
    expected = (task.counts or {}).get(name, count)
    if count != expected:
        raise UserError(
            f"{where} has {count:,} {task.noun}, but split {name!r} has {expected:,}: restore what is missing or take "
            "away what does not belong; for a subset of your own, task.counts=null"
        )


def rows_of(
    task: Task, name: str, labels: NDArray[np.int64], classes: Sequence[str], *, key: Callable[[int], str], where: Path
) -> NDArray[np.int64]:
    """Which of N examples of `source(task, name)` are split `name`'s; all, or those that are held out, or the others.

    Held-out examples are chosen by keyed draws. Of a share, they are those whose draw is below it, about as many as it
    says and at least one of each class: each example has its place whatever stands beside it. Of a number for each
    class, they are those with the lowest draws.

    Args:
        task: says which share, or how many of each class.
        name: of the split.
        labels: (N,) class ids.
        classes: their names, which are part of the keys of images.
        key: names image i within its class, or is the words of text i.
        where: the folder or file of these examples, for errors.

    Raises:
        UserError: not as many examples as `task.counts` says, or none left of a class.
    """
    check_count(task, source(task, name), where, len(labels))
    if not is_parted(task, name):
        return np.arange(len(labels))
    # One key has one draw. Texts have it in all classes: equal ones are in one split, whatever their labels.
    keys = [key(row) if task.is_text else f"{classes[label]}/{key(row)}" for row, label in enumerate(labels.tolist())]
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.searchsorted(labels[order], np.arange(1, len(classes))))  # rows of each class
    keys_of_class = [Counter(keys[row] for row in rows) for rows in members]
    per_class = task.held_out_per_class or 0
    if task.held_out_share is not None:
        rule, chosen = f"share={task.held_out_share}", _below_share(keys, keys_of_class, task.held_out_share)
    else:
        prefixes = [f"{each}/" if task.is_text else "" for each in classes]
        rule, chosen = f"per_class={per_class}", _lowest(keys_of_class, prefixes, per_class)
    held_out = np.array([each in chosen for each in keys])
    for rows, each in zip(members, classes, strict=True):
        if held_out[rows].all() or per_class >= len(rows):
            raise UserError(
                f"task.held_out_{rule} leaves none of the {len(rows)} {task.noun} of class {each!r} in {where} to "
                "train on"
            )
    return np.flatnonzero(held_out == (name == task.held_out))


def _below_share(keys: Sequence[str], keys_of_class: Sequence[Counter[str]], share: float) -> set[str]:
    """Those whose draw is below the share; of a class without such, the one with the lowest."""
    draws = {each: uniform("held_out", each) for each in dict.fromkeys(keys)}
    chosen = {each for each, draw in draws.items() if draw < share}
    for own in keys_of_class:
        if own and own.keys().isdisjoint(chosen):
            chosen.add(min(own, key=lambda each: (draws[each], each)))
    return chosen


def _lowest(keys_of_class: Sequence[Counter[str]], prefixes: Sequence[str], per_class: int) -> set[str]:
    """Of each class those with the lowest draws, so many rows or, where several have one key, the most below that.

    Those that stand in two classes stay in train.
    """
    owners, chosen = Counter(each for own in keys_of_class for each in own), set()
    for own, prefix in zip(keys_of_class, prefixes, strict=True):
        left = per_class
        for _, each in sorted((uniform("held_out", f"{prefix}{each}"), each) for each in own):
            if owners[each] == 1 and own[each] <= left:
                chosen.add(each)
                left -= own[each]
    return chosen
