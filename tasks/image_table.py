"""Images that tables list: a path and a label a line, in a csv or tsv file with the columns named in its first line."""

from pathlib import Path

import pandas as pd

from configs.data import ImageTable
from configs.errors import UserError
from tasks.files import ROOT, Listed, Lists, spaced
from tasks.image_folder import in_order
from tasks.parts import own_name

ENDINGS = (".csv", ".tsv")


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """The named columns of a table as strings, none of them empty."""
    if path.suffix not in ENDINGS:
        raise UserError(f"task.table={path} ends neither with .csv, whose fields stand between commas, nor with .tsv")
    try:
        table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).strip()}): name the table with task.table=FILE") from None
    for column in columns:
        if column not in table:
            raise UserError(
                f"{path} has no column {column!r}, only {', '.join(map(str, table))}: type task.path_column=, "
                "task.label= or task.split_column= and its name"
            )
        empty = (table[column].isna() | (table[column].str.strip() == "")).to_numpy()
        if empty.any():
            raise UserError(f"{path}: example {int(empty.argmax()) + 1} has no {column}: complete that line")
    return table


def _lines(task: ImageTable, own: str) -> tuple[Path, pd.DataFrame]:
    """The table of a split, and its lines there.

    Args:
        task: of kind image_table.
        own: what the data call the split.

    Raises:
        UserError: no table, or none of its lines is of the split.
    """
    folder, columns = ROOT / task.folder, (task.path_column, task.label)
    if task.table is None:
        found = [folder / f"{own}{ending}" for ending in ENDINGS if (folder / f"{own}{ending}").exists()]
        if len(found) != 1:
            raise UserError(
                f"{folder} has {'both' if found else 'neither'} {own}.csv {'and' if found else 'nor'} {own}.tsv: there "
                f"is one of them for each split, or one table for all, task.table=FILE with a column "
                f"{task.split_column!r}"
            )
        return found[0], _table(found[0], columns)
    path = folder / task.table
    table = _table(path, (*columns, task.split_column))
    mine = table[table[task.split_column] == own]
    if mine.empty:
        splits = ", ".join(sorted(set(table[task.split_column])))
        raise UserError(
            f"{path}: no line has {task.split_column}={own!r}, only {splits}: type +task.folders.SPLIT= and what the "
            "table calls it; without lines for held-out, task.held_out_per_class=20 takes some of train's"
        )
    return path, mine


def lists(task: ImageTable) -> Lists:
    """How the tables of a task say what is in it.

    Classes are the labels of train, by name, or numbers as numbers. Paths are relative to `task.folder`.

    Raises:
        UserError: by its functions: a table or column that is missing, an empty field, a label that train does not
            have, a path out of the folder, or one that stands in a split twice.
    """

    def classes(folder: Path) -> tuple[str, ...]:
        return in_order(sorted(set(_lines(task, own_name(task, task.train))[1][task.label])))

    def split(folder: Path, own: str) -> Listed:
        path, table = _lines(task, own)
        files = [file.replace("\\", "/") for file in table[task.path_column]]
        twice = pd.Series(files).duplicated().to_numpy()
        if twice.any():
            raise UserError(f"{path}: {files[int(twice.argmax())]} stands in split {own!r} twice: take one line out")
        for file in files:
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise UserError(f"{path}: {file} is not a path within {folder}: write paths relative to task.folder")
        return Listed(path, folder, files, list(table[task.label]))

    return Lists(classes, lambda folder: spaced(classes(folder)), split)
