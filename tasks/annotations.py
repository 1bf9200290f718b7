"""More than one right answer for an image: ReaL and multilabel ImageNet, from JSON files beside the images."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from tasks.files import read_json
from tasks.split import ImageSplit

SOURCES = ("imagenet2012_multilabel:1.0.0", "imagenet2012_multilabel:2.0.0")  # version 3 has labels corrected in 2022
REAL = (46_837, 57_553)  # images of ReaL's 50,000 with labels, and their labels (Beyer et al. 2020, Section 3)
NUMBER = re.compile(r"_val_(\d{8})\.")  # in ILSVRC2012_val_00000001.JPEG, the first image
RIGHT = ("correct_multi_labels", "unclear_multi_labels")  # both count as right (Shankar et al. 2020)


def _answers(path: Path, names: list[str]) -> list[Any]:
    """The answers of a file in the order of the images `names`, if they are those that the paper was scored by.

    Raises:
        UserError: the file cannot be read, or has answers of another origin or for other images.
    """
    found = read_json(path)
    if isinstance(found, list):
        return _by_number(found, names, path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is neither a list nor an object of file names")
    answers = found.get("answers", found)
    if any(isinstance(answer, dict) for answer in answers.values()) and found.get("source") not in SOURCES:
        raise UserError(
            f"{path} has multilabel answers of {found.get('source', 'a version that it does not name')}, which are not "
            f"those of {SOURCES[-1]}: export these as tasks/README.md says"
        )
    unknown = sorted(set(answers) - set(names))
    if unknown or not answers:
        raise UserError(f"{path} has answers for {unknown[0] if unknown else 'no image'}, which is not in the split")
    return [answers.get(name, []) for name in names]


def _by_number(answers: list[Any], names: list[str], path: Path) -> list[Any]:
    """The answers of a list, which is in the order of ImageNet's numbered file names."""
    if len(answers) == 50_000:
        images, labels = sum(map(bool, answers)), sum(map(len, answers))
        if (images, labels) != REAL:
            raise UserError(
                f"{path} has {labels:,} labels of {images:,} images, and ReaL's real.json of 2020 has {REAL[1]:,} of "
                f"{REAL[0]:,}: tasks/README.md says where that is"
            )
    if len(answers) != len(names):
        raise UserError(f"{path} has answers for {len(answers):,} images, but the split has {len(names):,}")
    found = []
    for name in names:
        number = NUMBER.search(name)
        if number is None or not 1 <= int(number[1]) <= len(answers):
            raise UserError(f"{path} is a list over images such as ILSVRC2012_val_00000001.JPEG, which {name} is not")
        found.append(answers[int(number[1]) - 1])
    return found


def load_annotations(path: Path, split: ImageSplit, num_classes: int) -> Tensor:
    """(N, C) bool, which classes count as right for each image of a split, matched by file name.

    Three forms are read: a list of lists of class ids in the order of ILSVRC2012_val_00000001.JPEG and so on (ReaL's
    real.json); an object {file name: [class id, ...]}; and {"source": "imagenet2012_multilabel:2.0.0", "answers": {file
    name: {"correct_multi_labels": [...], "unclear_multi_labels": [...], "is_problematic": ...}}}, the fields of
    TensorFlow Datasets, where both lists count and problematic images do not.

    Args:
        path: a JSON file. The multilabel authors' own file is a pickle, which could run code and is never read here:
            tasks/README.md says how to export it.
        split: a whole split in files, whose images are annotated.
        num_classes: C.

    Returns:
        A row without any class is an image that the annotators left out: it is in no denominator.

    Raises:
        UserError: no such file, answers of another origin, other images than the split's, two images of one name, or
            ids not in [0, C).

    Source: Beyer et al. 2020 (ReaL); Shankar et al. 2020 (multilabel).
    """
    names = [split.stored.called(row).rpartition("/")[2] for row in range(len(split))]
    if len(set(names)) != len(names):
        raise UserError(f"{path} is matched by file name, but two images of split {split.name!r} have one name")
    right = torch.zeros(len(names), num_classes, dtype=torch.bool)
    for row, (name, ids) in enumerate(zip(names, _answers(path, names), strict=True)):
        if isinstance(ids, dict):
            if "is_problematic" not in ids:
                raise UserError(
                    f"{path} does not say whether {name} is problematic: export it anew as tasks/README.md says"
                )
            ids = [] if ids["is_problematic"] else [i for field in RIGHT for i in ids.get(field, [])]  # noqa: PLW2901
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < num_classes for i in ids):
            raise UserError(f"{path}: {name} has {str(ids)[:60]}, not a list of ids in [0, {num_classes})")
        right[row, ids] = True
    return right
