"""Stanford Cars, from its devkit's .mat files."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy  # its parts are loaded when they are named

from configs.errors import UserError
from tasks.files import Listed, Lists

ANNOTATIONS = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
IMAGES = {"train": "cars_train", "test": "cars_test"}


def _table(path: Path, name: str) -> Any:
    """A variable of a .mat file, which holds arrays and no code."""
    try:
        return np.atleast_1d(scipy.io.loadmat(path, squeeze_me=True)[name])
    except Exception as error:  # damaged bytes make scipy's reader raise almost anything
        raise UserError(
            f"{path} cannot be read ({error!r}): restore it from the data set, or set task.folder"
        ) from None


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(str(name) for name in _table(folder / "devkit/cars_meta.mat", "class_names"))


def _split(folder: Path, own: str) -> Listed:
    """Class ids count from 1 in the devkit."""
    if own not in ANNOTATIONS:
        raise UserError(f"Stanford Cars has the splits train and test, not {own!r}: set task.folders")
    path = folder / ANNOTATIONS[own]
    table = _table(path, "annotations")
    if not {"class", "fname"} <= set(table.dtype.names or ()):
        raise UserError(f"{path} has no classes: of test, it is cars_test_annos_withlabels.mat that has them")
    labels, count = np.array([int(label) - 1 for label in table["class"]], dtype=np.int64), len(_classes(folder))
    if not ((labels >= 0) & (labels < count)).all():
        raise UserError(f"{path} has class ids from {labels.min() + 1} to {labels.max() + 1}, but there are {count}")
    return Listed(path, folder / IMAGES[own], [str(name) for name in table["fname"]], labels)


CARS = Lists(_classes, _classes, _split)
