"""FMoW and iWildCam of WILDS, in the layout of its archives and with its splits (Koh et al. 2021)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from configs.errors import UserError
from tasks.files import Listed, Lists, label_of

LATER, MUCH_LATER = pd.Timestamp("2013-01-01", tz="UTC"), pd.Timestamp("2016-01-01", tz="UTC")


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a csv file as strings, none of them empty."""
    try:
        table = pd.read_csv(path, usecols=list(columns), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from the data set, or set task.folder") from None
    for column in columns:
        empty = (table[column].isna() | (table[column] == "")).to_numpy()
        if empty.any():
            raise UserError(f"{path}: row {int(empty.argmax()) + 1} has no {column}: it is cut off; restore it")
    return table


def _fmow_table(folder: Path) -> pd.DataFrame:
    return _table(folder / "rgb_metadata.csv", ("split", "category", "timestamp", "country_code"))


def _fmow_classes(folder: Path) -> tuple[str, ...]:
    """In alphabetical order, which is the order of WILDS's class ids."""
    return tuple(sorted(set(_fmow_table(folder)["category"])))


def _fmow_regions(folder: Path) -> dict[str, str]:
    """Country code -> region; countries without one are in none."""
    path = folder / "country_code_mapping.csv"
    try:
        table = pd.read_csv(path, usecols=["alpha-3", "region"], dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from the data set") from None
    return {code: region for code, region in zip(table["alpha-3"], table["region"], strict=True) if region}


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
    place = {name: label for label, name in enumerate(_fmow_classes(folder))}
    labels = np.array([place[name] for name in table["category"].iloc[rows]], dtype=np.int64)
    regions = _fmow_regions(folder)
    names = tuple(sorted(set(regions.values())))
    groups = [names.index(regions[code]) if code in regions else -1 for code in table["country_code"].iloc[rows]]
    files = [f"rgb_img_{row}.png" for row in rows]
    return Listed(path, folder / "images", files, labels, np.array(groups, dtype=np.int64), names)


FMOW = Lists(_fmow_classes, lambda folder: tuple(name.replace("_", " ") for name in _fmow_classes(folder)), _fmow_split)


def _iwildcam_classes(folder: Path) -> tuple[str, ...]:
    """The names in categories.csv of the labels 0, 1, ...; categories that no image has are marked with others."""
    path = folder / "categories.csv"
    table = _table(path, ("y", "name"))
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
    place = {str(label): label for label in range(len(_iwildcam_classes(folder)))}
    labels = np.array([label_of(y, place, path) for y in mine["y"]], dtype=np.int64)
    return Listed(path, folder / "train", list(mine["filename"]), labels)


IWILDCAM = Lists(_iwildcam_classes, _iwildcam_classes, _iwildcam_split)
