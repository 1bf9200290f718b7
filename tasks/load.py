"""From a task's settings to examples, labels, annotations and class names, whatever the task."""

from functools import lru_cache
from pathlib import Path

from torch import Tensor

from configs.errors import UserError
from configs.schema import Task
from tasks import annotations, cars, cifar, glue, image_folder, listings, parquet, wilds
from tasks.emoji.load import class_names as emoji_class_names
from tasks.emoji.load import load_split as load_emoji_split
from tasks.files import ROOT, FileSplit, Lists, listed_split
from tasks.image_folder import FolderSplit
from tasks.parquet import ParquetSplit
from tasks.parts import own_name
from tasks.sentiment import load as sentiment
from tasks.split import Examples, Split, narrowed
from tasks.tables import own_sentences
from tasks.texts import TextSplit, text_split

LISTS: dict[str, Lists] = {
    "dtd": listings.DTD,
    "food101": listings.FOOD101,
    "sun397": listings.SUN397,
    "cars": cars.CARS,
    "fmow": wilds.FMOW,
    "iwildcam": wilds.IWILDCAM,
}


def _names_in(path: str, count: int) -> tuple[str, ...]:
    """The class names of a file, one a line."""
    try:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"task.names={path}: neither folder, imagenet, nor a readable file ({error})") from None
    names = tuple(line.strip() for line in lines)
    if len(names) != count or not all(names):
        raise UserError(f"task.names={path} has {sum(map(bool, names))} names for {count} classes")
    return names


def _own_names(task: Task) -> tuple[str, ...]:
    """What the data call their classes."""
    folder = ROOT / task.folder
    if task.kind == "image_folder":
        return image_folder.class_names(task)
    if task.kind == "parquet":
        return parquet.class_names(task)
    if task.kind in ("cifar10", "cifar100"):
        names = cifar.class_names(task)
    elif task.kind == "emoji":
        names = emoji_class_names(folder)
    else:
        names = LISTS[task.kind].names(folder)
    if len(names) != task.num_classes:
        raise UserError(f"task.num_classes={task.num_classes}, but {task.folder} has {len(names)} classes")
    return names


def _all_class_names(task: Task) -> tuple[str, ...]:
    if task.names == "folder" or (task.names == "imagenet" and task.kind == "image_folder"):
        return _own_names(task)
    return _names_in(task.names, task.num_classes)


def _text_split(task: Task, name: str) -> TextSplit:
    match task.kind:
        case "glue":
            return glue.load_split(task, name)
        case "sentiment":
            return sentiment.load_split(task, name)
    path = ROOT / task.folder / f"{own_name(task, name)}.tsv"
    return text_split(task, name, own_sentences(path, task.label, task.options))


def _image_split(task: Task, name: str) -> Split | FolderSplit | FileSplit | ParquetSplit:
    if task.kind == "image_folder":
        return image_folder.load_split(task, name)
    if task.kind == "emoji":
        return load_emoji_split(name, ROOT / task.folder)
    if task.kind == "parquet":
        return parquet.load_split(task, name)
    if task.kind in ("cifar10", "cifar100"):
        return cifar.load_split(task, name)
    return listed_split(task, name, LISTS[task.kind])


def _ids(task: Task) -> range:
    """The classes of the data that the task is about; there are `task.size`."""
    return range(task.part, task.num_classes, task.parts)[: task.classes]


def class_names(task: Task) -> tuple[str, ...]:
    """The task's label space, C names in the order of the class ids; of the data, or of the file `task.names`.

    Raises:
        UserError: the data have another number of classes than the settings say, or a file is missing or damaged.
    """
    names = task.options if task.is_text else _all_class_names(task)
    return tuple(names[i] for i in _ids(task))


@lru_cache(maxsize=16)
def load_split(task: Task, name: str) -> Examples:
    """The examples and labels of one split; with `task.parts` or `task.classes`, those of some classes only.

    Read once in a process: a worker trains and evaluates many models on the same examples.

    Raises:
        UserError: a missing or damaged file, labels that contradict the class list, or not as many examples as
            `task.counts` says.
    """
    split = _text_split(task, name) if task.is_text else _image_split(task, name)
    if task.parts == 1 and task.classes is None:
        return split
    part = "" if task.parts == 1 else f"/{task.part} of {task.parts}"
    first = "" if task.classes is None else f"/{task.classes}"
    return split.of_classes(_ids(task), f"{split.digest}{part}{first}")


def load_annotations(task: Task) -> dict[str, Tensor]:
    """For each of `task.annotations`, (N, C) bool of the test split: which classes count as right for each image.

    An image without any is one that the annotators left out; it belongs to no denominator.

    Raises:
        UserError: a file that is missing, or not of these images and classes; images that have no file names.
    """
    if not task.annotations:
        return {}
    whole = None if task.is_text else _image_split(task, task.test)
    if whole is None or isinstance(whole, Split | ParquetSplit):
        raise UserError(f"task.annotations are matched by file name, which images of task.kind={task.kind} do not have")
    rows = narrowed(whole, _ids(task)).rows
    found = {}
    for name, path in task.annotations.items():
        answers = annotations.load_annotations(Path(ROOT / path), whole, task.num_classes)
        found[name] = answers[rows][:, list(_ids(task))]
    return found
