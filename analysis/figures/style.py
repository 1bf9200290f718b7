"""Figures from tidy tables; nothing here computes a result."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from soups.files.atomic import replacing

# Okabe and Ito's colours, told apart with any colour vision; the markers follow the paper's Figure 1.
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


TOP1 = "Top-1 accuracy"


def figure1(
    points: pd.DataFrame,
    errors: pd.DataFrame,
    task: str,
    shifts: int = 5,
    metrics: tuple[str, str] = (TOP1, TOP1),
    *,
    shift: str = "the shift",
) -> Figure:
    """Test accuracy against the mean of the shifts, one marker per model, soup and ensemble.

    Args:
        points: name, kind, test, shift_mean (fractions), from `analysis.measure.methods.scatter_points`.
        errors: method, test_low, test_high, shift_low, shift_high: differences to the best individual (fractions);
            drawn as bars around the soups.
        task: name of the benchmark, for the axes.
        shifts: how many there are.
        metrics: by which test and the shifts are scored, where not by accuracy.
        shift: what it is called, where there is one.
    """
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(3.8, 3.2))
        axes = figure.subplots()
        best = points[points["kind"] == "best"].iloc[0]
        for kind, (label, colour, marker, size) in STYLE.items():
            drawn = points[points["kind"] == kind]
            if drawn.empty:
                continue
            x, y = 100 * drawn["test"], 100 * drawn["shift_mean"]
            axes.scatter(x, y, s=size, c=colour, marker=marker, label=label, linewidths=0, alpha=0.9, zorder=3)
        for _, row in errors.iterrows():
            x0, y0 = best["test"], best["shift_mean"]
            point = points[points["kind"] == row["method"]].iloc[0]
            colour = STYLE[row["method"]][1]
            ends = 100 * (x0 + row["test_low"]), 100 * (x0 + row["test_high"])
            axes.plot(ends, [100 * point["shift_mean"]] * 2, color=colour, lw=0.8, alpha=0.7, zorder=2)
            ends = 100 * (y0 + row["shift_low"]), 100 * (y0 + row["shift_high"])
            axes.plot([100 * point["test"]] * 2, ends, color=colour, lw=0.8, alpha=0.7, zorder=2)
        axes.set_xlabel(f"{task} test accuracy, top-1 (%)" if metrics[0] == TOP1 else f"{task} test, {metrics[0]} (%)")
        score = "accuracy" if metrics[1] == TOP1 else metrics[1]
        counted = {1: f"{score} on {shift}", 5: f"Mean {score} on the five shifts"}
        label = counted.get(shifts, f"Mean {score} on the {shifts} shifts")
        axes.set_ylabel(f"{label[:1].upper()}{label[1:]} (%)")
        # Below the axes, where it can hide no model.
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncol=3, frameon=False)
        return figure


def coefficients_map(shares: pd.DataFrame) -> Figure:
    """Mixing coefficients of a learned soup: groups of parameters down, models across (Appendix I).

    Args:
        shares: column `group`, then one column for each model; rows sum to 1.
    """
    with mpl.rc_context(SETTINGS):
        numbers = shares.drop(columns="group")
        figure = Figure(figsize=(1.6 + 0.25 * len(numbers.columns), 1.2 + 0.14 * len(numbers)))
        axes = figure.subplots()
        image = axes.imshow(100 * numbers.to_numpy(), aspect="auto", cmap="viridis", vmin=0)
        axes.set_xticks(range(len(numbers.columns)), [name.removeprefix("row ") for name in numbers.columns])
        axes.set_yticks(range(len(numbers)), shares["group"].tolist(), fontsize=6)
        axes.set_xlabel("model (row of the sweep; 0 is the initialisation)")
        axes.grid(visible=False)
        figure.colorbar(image, label="mixing coefficient (%)")
        return figure


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
