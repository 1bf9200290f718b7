"""Four tasks of GLUE (Wang et al. 2018): local files in the layout of its download, or Hugging Face's nyu-mll/glue.

Train of GLUE's own splits has labels, validation (dev.tsv) reports, and the labels of test are not public.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.data import Glue
from configs.errors import UserError
from soups.errors import first_line
from tasks.files import ROOT
from tasks.held_out import own_name
from tasks.split import Examples
from tasks.texts import Rows, read_tsv, text_split


@dataclass(frozen=True)
class Layout:
    """The layout of a task's files."""

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
    """train or validation of a task, from <folder>/<TASK>/{train,dev}.tsv.

    Raises:
        UserError: no such split; a missing or broken file, by its line.
    """
    layout = LAYOUTS[subset]
    if split not in FILES:
        raise UserError(f"GLUE has labels for {' and '.join(FILES)}, not for {split!r}: set task.folders")
    path = folder / layout.folder / FILES[split]
    rows = read_tsv(path, layout.label, layout.ids, layout.header, needed=tuple(layout.texts))
    places = [rows.columns.index(column) for column in layout.texts]
    fields = [tuple(row[place] for place in places) for row in rows.fields]
    return Rows(tuple(layout.texts.values()), fields, rows.labels, path)


def read_hub(name: str, subset: str, split: str) -> Rows:
    """The same from Hugging Face's hub, or from a local copy of its repository.

    Raises:
        UserError: it is neither here nor can be downloaded.
    """
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


def load_split(task: Glue, name: str) -> Examples:
    """One split of a task of kind glue; raises as `read_local`, `read_hub` and `tasks.texts.text_split`."""
    folder, split = ROOT / task.folder, own_name(task, name)
    if (folder / LAYOUTS[task.subset].folder).is_dir():
        rows = read_local(folder, task.subset, split)
    else:
        rows = read_hub(str(folder if folder.exists() else task.folder), task.subset, split)
    return text_split(task, name, rows)
