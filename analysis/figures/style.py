"""Colours, markers, sizes and settings that all figures share, and how they are written."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from soups.files.atomic import replacing

# Okabe and Ito's colours, which differ for any colour vision; the markers follow the paper's Figure 1.
STYLE = {
    "individual": ("Individual models", "#009E73", "D", 28),
    "initialisation": ("Initialisation", "#000000", "h", 90),
    "best": ("Best individual (held-out)", "#D55E00", "D", 60),
    "uniform": ("Uniform soup", "#0072B2", "o", 90),
    "greedy": ("Greedy soup", "#CC79A7", "*", 200),
    "ensemble": ("Ensemble", "#56B4E9", "s", 60),
    "greedy_ensemble": ("Greedy ensemble", "#E69F00", "P", 80),
}
COLUMN, PAGE = 3.15, 6.69  # inches: 8 cm, a column of a paper, and 17 cm, its page
SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "model-soups",
}
styled = mpl.rc_context(SETTINGS)  # decorates functions that draw


def panels(rows: int, columns: int, height: float, *, width: float = PAGE, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure that is set as it is, without being scaled, and its (rows, columns) axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def two_lines(label: str) -> str:
    """An axis' label where panels are low, as in "Emoji test,\\ntop-1 accuracy (%)"."""
    return label.replace(", ", ",\n", 1)


def legend(figure: Figure, axes: Axes, columns: int, note: str = "", **options: Any) -> None:
    """Name what is drawn in one of a figure's axes, below all, or at `loc`; `note` says what has no line or marker."""
    handles, names = axes.get_legend_handles_labels()
    options = {"loc": "outside lower center", "columnspacing": 1.0, "handlelength": 1.6, "handletextpad": 0.5} | options
    figure.legend(handles, names, ncol=columns, title=note or None, alignment="left", **options)


def leave_out(axes: Axes, x: pd.Series, y: pd.Series) -> pd.Index:
    """The models far below all others, which would press the rest; a corner of the axes says where they are."""
    lows = [2.5 * low - 1.5 * high - 2 for low, high in (each.quantile([0.25, 0.75]) for each in (x, y))]
    is_far = (x < lows[0]) | (y < lows[1])
    if is_far.any():
        places = ", ".join(f"({a:.1f}, {b:.1f})" for a, b in zip(x[is_far], y[is_far], strict=True))
        axes.text(0.98, 0.02, f"not shown: {places}", transform=axes.transAxes, ha="right", fontsize=6.5)
        axes.margins(y=0.12)  # room for that line
    return x.index[is_far]


def inline_svg(figure: Figure, name: str, says: str) -> Markup:
    """A figure, which is laid out by this call, as SVG in a page of HTML: as wide as its place.

    `name` is that of the <svg>, and what its other ids begin with, so that no other drawing of the page has them;
    `says` is what it shows, for those who do not see it.
    """
    text = StringIO()
    with mpl.rc_context(SETTINGS | {"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    drawn = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", drawn[drawn.index("<svg") :])
    opening = Markup('<svg id="{}" role="group" aria-label="{}"').format(name, says)
    return Markup(re.sub(r'<svg(.*?) (?:width|height)="[^"]*pt"', rf"{opening}\1", drawn, count=1, flags=re.DOTALL))


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.pdf and stem.png, without dates, so that equal figures are equal files."""
    written = []
    # A figure of `panels` has its size; another one is cut to what is drawn.
    tight = None if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine) else "tight"
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        path = stem.with_name(stem.name + suffix)
        with mpl.rc_context(SETTINGS), replacing(path) as temporary:
            figure.savefig(temporary, metadata=metadata, bbox_inches=tight)
        written.append(path)
    return written


def save_with_numbers(figure: Figure, tidy: pd.DataFrame, stem: Path) -> list[Path]:
    """Write stem.pdf, stem.png and the numbers behind them as stem.csv."""
    return [*save(figure, stem), write_csv(tidy, stem.with_name(f"{stem.name}.csv"))]


def write_csv(table: pd.DataFrame, path: Path, numbers: str = "%.8f") -> Path:
    """Write a table whole or not at all, its numbers in a format; returns the path."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format=numbers)
    return path
