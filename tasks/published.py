"""Published data sets whose own files list their images, in the layouts of their archives.

They are Describable Textures, Food-101, SUN397, Stanford Cars, and FMoW and iWildCam of WILDS (Koh et al. 2021).
torchvision's classes for three of them want the folder to have a name of theirs (dtd/dtd, food-101, stanford_cars) and
say of a file that is missing that all is; task.folder is any folder, and what is missing is named.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy  # its parts are loaded when they are named

from configs.errors import UserError
from tasks.content import is_data
from tasks.files import Listed, Lists, lines, spaced


def _dtd_classes(folder: Path) -> tuple[str, ...]:
    """The folders in the first lists of images: each class is in each of them."""
    return tuple(sorted({line.split("/")[0] for line in lines(folder / "labels/train1.txt") if is_data(line)}))


def _dtd_split(folder: Path, own: str) -> Listed:
    """labels/<own>.txt has lines such as banded/banded_0002.jpg."""
    source = folder / "labels" / f"{own}.txt"
    files = lines(source)
    return Listed(source, folder / "images", files, [file.split("/")[0] for file in files])


def _food_classes(folder: Path) -> tuple[str, ...]:
    return lines(folder / "meta/classes.txt")


def _food_split(folder: Path, own: str) -> Listed:
    """meta/<own>.txt has lines such as apple_pie/1005649."""
    source = folder / "meta" / f"{own}.txt"
    found = lines(source)
    return Listed(source, folder / "images", [f"{line}.jpg" for line in found], [line.split("/")[0] for line in found])


def _sun_classes(folder: Path) -> tuple[str, ...]:
    """ClassName.txt of the images' archive, or of the partitions' beside it; lines such as /a/apse/indoor."""
    inside = folder / "SUN397/ClassName.txt"
    return lines(inside if inside.exists() else folder / "ClassName.txt")


def _sun_split(folder: Path, own: str) -> Listed:
    """<own>.txt has lines such as /a/abbey/sun_aaa.jpg."""
    source = folder / f"{own}.txt"
    files = [line.removeprefix("/") for line in lines(source)]
    return Listed(source, folder / "SUN397", files, [f"/{file.rpartition('/')[0]}" for file in files])


def _sun_names(folder: Path) -> tuple[str, ...]:
    """Without the letter: /a/apse/indoor is apse indoor."""
    return spaced([" ".join(name.split("/")[2:]) for name in _sun_classes(folder)])


CAR_LABELS = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
CAR_IMAGES = {"train": "cars_train", "test": "cars_test"}


def _matrix(path: Path, name: str) -> Any:
    """A variable of a .mat file, which holds arrays and no code."""
    try:
        return np.atleast_1d(scipy.io.loadmat(path, squeeze_me=True)[name])
    except Exception as error:  # damaged bytes make scipy's reader raise almost anything
        raise UserError(
            f"{path} cannot be read ({error!r}): restore it from the data set, or set task.folder"
        ) from None


def _car_classes(folder: Path) -> tuple[str, ...]:
    return tuple(str(name) for name in _matrix(folder / "devkit/cars_meta.mat", "class_names"))


def _car_split(folder: Path, own: str) -> Listed:
    """Class ids count from 1 in the devkit."""
    if own not in CAR_LABELS:
        raise UserError(f"Stanford Cars has the splits train and test, not {own!r}: set task.folders")
    path = folder / CAR_LABELS[own]
    table = _matrix(path, "annotations")
    if not {"class", "fname"} <= set(table.dtype.names or ()):
        raise UserError(f"{path} has no classes: of test, it is cars_test_annos_withlabels.mat that has them")
    labels = [int(label) - 1 for label in table["class"]]
    return Listed(path, folder / CAR_IMAGES[own], [str(name) for name in table["fname"]], labels)


LATER, MUCH_LATER = pd.Timestamp("2013-01-01", tz="UTC"), pd.Timestamp("2016-01-01", tz="UTC")


def _table(path: Path, columns: Sequence[str], *, may_be_empty: bool = False) -> pd.DataFrame:
    """Columns of a csv file as strings, none of them empty where that is not said."""
    try:
        table = pd.read_csv(path, usecols=list(columns), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from the data set, or set task.folder") from None
    for column in () if may_be_empty else columns:
        empty = (table[column].isna() | (table[column] == "")).to_numpy()
        if empty.any():
            raise UserError(f"{path}: row {int(empty.argmax()) + 1} has no {column}: it is cut off; restore it")
    return table


def _fmow_table(folder: Path) -> pd.DataFrame:
    return _table(folder / "rgb_metadata.csv", ("split", "category", "timestamp", "country_code"))


def _fmow_classes(folder: Path) -> tuple[str, ...]:
    """In alphabetical order, which is the order of WILDS's class ids."""
    return tuple(sorted(set(_fmow_table(folder)["category"])))


def _fmow_split(folder: Path, own: str) -> Listed:
    """Images of before 2013 are of train, id_val and id_test; of 2013 to 2015, val; from 2016 on, test.

    Image i is of row i of the metadata, counted from 0 with the rows that no split has. Groups are regions, of which
    WILDS reports the worst; it leaves out the few images of countries without one, which are in no group here.
    """
    path, table = folder / "rgb_metadata.csv", _fmow_table(folder)
    try:
        time = pd.to_datetime(table["timestamp"], utc=True, format="ISO8601")
    except ValueError as error:
        raise UserError(f"{path}: a timestamp cannot be read ({error}): restore it from the data set") from None
    early, late = time < LATER, time >= MUCH_LATER
    times = {"train": early, "id_val": early, "id_test": early, "val": ~early & ~late, "test": late}
    if own not in times:
        raise UserError(f"FMoW has the splits {', '.join(times)}, not {own!r}: set task.folders")
    rows = np.flatnonzero((times[own] & (table["split"] == own.removeprefix("id_"))).to_numpy())
    countries = _table(folder / "country_code_mapping.csv", ("alpha-3", "region"), may_be_empty=True)
    regions = {code: region for code, region in zip(countries["alpha-3"], countries["region"], strict=True) if region}
    names = tuple(sorted(set(regions.values())))
    groups = [names.index(regions[code]) if code in regions else -1 for code in table["country_code"].iloc[rows]]
    files = [f"rgb_img_{row}.png" for row in rows]
    return Listed(path, folder / "images", files, list(table["category"].iloc[rows]), groups, names)


def _iwildcam_classes(folder: Path) -> tuple[str, ...]:
    """The names in categories.csv of the labels 0, 1, ...; categories that no image has are marked with others."""
    table = _table(folder / "categories.csv", ("y", "name"))
    names = {int(y): name for y, name in zip(table["y"], table["name"], strict=True)}
    count = next(label for label in range(len(names) + 1) if label not in names)
    return tuple(names[label] for label in range(count))


def _iwildcam_split(folder: Path, own: str) -> Listed:
    """Rows of metadata.csv; the images of every split are in the folder train."""
    path = folder / "metadata.csv"
    table = _table(path, ("split", "filename", "y"))
    mine = table[table["split"] == own]
    if mine.empty:
        raise UserError(f"{path} has no split {own!r}, but {', '.join(sorted(set(table['split'])))}: set task.folders")
    labels = [int(y) if y.isdecimal() else y for y in mine["y"]]
    return Listed(path, folder / "train", list(mine["filename"]), labels)


PUBLISHED = {  # kind of task -> its lists
    "dtd": Lists(_dtd_classes, lambda folder: spaced(_dtd_classes(folder)), _dtd_split),
    "food101": Lists(_food_classes, lambda folder: lines(folder / "meta/labels.txt"), _food_split),
    "sun397": Lists(_sun_classes, _sun_names, _sun_split),
    "cars": Lists(_car_classes, _car_classes, _car_split),
    "fmow": Lists(_fmow_classes, lambda folder: spaced(_fmow_classes(folder)), _fmow_split),
    "iwildcam": Lists(_iwildcam_classes, _iwildcam_classes, _iwildcam_split),
}
