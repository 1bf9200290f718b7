"""Settings kept as a table: one row a line, columns named by dotted fields."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from soups.files import tables

ROOT = Path(__file__).resolve().parents[1]


def read_table(path: Path) -> list[dict[str, dict[str, Any]]]:
    """Each line of a csv as group -> field -> value; columns without a dot are notes, and empty cells are left out.

    Cells are JSON values or plain words. The path is from the project's root where it is not absolute.

    Raises:
        UserError: the file is missing, or a line has another number of cells than the head.
    """
    file = ROOT / path
    return _table(file, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=4)
def _table(file: Path, changed: int) -> list[dict[str, dict[str, Any]]]:
    """`read_table`, once for each state of a file: every row of a sweep is one of its lines."""
    table: list[dict[str, dict[str, Any]]] = []
    for line in tables.read_table(file):
        nested: dict[str, dict[str, Any]] = {}
        for name, text in line.items():
            group, dot, field = name.partition(".")
            if dot and text != "":
                nested.setdefault(group, {})[field] = _value(text)
        table.append(nested)
    return table


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
