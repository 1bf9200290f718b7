"""From a task's settings to images, labels and class names, whatever the task."""

from functools import lru_cache
from pathlib import Path

from configs.schema import Task
from tasks.emoji.load import class_names as emoji_class_names
from tasks.emoji.load import load_split as load_emoji_split
from tasks.split import Split

ROOT = Path(__file__).resolve().parents[1]


def class_names(task: Task) -> tuple[str, ...]:
    """The task's label space, C names in the order of the class ids."""
    return emoji_class_names(ROOT / task.folder)[: task.classes]


@lru_cache(maxsize=16)
def load_split(task: Task, name: str) -> Split:
    """The images and labels of one split; with `task.classes`, those of the first classes only.

    Decoded once in a process: a worker trains and evaluates many models on the same images.

    Raises:
        DataError: a missing or damaged file, or labels that contradict the class list.
    """
    split = load_emoji_split(name, ROOT / task.folder)
    if task.classes is None:
        return split
    kept = split.labels < task.classes
    return Split(
        name=name, images=split.images[kept], labels=split.labels[kept], digest=f"{split.digest}/{task.classes}"
    )
