"""More than one right answer for an image: ReaL and multilabel ImageNet, from JSON files beside the images."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from tasks.files import FileSplit, read_json
from tasks.image_folder import FolderSplit

NUMBER = re.compile(r"_val_(\d{8})\.")  # of ILSVRC2012_val_00000001.JPEG, the first image
RIGHT = ("correct_multi_labels", "unclear_multi_labels")  # both count as right (Shankar et al. 2020)


def _by_number(answers: list[Any], names: list[str], path: Path) -> list[Any]:
    """Those of a list in the order of ImageNet's numbered file names."""
    if len(answers) != len(names):
        raise UserError(f"{path} has answers for {len(answers):,} images, but the split has {len(names):,}")
    found = []
    for name in names:
        number = NUMBER.search(name)
        if number is None or not 1 <= int(number[1]) <= len(answers):
            raise UserError(f"{path} is a list over images such as ILSVRC2012_val_00000001.JPEG, which {name} is not")
        found.append(answers[int(number[1]) - 1])
    return found


def _by_name(answers: dict[str, Any], names: list[str], path: Path) -> list[Any]:
    """Those of an object of file name -> answers; an image that it does not name has none."""
    unknown = sorted(set(answers) - set(names))
    if unknown or not answers:
        raise UserError(f"{path} has answers for {unknown[0] if unknown else 'no image'}, which is not in the split")
    return [answers.get(name, []) for name in names]


def load_annotations(path: Path, split: FolderSplit | FileSplit, num_classes: int) -> Tensor:
    """(N, C) bool, which classes count as right for each image of a split, matched by file name.

    Three forms are read: a list of lists of class ids in the order of ILSVRC2012_val_00000001.JPEG and so on (ReaL's
    real.json); an object {file name: [class id, ...]}; and one of {file name: {"correct_multi_labels": [...],
    "unclear_multi_labels": [...]}} with the fields of TensorFlow Datasets' imagenet2012_multilabel, where both count.

    Args:
        path: a JSON file. The multilabel authors' own file is a pickle, which could run code and is never read here:
            tasks/README.md says how to export it.
        split: whose images are annotated, whole.
        num_classes: C.

    Returns:
        A row without any class is an image that the annotators left out: it is in no denominator.

    Raises:
        UserError: no such file, other images than the split's, two images of one name, or ids not in [0, C).

    Source: Beyer et al. 2020 (ReaL); Shankar et al. 2020 (multilabel).
    """
    names = [split.path(row).name for row in range(len(split))]
    if len(set(names)) != len(names):
        raise UserError(f"{path} is matched by file name, but two images of split {split.name!r} have one name")
    found = read_json(path)
    if not isinstance(found, list | dict):
        raise UserError(f"{path} is neither a list nor an object of file names")
    answers = _by_number(found, names, path) if isinstance(found, list) else _by_name(found, names, path)
    right = torch.zeros(len(names), num_classes, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids = [i for field in RIGHT for i in answer.get(field, [])] if isinstance(answer, dict) else answer
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < num_classes for i in ids):
            raise UserError(f"{path}: {names[row]} has {str(ids)[:60]}, not a list of ids in [0, {num_classes})")
        right[row, ids] = True
    return right
