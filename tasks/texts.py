"""Texts and labels of one split, in memory: texts of your own in tsv files, and four tasks of GLUE (Wang et al. 2018).

Files have one example a line with tabs between fields, as GLUE has them: no quoting, and nothing lost. GLUE is local
files in the layout of its download, or Hugging Face's nyu-mll/glue. Of its own splits train has labels, validation
(dev.tsv) reports, and the labels of test are not public.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np
import torch
from torch import Tensor

from configs.data import Glue, Sentences, Texts
from configs.errors import UserError
from soups.chance import uniform
from soups.errors import first_line
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
    path: Path,
    label: str,
    ids: Mapping[str, int],
    header: Sequence[str] | None = None,
    needed: Sequence[str] = (),
    *,
    remedy: str = "tasks/README.md says where to get it",
) -> Rows:
    """The texts and class ids of a file in UTF-8, with or without a byte-order mark.

    Lines end with a line feed or with carriage return and line feed, and with nothing else: sentences may contain
    quotes, which mean nothing, and every other character that ends a line for some program.

    Args:
        label: name of the label column.
        ids: label in the file -> class id.
        header: the columns, where the first line does not name them.
        needed: columns that must be there besides.

    Raises:
        UserError: a file, line, column, label or text that is missing or cannot be read, by its place.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
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
    """One split of texts of your own, from <folder>/<split>.tsv; labels are class ids or names of the options."""
    ids = {str(i): i for i in range(len(task.options))} | {option: i for i, option in enumerate(task.options)}
    remedy = "it has tabs between its fields"
    if name == task.held_out:
        remedy += "; without one for held-out, task.held_out_share=0.1 takes some of train's"
    path = ROOT / task.folder / f"{own_name(task, name)}.tsv"
    return text_split(task, name, read_tsv(path, task.label, ids, remedy=remedy))


@dataclass(frozen=True)
class Layout:
    """The layout of the files of one of GLUE's tasks."""

    folder: str
    label: str  # column
    texts: Mapping[str, str]  # column -> its name in nyu-mll/glue
    ids: Mapping[str, int]  # label in the file -> class id of nyu-mll/glue
    header: tuple[str, ...] | None = None  # columns of files that do not name them


BINARY = {"0": 0, "1": 1}
ONE, TWO = ({column: column for column in columns} for columns in (["sentence"], ["sentence1", "sentence2"]))
LAYOUTS = {
    "mrpc": Layout("MRPC", "Quality", {"#1 String": "sentence1", "#2 String": "sentence2"}, BINARY),
    "rte": Layout("RTE", "label", TWO, {"entailment": 0, "not_entailment": 1}),
    "cola": Layout("CoLA", "label", ONE, BINARY, ("source", "label", "star", "sentence")),
    "sst2": Layout("SST-2", "label", ONE, BINARY),
}
FILES = {"train": "train.tsv", "validation": "dev.tsv"}


def read_local(folder: Path, subset: str, split: str) -> Rows:
    """train or validation of one of GLUE's tasks, from <folder>/<TASK>/{train,dev}.tsv; raises as `read_tsv`."""
    layout = LAYOUTS[subset]
    if split not in FILES:
        raise UserError(f"GLUE has labels for {' and '.join(FILES)}, not for {split!r}: set task.folders")
    path = folder / layout.folder / FILES[split]
    rows = read_tsv(path, layout.label, layout.ids, layout.header, needed=tuple(layout.texts))
    places = [rows.columns.index(column) for column in layout.texts]
    fields = [tuple(row[place] for place in places) for row in rows.fields]
    return Rows(tuple(layout.texts.values()), fields, rows.labels, path)


def _read_hub(name: str, subset: str, split: str) -> Rows:
    """The same from Hugging Face's hub, or from a local copy of its repository."""
    import datasets  # noqa: PLC0415  # seconds that other tasks need not wait for

    # The files of a local copy are named one by one: by its own card, `datasets` would answer with the tables of any
    # other copy that it has seen before.
    files = [str(path) for path in sorted((Path(name) / subset).glob(f"{split}-*.parquet"))]
    try:
        if files:
            table = datasets.load_dataset("parquet", data_files={split: files}, split=split)
        else:
            table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # of the network, of parquet, of its cache, or of a name
        raise UserError(
            f"task.folder={name} is neither a folder with GLUE's files nor a data set that can be had "
            f"({first_line(error)}): tasks/README.md says where to get them"
        ) from None
    columns = tuple(LAYOUTS[subset].texts.values())
    fields = [tuple(row[column] for column in columns) for row in table]
    return Rows(columns, fields, list(table["label"]), Path(name) / subset / split)


def load_glue(task: Glue, name: str) -> Examples:
    """One split of a task of kind glue."""
    folder, split = ROOT / task.folder, own_name(task, name)
    if (folder / LAYOUTS[task.subset].folder).is_dir():
        rows = read_local(folder, task.subset, split)
    else:
        rows = _read_hub(str(folder if folder.exists() else task.folder), task.subset, split)
    return text_split(task, name, rows)
