"""List the rows of a sweep before anything is trained:  python -m finetune.rows experiment=demo

A table of what differs from row to row. The functions for scripts of your own are those of store/rows.py.
"""

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from configs.cli import entry_point, parts_as_typed
from configs.schema import Experiment, dump, replicate
from store.rows import GROUPS, require_trainable, row_config

UNCUT = 10_000  # columns of a log: as wide as the widest table
NOTE = """Row 0 is the initialisation; all others start from it. Nothing was trained.
One row:    python -m finetune {typed} sweep.index=1      (row 0 first; an array job sets the index)
All rows:   python -m finetune {typed}
All stages: python reproduce.py {typed}"""


def differing(config: Experiment) -> tuple[list[str], list[list[Any]]]:
    """The settings that differ among rows, as in optim.lr, and their values, a list for each row from 1 on."""
    require_trainable(config)
    rows = [dump(row_config(config, row)) for row in range(1, config.sweep.size + 1)]
    names = [(group, name) for group in GROUPS for name in rows[0][group]]
    varied = [(group, name) for group, name in names if any(row[group][name] != rows[0][group][name] for row in rows)]
    return [f"{group}.{name}" for group, name in varied], [[row[group][name] for group, name in varied] for row in rows]


def cell(value: Any) -> str:
    """A setting in short: four digits of a number, the kinds of a choice; nothing for null and false.

    >>> cell(1.2309748931412387e-05), cell(None), cell([{"kind": "minimal", "crop": None}, {"kind": "rand"}])
    ('1.231e-05', '', 'minimal, rand')
    >>> cell({"rho": 0.05, "synchronised": True})
    'rho 0.05, synchronised'
    """
    match value:
        case None | False:  # not 0, which is a setting
            text = ""
        case True:
            text = "yes"
        case float():
            text = f"{value:.4g}"
        case {"kind": kind}:
            text = str(kind)
        case Mapping():
            shown = {name: cell(each) for name, each in value.items()}
            text = ", ".join(name if value[name] is True else f"{name} {each}" for name, each in shown.items() if each)
        case list() | tuple():
            text = ", ".join(map(cell, value))
        case _:
            text = str(value)
    return text


def table_of(config: Experiment) -> Table:
    """Row 0 first; a column for each setting that differs."""
    names, rows = differing(config)
    table = Table(title=config.name, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("row", justify="right")
    for name in names or ("",):
        table.add_column(name, overflow="fold")
    table.add_row("0", "initialisation", *[""] * (len(names) - 1))
    for number, values in enumerate(rows, start=1):
        table.add_row(str(number), *(map(cell, values) if names else ("differs by its random stream alone",)))
    return table


def print_rows(config: Experiment, typed: str, console: Console | None = None) -> None:
    """Print the rows of an experiment, or of each replicate, and what to run next; in a file as wide as needed."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=UNCUT, color_system=None)
    for one in [replicate(config, seed) for seed in config.replicates] or [config]:
        console.print(table_of(one))
    note = NOTE.format(typed=typed).splitlines()
    console.print("\n".join(note[::3] if config.replicates else note), highlight=False, markup=False, soft_wrap=True)


def print_parts(config: Experiment) -> None:
    """The same for each experiment that one is made of and that trains rows."""
    for part, words in parts_as_typed(config, sys.argv[1:]):
        if not part.towers or not config.parts:
            print_rows(part, shlex.join(words))


if __name__ == "__main__":
    entry_point(print_parts, whole=True)()
