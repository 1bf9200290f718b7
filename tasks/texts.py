"""Texts and labels of one split, in memory, and texts of your own in tsv files.

Files have one example a line with tabs between fields, as GLUE has them: no quoting, and nothing lost.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np
import torch
from torch import Tensor

from configs.data import Sentences, Texts
from configs.errors import UserError
from soups.chance import uniform
from tasks.files import ROOT
from tasks.held_out import own_name, rows_of
from tasks.split import Examples, ending


@dataclass(frozen=True)
class Rows:
    """The examples of a file."""

    columns: tuple[str, ...]
    fields: Sequence[tuple[str, ...]]  # N, a text for each column
    labels: Sequence[int]  # N class ids
    source: Path  # for messages


class TextRows:
    """Texts in memory: N tuples with one text for each column."""

    def __init__(self, columns: tuple[str, ...], fields: tuple[tuple[str, ...], ...]):
        self.columns, self.fields = columns, fields
        self.sizes = np.array([len(self.content(row)) for row in range(len(fields))], dtype=np.int64)

    def content(self, index: int, last: int | None = None) -> bytes:
        """The words of a text, whatever white space is between them."""
        return ending(words_of(self.fields[index]).encode(), last)

    def called(self, index: int) -> str:
        """The beginning of a text."""
        return repr(" | ".join(self.fields[index])[:40])

    def of(self, rows: Tensor) -> "TextRows":
        """Only the texts `rows`."""
        return TextRows(self.columns, tuple(self.fields[row] for row in rows.tolist()))


def words_of(fields: Sequence[str]) -> str:
    r"""A text as it is compared with others: its fields, with one space between words.

    >>> words_of(["a  good ", "film"])
    'a good\x00film'
    """
    return "\0".join(" ".join(field.split()) for field in fields)


def pieces_of(template: str) -> list[tuple[str, str | None]]:
    """The words of a template, each with the column that comes after it, if one does.

    Raises:
        UserError: braces without a plain name in them.

    >>> pieces_of("premise: {a} | {b} |")
    [('premise: ', 'a'), (' | ', 'b'), (' |', None)]
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"task.template={template!r}: {error}") from None
    if any(column == "" or spec or how for _, column, spec, how in parsed):
        raise UserError(f"task.template={template!r}: columns stand in braces by their plain name, as in {{sentence}}")
    return [(words, column) for words, column, _, _ in parsed]


def text_split(task: Texts, name: str, rows: Rows) -> Examples:
    """A split of the examples of its file: all rows, the part of train that is or is not held out, or some of them.

    A text has the columns that the template reads; others, such as numbers of lines, are left out. Whether a text is
    held out by `task.held_out_share` depends on it alone, not on those beside it.

    Raises:
        UserError: a template without a column, or with one that is not there; other counts than the task's; too few
            to take.
    """
    read = [column for _, column in pieces_of(task.template) if column]
    unknown = [column for column in read if column not in rows.columns]
    if unknown:
        raise UserError(f"task.template has {{{unknown[0]}}}, but {rows.source} has {', '.join(rows.columns)}")
    if not read:
        raise UserError(f"task.template={task.template!r} reads no column of {rows.source}: {', '.join(rows.columns)}")
    places = [place for place, column in enumerate(rows.columns) if column in read]
    columns = tuple(rows.columns[place] for place in places)
    fields = [tuple(row[place] for place in places) for row in rows.fields]
    labels = np.array(rows.labels, dtype=np.int64)

    def key(row: int) -> str:
        return "\0".join(fields[row])

    words = [words_of(row) for row in fields]
    chosen = rows_of(task, name, labels, task.options, key=words.__getitem__, where=rows.source).tolist()
    wanted = (task.take or {}).get(name)
    if wanted is not None:
        if wanted > len(chosen):
            raise UserError(f"task.take.{name}={wanted}, but {rows.source} has {len(chosen)} texts for it")
        chosen = sorted(sorted(chosen, key=lambda row: (uniform("take", key(row)), row))[:wanted])
    content = hashlib.blake2b("\0".join(columns).encode(), digest_size=16)
    for row in chosen:
        content.update(f"{key(row)}\0{labels[row]}\n".encode())
    texts = TextRows(columns, tuple(fields[row] for row in chosen))
    return Examples(name, texts, torch.from_numpy(labels[chosen]), content.hexdigest())


def read_tsv(
    path: Path, label: str, ids: Mapping[str, int], header: Sequence[str] | None = None, needed: Sequence[str] = ()
) -> Rows:
    """The texts and class ids of a file in UTF-8, with or without a byte-order mark.

    Lines end with a line feed or with carriage return and line feed, and with nothing else: sentences may contain
    quotes, which mean nothing, and every other character that ends a line for some program.

    Args:
        path: the file.
        label: name of the label column.
        ids: label in the file -> class id.
        header: the columns, where the first line does not name them.
        needed: columns that must be there besides.

    Raises:
        UserError: it is missing, not UTF-8 or empty; a line has more or fewer fields than there are columns; no such
            column; a label that is none of them; or an example without any text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: tasks/README.md says where to get it") from None
    except UnicodeDecodeError as error:
        before = path.read_bytes()[: error.start].count(b"\n")
        raise UserError(f"{path}, line {before + 1}: not UTF-8; get the file again") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    table = [tuple(line.split("\t")) for line in lines]
    columns, first = (tuple(header), 1) if header is not None else (table[0] if table else (), 2)
    table = table[first - 1 :]
    if not table:
        raise UserError(f"{path} has no example")
    for number, row in enumerate(table, start=first):
        if len(row) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(row)} fields with tabs between them, and there are {len(columns)} "
                f"columns ({', '.join(columns)}); mend that line or get the file again"
            )
    for column in (label, *needed):
        if column not in columns:
            raise UserError(f"{path} has no column {column!r}, only {', '.join(columns)}")
    place = columns.index(label)
    fields = [row[:place] + row[place + 1 :] for row in table]
    for number, (row, texts) in enumerate(zip(table, fields, strict=True), start=first):
        if row[place] not in ids:
            raise UserError(f"{path}, line {number}: label {row[place]!r} is none of {', '.join(ids)}")
        if not any(each.strip() for each in texts):
            raise UserError(f"{path}, line {number}: no text")
    return Rows(columns[:place] + columns[place + 1 :], fields, [ids[row[place]] for row in table], path)


def load_sentences(task: Sentences, name: str) -> Examples:
    """One split of texts of your own, from <folder>/<split>.tsv; labels are class ids or names of the options.

    Raises:
        UserError: as `read_tsv` and `text_split`.
    """
    ids = {str(i): i for i in range(len(task.options))} | {option: i for i, option in enumerate(task.options)}
    return text_split(task, name, read_tsv(ROOT / task.folder / f"{own_name(task, name)}.tsv", task.label, ids))
