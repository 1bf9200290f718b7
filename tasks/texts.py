"""One split of a text benchmark, in memory: what each example's columns say, and its label."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.data import Texts
from configs.errors import UserError
from soups.chance import uniform
from tasks.parts import rows_of
from tasks.split import Examples


@dataclass(frozen=True)
class Rows:
    """What a file says."""

    columns: tuple[str, ...]
    fields: Sequence[tuple[str, ...]]  # N, a text for each column
    labels: Sequence[int]  # N class ids
    source: Path  # for messages


@dataclass(frozen=True)
class TextRows:
    """Texts in memory, with columns in place of pixels."""

    columns: tuple[str, ...]
    fields: tuple[tuple[str, ...], ...]  # N texts, one for each column

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each text."""
        return np.array([len(self.content(row)) for row in range(len(self.fields))], dtype=np.int64)

    def content(self, index: int, last: int | None = None) -> bytes:
        """What a text says, whatever white space is between its words."""
        said = said_by(self.fields[index]).encode()
        return said if last is None else said[-last:]

    def called(self, index: int) -> str:
        """How it begins."""
        return repr(" | ".join(self.fields[index])[:40])

    def of(self, rows: Tensor) -> "TextRows":
        """Only some of them."""
        return TextRows(self.columns, tuple(self.fields[row] for row in rows.tolist()))


@dataclass(frozen=True, eq=False)
class TextSplit(Examples):
    """Texts and labels."""

    stored: TextRows

    @property
    def fields(self) -> tuple[tuple[str, ...], ...]:
        """N texts, one for each column."""
        return self.stored.fields


def said_by(fields: Sequence[str]) -> str:
    r"""A text as it is compared with others: its fields, with one space between words.

    >>> said_by(["a  good ", "film"])
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
        parsed = [(words, column, spec, how) for words, column, spec, how in Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"task.template={template!r}: {error}") from None
    if any(column == "" or spec or how for _, column, spec, how in parsed):
        raise UserError(f"task.template={template!r}: columns stand in braces by their plain name, as in {{sentence}}")
    return [(words, column) for words, column, _, _ in parsed]


def text_split(task: Texts, name: str, rows: Rows) -> TextSplit:
    """A split from what its file says: all rows, the part of train that is or is not held out, or some of them.

    A text is what the template's columns say; other columns, such as numbers of lines, are left out. Whether a text is
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
    fields = [tuple(row[place] for place in places) for row in rows.fields]
    rows = Rows(tuple(rows.columns[place] for place in places), fields, rows.labels, rows.source)
    labels = np.array(rows.labels, dtype=np.int64)

    def key(row: int) -> str:
        return "\0".join(rows.fields[row])

    said = [said_by(row) for row in fields]
    chosen = rows_of(task, name, labels, task.options, key=said.__getitem__, where=rows.source).tolist()
    wanted = (task.take or {}).get(name)
    if wanted is not None:
        if wanted > len(chosen):
            raise UserError(f"task.take.{name}={wanted}, but {rows.source} has {len(chosen)} texts for it")
        drawn = sorted(chosen, key=lambda row: (uniform("take", key(row)), row))
        chosen = sorted(drawn[:wanted])
    content = hashlib.blake2b("\0".join(rows.columns).encode(), digest_size=16)
    for row in chosen:
        content.update(f"{key(row)}\0{labels[row]}\n".encode())
    texts = TextRows(rows.columns, tuple(rows.fields[row] for row in chosen))
    return TextSplit(name, texts, torch.from_numpy(labels[chosen]), content.hexdigest())
