"""Mixing coefficients of learned soups (Appendix I)."""

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.style import SETTINGS


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
