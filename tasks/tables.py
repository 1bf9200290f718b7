"""Files of one example a line with tabs between fields, as GLUE has them: no quoting, and nothing lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.data import Sentences
from configs.errors import UserError
from tasks.files import ROOT
from tasks.parts import own_name
from tasks.texts import Rows, TextSplit, text_split


def read_tsv(path: Path, header: Sequence[str] | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a file in UTF-8, with or without a byte-order mark.

    Lines end with a line feed or with carriage return and line feed, and with nothing else: sentences may contain
    quotes, which mean nothing, and every other character that ends a line for some program.

    Args:
        path: of the file.
        header: the columns, where the first line is not of their names.

    Raises:
        UserError: it is missing, not UTF-8, empty, or a line has more or fewer fields than there are columns.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: tasks/README.md says where to get it") from None
    except UnicodeDecodeError as error:
        before = path.read_bytes()[: error.start].count(b"\n")
        raise UserError(f"{path}, line {before + 1}: not UTF-8; get the file again") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if lines[-1] == "":
        lines.pop()
    columns = tuple(header) if header is not None else tuple(lines[0].split("\t")) if lines else ()
    first = 1 if header is not None else 2
    rows = []
    for number, line in enumerate(lines[first - 1 :], start=first):
        fields = tuple(line.split("\t"))
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(fields)} fields with tabs between them, and there are {len(columns)} "
                f"columns ({', '.join(columns)}); mend that line or get the file again"
            )
        rows.append(fields)
    if not rows:
        raise UserError(f"{path} has no example")
    return columns, rows


def labelled(
    path: Path, table: tuple[tuple[str, ...], list[tuple[str, ...]]], column: str, ids: Mapping[str, int], first: int
) -> Rows:
    """Texts and class ids of a table.

    Args:
        path: of its file, for messages.
        table: columns and rows.
        column: with the labels.
        ids: what a label says -> class id.
        first: the line of the file that row 0 is on.

    Raises:
        UserError: no such column, a label that is none of them, or an example without any text.
    """
    columns, rows = table
    if column not in columns:
        raise UserError(f"{path} has no column {column!r}, only {', '.join(columns)}")
    place = columns.index(column)
    labels, fields = [], []
    for number, row in enumerate(rows, start=first):
        if row[place] not in ids:
            raise UserError(f"{path}, line {number}: label {row[place]!r} is none of {', '.join(ids)}")
        texts = row[:place] + row[place + 1 :]
        if not any(text.strip() for text in texts):
            raise UserError(f"{path}, line {number}: no text")
        labels.append(ids[row[place]])
        fields.append(texts)
    return Rows(columns[:place] + columns[place + 1 :], fields, labels, path)


def load_split(task: Sentences, name: str) -> TextSplit:
    """One split of texts of your own, from <folder>/<split>.tsv; labels are class ids or names of the options.

    Raises:
        UserError: as `read_tsv`, `labelled` and `text_split`.
    """
    path = ROOT / task.folder / f"{own_name(task, name)}.tsv"
    ids = {str(i): i for i in range(len(task.options))} | {option: i for i, option in enumerate(task.options)}
    return text_split(task, name, labelled(path, read_tsv(path), task.label, ids, first=2))
