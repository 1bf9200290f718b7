"""From a task's settings to examples, labels, annotations and class names, whatever the task."""

from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from configs.data import Emoji, Task
from configs.errors import UserError
from tasks import cifar, image_folder, image_lists, parquet
from tasks.emoji import load as emoji
from tasks.files import ROOT, Files
from tasks.sentiment import load as sentiment
from tasks.split import Examples, ImageSplit
from tasks.texts import load_glue, load_sentences


class Loader(NamedTuple):
    """The readers of a kind of task."""

    split: Callable[[Any, str], Examples]  # a task of this kind, a split -> its examples of all classes
    names: Callable[[Any], tuple[str, ...]]  # a task of this kind -> the data's names of its classes


LOADERS = {
    "emoji": Loader(
        lambda task, name: emoji.load_split(name, ROOT / task.folder, task.ids, task.fold),
        lambda task: emoji.class_names(ROOT / task.folder),
    ),
    "image_folder": Loader(image_folder.load_split, image_folder.class_names),
    "cifar10": Loader(cifar.load_split, cifar.class_names),
    "cifar100": Loader(cifar.load_split, cifar.class_names),
    **dict.fromkeys(("image_table", *image_lists.PUBLISHED), Loader(image_lists.load_split, image_lists.class_names)),
    "parquet": Loader(parquet.load_split, parquet.class_names),
    "glue": Loader(load_glue, attrgetter("options")),
    "sentences": Loader(load_sentences, attrgetter("options")),
    "sentiment": Loader(sentiment.load_split, attrgetter("options")),
}


def class_names(task: Task) -> tuple[str, ...]:
    """The task's label space, C names in the order of the class ids; of the data, or of the file `task.names`."""
    if task.names == "folder" or (task.names == "imagenet" and task.kind == "image_folder"):
        names = LOADERS[task.kind].names(task)
        if len(names) != task.num_classes:
            raise UserError(f"task.num_classes={task.num_classes}, but {task.folder} has {len(names)} classes")
    else:
        try:
            names = tuple(line.strip() for line in (ROOT / task.names).read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError) as error:
            raise UserError(
                f"task.names={task.names}: neither folder, imagenet, nor a readable file ({error})"
            ) from None
        if len(names) != task.num_classes or not all(names):
            raise UserError(f"task.names={task.names} has {sum(map(bool, names))} names for {task.num_classes} classes")
    return tuple(names[i] for i in task.ids)


@lru_cache(maxsize=16)
def load_split(task: Task, name: str) -> Examples:
    """The examples and labels of one split; with `task.parts` or `task.classes`, those of some classes only.

    Read once in a process: a worker trains and evaluates many models on the same examples.

    Raises:
        UserError: a missing or damaged file, labels that contradict the class list, or not as many examples as
            `task.counts` says.
    """
    split = LOADERS[task.kind].split(task, name)
    if task.parts == 1 and task.classes is None:
        return split
    part = "" if task.parts == 1 else f"/{task.part} of {task.parts}"
    first = "" if task.classes is None else f"/{task.classes}"
    return split.of_classes(task.ids, f"{split.digest}{part}{first}")


def count(task: Task, name: str) -> int:
    """How many examples a split has, as `load_split`, but without decoding the pictures of the embedded benchmark."""
    if not isinstance(task, Emoji):
        return len(load_split(task, name))
    labels = emoji.read_split(name, ROOT / task.folder, task.fold)[0]["label"].to_pylist()
    return sum(label in task.ids for label in labels)


def check_annotations(task: Task) -> None:
    """Refuse a task whose data are here but whose `annotations` are not, before anything is trained."""
    for name, path in task.annotations.items():
        if (ROOT / task.folder).exists() and not (ROOT / path).exists():
            raise UserError(
                f"task.annotations.{name}: there is no {path}; tasks/README.md says where it is from. Without this "
                f"column of the tables: ++task.annotations.{name}=null"
            )


def load_annotations(task: Task) -> dict[str, Tensor]:
    """For each of `task.annotations`, (N, C) bool of the test split: which classes count as right for each image.

    An image without any is one that the annotators left out; it belongs to no denominator.
    """
    if not task.annotations:
        return {}
    check_annotations(task)
    whole = LOADERS[task.kind].split(task, task.test)
    if not isinstance(whole, ImageSplit) or not isinstance(whole.stored, Files):
        raise UserError(f"task.annotations are matched by file name, which images of task.kind={task.kind} do not have")
    rows, _, _ = whole.rows_of(task.ids)
    found: dict[str, Tensor] = {}
    for name, path in task.annotations.items():
        answers = image_folder.load_annotations(Path(ROOT / path), whole, task.num_classes)
        found[name] = answers[rows][:, list(task.ids)]
    return found
