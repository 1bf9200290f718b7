"""Settings kept as a table: one row a line, columns named by dotted fields."""

import csv
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_table(path: Path) -> list[dict[str, dict[str, Any]]]:
    """Each line as group -> field -> value; columns without a dot are notes, and empty cells are left out.

    Args:
        path: a csv, from the project's root where it is not absolute. Cells are JSON values or plain words.

    Raises:
        UserError: the file is missing, or a line is longer than the head.
    """
    try:
        state = (ROOT / path).stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return _table(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _table(path: Path, changed: int, size: int) -> list[dict[str, dict[str, Any]]]:
    """`read_table`, once for each state of a file: every row of a sweep is one of its lines."""
    try:
        with (ROOT / path).open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    table: list[dict[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=2):
        if None in line or None in line.values():
            raise UserError(f"{path}, line {number}: another number of cells than the head has")
        nested: dict[str, dict[str, Any]] = {}
        for name, text in line.items():
            group, dot, field = name.partition(".")
            if dot and text != "":
                nested.setdefault(group, {})[field] = _value(text)
        table.append(nested)
    return table
