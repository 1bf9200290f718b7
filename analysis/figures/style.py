"""Colours, markers and settings that all figures share, and how they are written."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

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
SETTINGS = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.dpi": 200,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,
    "svg.hashsalt": "model-soups",
}


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.pdf and stem.png, without dates, so that equal figures are equal files."""
    written = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        path = stem.with_name(stem.name + suffix)
        with mpl.rc_context(SETTINGS), replacing(path) as temporary:
            figure.savefig(temporary, metadata=metadata)
        written.append(path)
    return written


def save_with_numbers(figure: Figure, tidy: pd.DataFrame, stem: Path) -> list[Path]:
    """Write stem.pdf, stem.png and the numbers behind them as stem.csv."""
    files = save(figure, stem)
    csv = stem.with_name(f"{stem.name}.csv")
    with replacing(csv) as temporary:
        tidy.to_csv(temporary, index=False, float_format="%.8f")
    return [*files, csv]
