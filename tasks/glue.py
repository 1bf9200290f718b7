"""Four tasks of GLUE (Wang et al. 2018): local files in the layout of its download, or Hugging Face's nyu-mll/glue.

Of GLUE's own splits, train has labels, validation (dev.tsv) reports, and the labels of test are not public.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.data import Glue
from configs.errors import UserError
from tasks.files import ROOT
from tasks.parts import own_name
from tasks.tables import labelled, read_tsv
from tasks.texts import Rows, TextSplit, text_split


@dataclass(frozen=True)
class Layout:
    """How the files of a task look."""

    folder: str
    label: str  # column
    texts: Mapping[str, str]  # column -> what nyu-mll/glue calls it
    ids: Mapping[str, int]  # what a label says -> the class id of nyu-mll/glue
    header: tuple[str, ...] | None = None  # of files without one


BINARY = {"0": 0, "1": 1}
LAYOUTS = {
    "mrpc": Layout("MRPC", "Quality", {"#1 String": "sentence1", "#2 String": "sentence2"}, BINARY),
    "rte": Layout(
        "RTE",
        "label",
        {"sentence1": "sentence1", "sentence2": "sentence2"},
        {"entailment": 0, "not_entailment": 1},
    ),
    "cola": Layout("CoLA", "label", {"sentence": "sentence"}, BINARY, ("source", "label", "star", "sentence")),
    "sst2": Layout("SST-2", "label", {"sentence": "sentence"}, BINARY),
}
FILES = {"train": "train.tsv", "validation": "dev.tsv"}


def read_local(folder: Path, subset: str, split: str) -> Rows:
    """train or validation of a task, from <folder>/<TASK>/{train,dev}.tsv.

    Raises:
        UserError: no such split; a missing or broken file, by its line.
    """
    layout = LAYOUTS[subset]
    if split not in FILES:
        raise UserError(f"GLUE has labels for {' and '.join(FILES)}, not for {split!r}: set task.folders")
    path = folder / layout.folder / FILES[split]
    table = read_tsv(path, layout.header)
    rows = labelled(path, table, layout.label, layout.ids, first=1 if layout.header else 2)
    missing = [column for column in layout.texts if column not in rows.columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}, only {', '.join(table[0])}")
    places = [rows.columns.index(column) for column in layout.texts]
    fields = [tuple(row[place] for place in places) for row in rows.fields]
    return Rows(tuple(layout.texts.values()), fields, rows.labels, path)


def read_hub(name: str, subset: str, split: str) -> Rows:
    """The same from Hugging Face's hub, or from a local copy of its repository.

    Raises:
        UserError: it is neither here nor can be downloaded.
    """
    import datasets  # noqa: PLC0415  # seconds that other tasks need not wait for

    # Of a local copy the files are named one by one: by its own card, `datasets` would answer with the tables of any
    # other copy that it has seen before.
    files = [str(path) for path in sorted((Path(name) / subset).glob(f"{split}-*.parquet"))]
    try:
        if files:
            table = datasets.load_dataset("parquet", data_files={split: files}, split=split)
        else:
            table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # of the network, of parquet, of its cache, or of a name
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"task.folder={name} is neither a folder with GLUE's files nor a data set that can be had ({reason}): "
            "tasks/README.md says where to get them"
        ) from None
    columns = tuple(LAYOUTS[subset].texts.values())
    fields = [tuple(row[column] for column in columns) for row in table]
    return Rows(columns, fields, list(table["label"]), Path(name) / subset / split)


def load_split(task: Glue, name: str) -> TextSplit:
    """One split of a task of kind glue; raises as `read_local`, `read_hub` and `tasks.texts.text_split`."""
    folder, split = ROOT / task.folder, own_name(task, name)
    if (folder / LAYOUTS[task.subset].folder).is_dir():
        rows = read_local(folder, task.subset, split)
    else:
        rows = read_hub(str(folder if folder.exists() else task.folder), task.subset, split)
    return text_split(task, name, rows)
