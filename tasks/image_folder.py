"""Labelled images in folders, <folder>/<split>/<class>/<image>, in the order of torchvision's ImageFolder.

With what ImageNet has besides: the classes of ObjectNet, and more than one right answer for an image.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.data import ImageFolder
from configs.errors import UserError
from tasks.files import ROOT, Files, content_digest, is_data, lines, read_json, scanned
from tasks.held_out import check_count, is_parted, own_name, rows_of, source
from tasks.split import ImageSplit, LabelSpace

WNID = re.compile(r"n\d{8}")  # ImageNet's name of a class
BORDER = 2  # pixels at each edge of ObjectNet's images that its authors marked, to be cut before any use
SOURCES = ("imagenet2012_multilabel:1.0.0", "imagenet2012_multilabel:2.0.0")  # version 3 has labels corrected in 2022
REAL = (46_837, 57_553)  # images of ReaL's 50,000 with labels, and their labels (Beyer et al. 2020, Section 3)
NUMBER = re.compile(r"_val_(\d{8})\.")  # in ILSVRC2012_val_00000001.JPEG, the first image
RIGHT = ("correct_multi_labels", "unclear_multi_labels")  # both count as right (Shankar et al. 2020)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of class folders in the order of the class ids: by name, as torchvision does, but numbers as numbers.

    >>> in_order(["10", "2", "1"]), in_order(["dog", "cat"])
    (('1', '2', '10'), ('cat', 'dog'))
    """
    names = sorted(names)
    are_numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=int) if are_numbers else names)


def _class_folders(root: Path, remedy: str) -> tuple[str, ...]:
    try:
        with os.scandir(root) as entries:
            return in_order(entry.name for entry in entries if is_data(entry.name) and entry.is_dir())
    except OSError as error:
        raise UserError(f"image folder {root}: {error.strerror}; {remedy}") from None


def _classes(task: ImageFolder) -> tuple[str, ...]:
    """The label space: the class folders of the training split."""
    root = ROOT / task.folder / own_name(task, task.train)
    where = f"set task.folder, or task.folders.{task.train} if it has another name"
    classes = _class_folders(root, f"the classes of every split are those of the training folder: {where}")
    if len(classes) != task.num_classes:
        raise UserError(f"task.num_classes={task.num_classes}, but {root} has {len(classes)} class folders")
    return classes


def _refuse_unlike(own: Sequence[str], expected: Sequence[str], root: Path, owner: str) -> None:
    """Refuse a class folder that is missing or unknown to its owner."""
    unlike = sorted(set(own) ^ set(expected))
    if not unlike:
        return
    if unlike[0] not in expected:
        raise UserError(f"image folder {root}: class folder {unlike[0]!r} is unknown; {owner} does not have it")
    hint = "; of a split with fewer classes, task.subsets says how many" if len(own) < len(expected) else ""
    raise UserError(f"image folder {root}: class folder {unlike[0]!r} is missing; {owner} has it{hint}")


def _reported(task: ImageFolder, name: str, root: Path) -> tuple[tuple[str, ...], LabelSpace | None]:
    """The class folders of a split in the order of the reported classes, and these where they are not all of train."""
    classes = _classes(task)
    space: LabelSpace | None = None
    remedy = "set task.folder, or task.folders for a split whose folder has another name"
    if name == task.held_out:
        remedy += "; without one for held-out, task.held_out_per_class=20 takes some of train's"
    own = _class_folders(root, remedy)
    if name == task.objectnet:
        ids, others = objectnet_classes(root.parent / "mappings", task.num_classes)
        _refuse_unlike([folder for folder in own if folder not in others], tuple(ids), root, "its mapping")
        folders, space = tuple(ids), LabelSpace(tuple(ids.values()), len(classes))
    elif name in task.numbered:
        folders = tuple(str(i) for i in range(len(classes)))
        _refuse_unlike(own, folders, root, f"a numbering of {len(classes)} classes from 0")
    elif name in task.subsets and own:
        _refuse_unlike([folder for folder in own if folder not in classes], (), root, "training")
        folders, space = own, LabelSpace.subset([classes.index(folder) for folder in own], len(classes))
    else:
        folders = classes
        _refuse_unlike(own, folders, root, "training")
    expected = task.subsets.get(name, len(folders))
    if len(folders) != expected:
        raise UserError(f"image folder {root} is of {len(folders)} classes, but task.subsets.{name}={expected}")
    return folders, space


def _indexed(path: Path, root: Path, labels: NDArray[np.int64], folders: Sequence[str]) -> NDArray[np.bool_]:
    """(N,) the images that the authors' file says: 1 is held-out and 0 train, in the order of ImageFolder."""
    try:
        values = np.load(ROOT / path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"task.held_out_index={path} cannot be read: {error}") from None
    n = len(labels)
    if values.shape != (n,):
        raise UserError(f"task.held_out_index={path} has shape {values.shape}, but {root} has {n} images")
    if not np.isin(values, (0, 1)).all():
        raise UserError(f"task.held_out_index={path} has other values than 0 (train) and 1 (held-out)")
    absent = sorted(set(range(len(folders))) - set(labels[values == 0].tolist()))
    if absent:
        raise UserError(f"task.held_out_index={path} leaves no image of class {folders[absent[0]]!r} to train")
    return values == 1


def objectnet_classes(mappings: Path, size: int) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Folders of ObjectNet's images whose objects are ImageNet classes, with the ids of these; and the other folders.

    Four files are chained: folder -> ObjectNet's label -> names of ImageNet classes, separated by semicolons -> line,
    from 0, in the list of names -> class id of PyTorch. The published files give 113 folders and 125 class ids. The
    order of the folders, which is by name, is the order of the reported classes.

    Raises:
        UserError: a file of the folder `mappings` is missing or does not fit the others, or `size` is not 1,000.

    Source: Barbu et al. 2019 and the README of its archive.
    """
    if size != 1000:
        raise UserError(f"ObjectNet's mapping is onto ImageNet's 1,000 classes, but task.num_classes={size}")
    labels_path, names_path = mappings / "folder_to_objectnet_label.json", mappings / "imagenet_to_label_2012_v2"
    imagenet_path, ids_path = mappings / "objectnet_to_imagenet_1k.json", mappings / "pytorch_to_imagenet_2012_id.json"
    label_of_folder, imagenet_of_label = read_json(labels_path), read_json(imagenet_path)
    id_of_line = {line: int(number) for number, line in read_json(ids_path).items()}
    if sorted(id_of_line.values()) != list(range(size)):
        raise UserError(f"{ids_path} does not number 1,000 classes: restore ObjectNet's mappings from its archive")
    lines_of_name: dict[str, list[int]] = {}
    for line, name in enumerate(lines(names_path)):
        lines_of_name.setdefault(name, []).append(line)
    folder_of_label = {label: folder for folder, label in label_of_folder.items()}
    found = {}
    for label, names in imagenet_of_label.items():
        ids = []
        for name in (name.strip() for name in names.split(";")):
            places = lines_of_name.get(name, [])
            if len(places) != 1:
                raise UserError(f"{imagenet_path}: {name!r} of {label!r} stands {len(places)} times in {names_path}")
            ids.append(id_of_line[places[0]])
        if label not in folder_of_label:
            raise UserError(f"{labels_path} has no entry {label!r}: restore ObjectNet's mappings from its archive")
        found[folder_of_label[label]] = tuple(ids)
    return {folder: found[folder] for folder in sorted(found)}, set(label_of_folder) - set(found)


def load_split(task: ImageFolder, name: str) -> ImageSplit:
    """The images and labels of one split.

    Its class folders are those of train; or some of them, where `task.subsets` says so; or numbers from 0, of
    `task.numbered`; or ObjectNet's, of `task.objectnet`, in the order of their names. Held-out is a folder of its own,
    or a part of train's, of which train is then the rest: a file more in one class moves no other class.

    Raises:
        UserError: no such folder; class folders that are not those that the task says, or not `task.num_classes` of
            train; an empty class; not as many images as `task.counts`; a held-out rule that does not fit the images.
    """
    own, folder = source(task, name), own_name(task, name)
    root = ROOT / task.folder / folder
    folders, space = _reported(task, own, root)
    listing = scanned(root, folders, task.listings)
    places = {folder.encode(): label for label, folder in enumerate(folders)}
    labels = np.array([places[file.partition(b"/")[0]] for file in listing.names], dtype=np.int64)
    if is_parted(task, name) and task.held_out_index is not None:
        check_count(task, own, root, len(labels))
        held_out = _indexed(task.held_out_index, root, labels, folders)
        rows = np.flatnonzero(held_out == (name == task.held_out))
    else:
        files = [file.decode().partition("/")[2] for file in listing.names]
        rows = rows_of(task, name, labels, folders, key=files.__getitem__, where=root)
    border = BORDER if own == task.objectnet and task.objectnet_border else 0
    stored = Files(root, listing.names[rows], listing.sizes[rows], f"{root.name}/", border)
    described = [name, folder, f"border {border}", *(file.decode() for file in stored.names)]
    digest = content_digest(described, stored.sizes, stored.content)
    return ImageSplit(name, stored, torch.from_numpy(labels[rows]), digest, space)


def class_names(task: ImageFolder) -> tuple[str, ...]:
    """Names of the classes: those of their folders, or with `task.names=imagenet` CLIP's of ImageNet's folders."""
    classes = _classes(task)
    if task.names != "imagenet":
        return tuple(re.sub("[_-]", " ", folder) for folder in classes)
    from open_clip import IMAGENET_CLASSNAMES  # noqa: PLC0415  # a loader process need not wait for it

    strange = [folder for folder in classes if not WNID.fullmatch(folder)]
    if strange or len(classes) != len(IMAGENET_CLASSNAMES):
        found = f"{strange[0]!r}" if strange else f"{len(classes)} of them"
        raise UserError(f"task.names=imagenet needs 1,000 class folders such as n01440764, but there is {found}")
    return tuple(IMAGENET_CLASSNAMES)


def _answers(path: Path, names: list[str]) -> list[Any]:
    """The answers of a file in the order of the images `names`, if they are those that the paper was scored by."""
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
    """(N, C) bool, which of C classes count as right for each image of a whole split, matched by file name.

    Three forms are read: a list of lists of class ids in the order of ILSVRC2012_val_00000001.JPEG and so on (ReaL's
    real.json); an object {file name: [class id, ...]}; and {"source": "imagenet2012_multilabel:2.0.0", "answers": {file
    name: {"correct_multi_labels": [...], "unclear_multi_labels": [...], "is_problematic": ...}}}, the fields of
    TensorFlow Datasets, where both lists count and problematic images do not. The multilabel authors' own file is a
    pickle, which could run code and is never read here: tasks/README.md says how to export it. A row without any class
    is an image that the annotators left out: it is in no denominator.

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
