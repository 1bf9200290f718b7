"""Tables of texts, read by the names of their columns: .tsv, .csv and .jsonl, in UTF-8."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soups.errors import UserError


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte-order mark; raises UserError where it is missing, or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8: save it as UTF-8") from None


def read_objects(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; empty lines are skipped. Raises UserError where a line is no object, or there is none."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: a {type(value).__name__}, not an object")
            found.append(value)
    if not found:
        raise UserError(f"{path} has no example")
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table by the names of its columns, which are its first line (.tsv, .csv) or its keys (.jsonl).

    In a .tsv quotes mean nothing; in a .csv they may stand around fields.
    """
    if path.suffix == ".jsonl":
        return [{key: str(value) for key, value in row.items()} for row in read_objects(path)]
    if path.suffix not in (".tsv", ".csv"):
        raise UserError(f"{path}: a table is a .tsv, a .csv or a .jsonl file")
    text = read_text(path)
    if path.suffix == ".tsv":
        lines = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
        numbered = list(enumerate(lines, start=1))
    else:
        reader = csv.reader(io.StringIO(text, newline=""))
        numbered = [(reader.line_num, row) for row in reader if row]
    (_, columns), *rows = numbered or [(1, [""])]
    for number, row in rows:
        if len(row) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(row)} fields, and there are {len(columns)} columns ({', '.join(columns)})"
            )
    if not rows:
        raise UserError(f"{path} has no example")
    return [dict(zip(columns, row, strict=True)) for _, row in rows]


def column(path: Path, rows: Sequence[dict[str, str]], name: str, remedy: str = "") -> list[str]:
    """One column; raises UserError where it is not there, with a `remedy`."""
    for number, row in enumerate(rows, start=1):
        if name not in row:
            raise UserError(f"{path} has no column {name!r} in row {number}, only {', '.join(row)}{remedy}")
    return [row[name] for row in rows]
