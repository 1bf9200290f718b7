"""Images that a data set's own files list: published data sets in the layouts of their archives, and your own tables.

The published ones are Describable Textures, Food-101, SUN397, Stanford Cars, and FMoW and iWildCam of WILDS (Koh et al.
2021). torchvision's classes for three of them want the folder to have a name of theirs (dtd/dtd, food-101,
stanford_cars) and say of a file that is missing that all is; task.folder is any folder, and what is missing is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy  # its parts are loaded when they are named
import torch

from configs.data import ImageFiles, ImageTable
from configs.errors import UserError
from tasks.files import ROOT, Files, content_digest, first_empty, is_data, lines, looked_up, read_table, spaced
from tasks.held_out import own_name, rows_of
from tasks.image_folder import in_order
from tasks.split import ImageSplit


@dataclass(frozen=True, eq=False)
class Listed:
    """One split, as the data set's own files list it."""

    source: Path  # the file that lists it
    root: Path
    files: Sequence[str]  # N, relative to `root`, with slashes
    labels: Sequence[str | int]  # N names of `classes`, or their ids
    classes: Sequence[str]  # as the files call them, in the order of the class ids
    names: Sequence[str]  # of the classes, as a prompt has them
    groups: Sequence[int] | None = None  # N group ids, -1 for an image in none
    group_names: tuple[str, ...] = ()


def _dtd(folder: Path, own: str) -> Listed:
    """labels/<own>.txt has lines such as banded/banded_0002.jpg; each class is in each of them."""
    source = folder / "labels" / f"{own}.txt"
    classes = sorted({line.split("/")[0] for line in lines(folder / "labels/train1.txt") if is_data(line)})
    files = lines(source)
    return Listed(source, folder / "images", files, [file.split("/")[0] for file in files], classes, spaced(classes))


def _food101(folder: Path, own: str) -> Listed:
    """meta/<own>.txt has lines such as apple_pie/1005649."""
    source = folder / "meta" / f"{own}.txt"
    classes, names = lines(folder / "meta/classes.txt"), lines(folder / "meta/labels.txt")
    found = lines(source)
    files, labels = [f"{line}.jpg" for line in found], [line.split("/")[0] for line in found]
    return Listed(source, folder / "images", files, labels, classes, names)


def _sun397(folder: Path, own: str) -> Listed:
    """<own>.txt has lines such as /a/abbey/sun_aaa.jpg, of the class /a/abbey.

    ClassName.txt is from the images' archive, or from that of the partitions. /a/apse/indoor is called apse indoor.
    """
    inside, source = folder / "SUN397/ClassName.txt", folder / f"{own}.txt"
    classes = lines(inside if inside.exists() else folder / "ClassName.txt")
    files = [line.removeprefix("/") for line in lines(source)]
    labels = [f"/{file.rpartition('/')[0]}" for file in files]
    names = spaced(" ".join(name.split("/")[2:]) for name in classes)
    return Listed(source, folder / "SUN397", files, labels, classes, names)


def _matrix(path: Path, name: str) -> Any:
    """A variable of a .mat file, which holds arrays and no code."""
    try:
        return np.atleast_1d(scipy.io.loadmat(path, squeeze_me=True)[name])
    except Exception as error:  # damaged bytes make scipy's reader raise almost anything
        raise UserError(
            f"{path} cannot be read ({error!r}): restore it from the data set, or set task.folder"
        ) from None


def _cars(folder: Path, own: str) -> Listed:
    """Class ids count from 1 in the devkit."""
    tables = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    classes = [str(name) for name in _matrix(folder / "devkit/cars_meta.mat", "class_names")]
    if own not in tables:
        raise UserError(f"Stanford Cars has the splits train and test, not {own!r}: set task.folders")
    source = folder / tables[own]
    table = _matrix(source, "annotations")
    if not {"class", "fname"} <= set(table.dtype.names or ()):
        raise UserError(f"{source} has no classes: of test, it is cars_test_annos_withlabels.mat that has them")
    files, labels = [str(name) for name in table["fname"]], [int(label) - 1 for label in table["class"]]
    return Listed(source, folder / f"cars_{own}", files, labels, classes, classes)


def _wilds(path: Path, columns: Sequence[str], may_be_empty: Sequence[str] = ()) -> pd.DataFrame:
    """Columns of a csv file, none of them empty where that is not said."""
    table = read_table(path, columns, remedy="restore it from the data set, or set task.folder")
    for column in columns:
        row = None if column in may_be_empty else first_empty(table[column])
        if row is not None:
            raise UserError(f"{path}: row {row} has no {column}: it is cut off; restore it")
    return table


def _fmow(folder: Path, own: str) -> Listed:
    """Images of before 2013 are of train, id_val and id_test; of 2013 to 2015, val; from 2016 on, test.

    Image i is of row i of the metadata, counted from 0 with the rows that no split has. Classes are in alphabetical
    order, which is the order of WILDS's class ids. Groups are regions, of which WILDS reports the worst; it leaves out
    the few images of countries without one, which are in no group here.
    """
    source = folder / "rgb_metadata.csv"
    table = _wilds(source, ("split", "category", "timestamp", "country_code"))
    try:
        time = pd.to_datetime(table["timestamp"], utc=True, format="ISO8601")
    except ValueError as error:
        raise UserError(f"{source}: a timestamp cannot be read ({error}): restore it from the data set") from None
    early, late = time < pd.Timestamp("2013-01-01", tz="UTC"), time >= pd.Timestamp("2016-01-01", tz="UTC")
    times = {"train": early, "id_val": early, "id_test": early, "val": ~early & ~late, "test": late}
    if own not in times:
        raise UserError(f"FMoW has the splits {', '.join(times)}, not {own!r}: set task.folders")
    rows = np.flatnonzero((times[own] & (table["split"] == own.removeprefix("id_"))).to_numpy())
    countries = ("alpha-3", "region")
    codes = _wilds(folder / "country_code_mapping.csv", countries, may_be_empty=countries)
    regions = {code: region for code, region in zip(codes["alpha-3"], codes["region"], strict=True) if region}
    group_names = tuple(sorted(set(regions.values())))
    groups = [group_names.index(regions[c]) if c in regions else -1 for c in table["country_code"].iloc[rows]]
    files, labels = [f"rgb_img_{row}.png" for row in rows], list(table["category"].iloc[rows])
    classes = sorted(set(table["category"]))
    return Listed(source, folder / "images", files, labels, classes, spaced(classes), groups, group_names)


def _iwildcam(folder: Path, own: str) -> Listed:
    """Rows of metadata.csv; the images of every split are in the folder train.

    Classes are the names in categories.csv of the labels 0, 1, ...; categories that no image has have other labels.
    """
    names = _wilds(folder / "categories.csv", ("y", "name")).set_index("y")["name"].to_dict()
    count = next(label for label in range(len(names) + 1) if str(label) not in names)
    source = folder / "metadata.csv"
    table = _wilds(source, ("split", "filename", "y"))
    mine = table[table["split"] == own]
    if mine.empty:
        raise UserError(
            f"{source} has no split {own!r}, but {', '.join(sorted(set(table['split'])))}: set task.folders"
        )
    labels = [int(y) if y.isdecimal() else y for y in mine["y"]]
    classes = [names[str(label)] for label in range(count)]
    return Listed(source, folder / "train", list(mine["filename"]), labels, classes, classes)


def _table_lines(task: ImageTable, own: str) -> tuple[Path, pd.DataFrame]:
    """The table of a split, and its lines there: of the split in the data's own words."""
    folder, endings = ROOT / task.folder, (".csv", ".tsv")
    columns = (task.path_column, task.label, *((task.split_column,) if task.table is not None else ()))
    if task.table is not None:
        path = folder / task.table
    else:
        found = [folder / f"{own}{ending}" for ending in endings if (folder / f"{own}{ending}").exists()]
        if len(found) != 1:
            raise UserError(
                f"{folder} has {'both' if found else 'neither'} {own}.csv {'and' if found else 'nor'} {own}.tsv: there "
                f"is one of them for each split, or one table for all, task.table=FILE with a column "
                f"{task.split_column!r}"
            )
        path = found[0]
    if path.suffix not in endings:
        raise UserError(f"task.table={path} ends neither with .csv, whose fields stand between commas, nor with .tsv")
    table = read_table(path, remedy="mend it, or name another with task.table=FILE")
    if table.shape[1] == 1:
        raise UserError(f"{path} has the one column {table.columns[0]!r}: a csv has commas between fields, a tsv tabs")
    if table.empty:
        raise UserError(f"{path} has no example")
    for column in columns:
        if column not in table:
            raise UserError(
                f"{path} has no column {column!r}, only {', '.join(map(str, table))}: type task.path_column=, "
                "task.label= or task.split_column= and its name"
            )
        row = first_empty(table[column])
        if row is not None:
            raise UserError(f"{path}: example {row} has no {column}: complete that line")
    if task.table is None:
        return path, table
    mine = table[table[task.split_column] == own]
    if mine.empty:
        splits = ", ".join(sorted(set(table[task.split_column])))
        raise UserError(
            f"{path}: no line has {task.split_column}={own!r}, only {splits}: type +task.folders.SPLIT= and what the "
            "table calls it; without lines for held-out, task.held_out_per_class=20 takes some of train's"
        )
    return path, mine


def _image_table(task: ImageTable, own: str) -> Listed:
    """Lines of a csv or tsv file with the columns named in its first line: a path within `task.folder`, and a label.

    Classes are the labels of train, by name, or numbers as numbers.
    """
    classes = in_order(set(_table_lines(task, own_name(task, task.train))[1][task.label]))
    (path, table), folder = _table_lines(task, own), ROOT / task.folder
    files = [file.replace("\\", "/") for file in table[task.path_column]]
    twice = pd.Series([Path(file) for file in files]).duplicated().to_numpy()
    if twice.any():
        raise UserError(f"{path}: {files[int(twice.argmax())]} stands in split {own!r} twice: take one line out")
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{path}: {file} is not a path within {folder}: write paths relative to task.folder")
    return Listed(path, folder, files, list(table[task.label]), classes, spaced(classes))


PUBLISHED: dict[str, Callable[[Path, str], Listed]] = {  # kind of task -> its split by the data's own name
    "dtd": _dtd,
    "food101": _food101,
    "sun397": _sun397,
    "cars": _cars,
    "fmow": _fmow,
    "iwildcam": _iwildcam,
}


def _listed(task: ImageFiles, name: str) -> Listed:
    own = own_name(task, name)
    return _image_table(task, own) if isinstance(task, ImageTable) else PUBLISHED[task.kind](ROOT / task.folder, own)


def class_names(task: ImageFiles) -> tuple[str, ...]:
    """Names of the classes, as a prompt has them."""
    return tuple(_listed(task, task.train).names)


def load_split(task: ImageFiles, name: str) -> ImageSplit:
    """One split of a data set whose own files list its images.

    Held-out is a split of its own, or a part of train. Hidden files, which a list by `find` has, are left out.
    """
    listed = _listed(task, name)
    if len(listed.classes) != task.num_classes:
        raise UserError(
            f"task.num_classes={task.num_classes}, but {ROOT / task.folder} has {len(listed.classes)} classes"
        )
    ids: dict[str | int, int] = {each: label for label, each in enumerate(listed.classes)}
    ids |= {label: label for label in range(len(listed.classes))}
    data = [row for row, file in enumerate(listed.files) if is_data(file)]
    for row in data:
        if listed.labels[row] not in ids:
            raise UserError(
                f"{listed.source}: {str(listed.labels[row])!r} is none of the {len(listed.classes)} classes of "
                f"{task.train}: correct it, or restore the file from the data set"
            )
    files = [listed.files[row] for row in data]
    labels = np.array([ids[listed.labels[row]] for row in data], dtype=np.int64)
    rows = rows_of(task, name, labels, listed.classes, key=files.__getitem__, where=listed.source)
    listing = looked_up(listed.root, tuple(files), listed.source, task.listings)
    stored = Files(listed.root, listing.names[rows], listing.sizes[rows])
    described = [f"{files[row]}\0{labels[row]}" for row in rows]
    digest = content_digest([name, own_name(task, name), *described], stored.sizes, stored.content)
    groups = None if listed.groups is None else torch.from_numpy(np.array(listed.groups)[data][rows])
    return ImageSplit(name, stored, torch.from_numpy(labels[rows]), digest, None, groups, listed.group_names)
