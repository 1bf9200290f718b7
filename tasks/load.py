"""From a task's settings to images, labels and class names, whatever the task."""

from functools import lru_cache
from pathlib import Path

from configs.errors import UserError
from configs.schema import Task
from tasks import image_folder
from tasks.emoji.load import class_names as emoji_class_names
from tasks.emoji.load import load_split as load_emoji_split
from tasks.image_folder import FolderSplit
from tasks.split import Images, Split

ROOT = Path(__file__).resolve().parents[1]


def _all_class_names(task: Task) -> tuple[str, ...]:
    if task.kind == "image_folder":
        return image_folder.class_names(task)
    names = emoji_class_names(ROOT / task.folder)
    if len(names) != task.num_classes:
        raise UserError(f"task.num_classes={task.num_classes}, but {task.folder} has {len(names)} classes")
    return names


def _whole_split(task: Task, name: str) -> Split | FolderSplit:
    if task.kind == "image_folder":
        return image_folder.load_split(task, name)
    return load_emoji_split(name, ROOT / task.folder)


def _ids(task: Task) -> range:
    """The classes of the data that the task is about; there are `task.size`."""
    return range(task.part, task.num_classes, task.parts)[: task.classes]


def class_names(task: Task) -> tuple[str, ...]:
    """The task's label space, C names in the order of the class ids.

    Raises:
        UserError: the data have another number of classes than the settings say, or a file is missing or damaged.
    """
    names = _all_class_names(task)
    return tuple(names[i] for i in _ids(task))


@lru_cache(maxsize=16)
def load_split(task: Task, name: str) -> Images:
    """The images and labels of one split; with `task.parts` or `task.classes`, those of some classes only.

    Read once in a process: a worker trains and evaluates many models on the same images.

    Raises:
        UserError: a missing or damaged file, or labels that contradict the class list.
    """
    split = _whole_split(task, name)
    if task.parts == 1 and task.classes is None:
        return split
    part = "" if task.parts == 1 else f"/{task.part} of {task.parts}"
    first = "" if task.classes is None else f"/{task.classes}"
    return split.of_classes(_ids(task), f"{split.digest}{part}{first}")
