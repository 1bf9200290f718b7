"""Tables as the page's template takes them: cells that keep the number in the file beside the text that is shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.tables.cells import percent


@dataclass(frozen=True)
class Interval:
    """A difference drawn on a line, in percentages of its length from left to right."""

    low: float
    mean: float
    high: float
    zero: float


@dataclass(frozen=True)
class Cell:
    """What one cell says."""

    parts: tuple[tuple[str, str | None], ...]  # texts, each with the number in the file where it is one
    share: float | None = None  # in [0, 1], how much of the cell is tinted
    interval: Interval | None = None
    kind: str = ""  # "number" is set to the right, "text" to the left; or a name for the style sheet


@dataclass(frozen=True)
class Table:
    """Cells under their heads; the first of each line is the line's own head."""

    caption: str
    heads: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    kind: str = ""  # a name for the style sheet
    sortable: bool = False


def text(words: object, kind: str = "text") -> Cell:
    """Words alone."""
    return Cell(((str(words), None),), kind=kind)


def number(word: str, shown: str) -> Cell:
    """A number of a file, and how it is shown; an empty cell of the file stays empty."""
    return Cell(((shown if word else "", word or None),), kind="number")


def is_number(word: str) -> bool:
    """Whether a cell of a file is a finite number."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def short(word: str) -> str:
    """A number of a file in three digits that count, and other words as they are.

    >>> short("0.0019118233205326885"), short("620"), short("rand"), short("")
    ('0.00191', '620', 'rand', '')
    """
    if not is_number(word):
        return word
    value = float(word)
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def percentage(word: str) -> str:
    """A fraction of a file in per cent, and an empty cell as it is.

    >>> percentage("0.55000000"), percentage("")
    ('55.0', '')
    """
    return percent(float(word)) if word else ""


def cells_of(words: pd.Series) -> tuple[Cell, ...]:
    """A line of a csv: numbers in three digits, digests by their first eight, the rest as it is."""
    cells = []
    for name, word in words.items():
        if name == "digest":  # of digits alone it would be a number
            cells.append(Cell(((word[:8], word or None),), kind="code"))
        else:
            cells.append(number(word, short(word)) if is_number(word) else text(word))
    return tuple(cells)


def plain(words: pd.DataFrame, caption: str, heads: Sequence[str] | None = None) -> Table:
    """All of a csv."""
    lines = tuple(cells_of(line) for _, line in words.iterrows())
    return Table(caption, tuple(heads or words.columns), lines, kind="dense")
