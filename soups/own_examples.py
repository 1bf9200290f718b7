"""Labelled images and texts of one's own, as batches for one's own network."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from configs.errors import UserError
from configs.own_pool import HeldOutImages, HeldOutTexts
from soups.own_networks import OwnClassifier
from store.runs import digest_of
from tasks.tables import labelled, read_tsv


@dataclass(frozen=True)
class Examples:
    """Held-out examples in batches."""

    batches: Callable[[], Iterator[Any]]  # what the network is fed
    labels: Tensor  # (N,) the network's class ids
    key: str  # names the examples


def class_folders(task: HeldOutImages | HeldOutTexts | None) -> list[str]:
    """Names of the class folders of images, sorted; none of texts.

    Raises:
        UserError: there is no such folder, or none in it.
    """
    if not isinstance(task, HeldOutImages):
        return []
    if not task.root.is_dir():
        raise UserError(f"task.root={task.root}: no such folder; it has a folder of images for each class")
    names = sorted(entry.name for entry in os.scandir(task.root) if entry.is_dir())
    if not names:
        raise UserError(f"task.root={task.root} has no folders: need a folder of images for each class")
    return names


def images_of(task: HeldOutImages, own: OwnClassifier, batch_size: int) -> Examples:
    """The images of a folder under the network's own evaluation transform, in the order of their names.

    Raises:
        UserError: a class without an image, or class folders that are not what the network calls its classes.
    """
    try:
        images = ImageFolder(str(task.root), own.prepare)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"task.root={task.root}: {error}") from None
    ids = {name: i for i, name in enumerate(images.classes)}
    if own.class_ids is not None:
        if own.class_ids.keys() != ids.keys():
            odd = sorted(own.class_ids.keys() ^ ids.keys())[0]
            raise UserError(
                f"task.root={task.root}: its folders are not the classes in the network's config.json, {odd!r} is in "
                "one of them only: name the folders as id2label does"
            )
        ids = own.class_ids
    loader = DataLoader(images, batch_size)
    labels = torch.tensor([ids[images.classes[target]] for target in images.targets])
    files = [[str(Path(file).relative_to(task.root)), Path(file).stat().st_size] for file, _ in images.samples]
    return Examples(lambda: (batch for batch, _ in loader), labels, digest_of([str(task.root), files]))


def texts_of(task: HeldOutTexts, own: OwnClassifier, batch_size: int) -> Examples:
    """The texts of a file, in its order.

    Raises:
        UserError: no such file or column, or a label that is no class of the network.
    """
    assert own.class_ids is not None  # of transformers it is always known
    ids = {str(i): i for i in own.class_ids.values()} | own.class_ids
    rows = labelled(task.file, read_tsv(task.file), task.label, ids, first=2)
    missing = [column for column in task.columns if column not in rows.columns]
    if missing:
        raise UserError(f"task.columns: {task.file} has no column {missing[0]!r}, only {', '.join(rows.columns)}")
    places = [rows.columns.index(column) for column in task.columns]
    texts = [[fields[place] for place in places] for fields in rows.fields]

    def batches() -> Iterator[Any]:
        for start in range(0, len(texts), batch_size):
            yield own.prepare([list(column) for column in zip(*texts[start : start + batch_size], strict=True)])

    return Examples(batches, torch.tensor(rows.labels), digest_of([texts, list(rows.labels)]))


def examples_of(task: HeldOutImages | HeldOutTexts, own: OwnClassifier, batch_size: int) -> Examples:
    """Images or texts; raises as the functions above."""
    return images_of(task, own, batch_size) if isinstance(task, HeldOutImages) else texts_of(task, own, batch_size)
