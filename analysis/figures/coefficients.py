"""Mixing coefficients of learned soups (Appendix I)."""

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.style import panels, styled
from analysis.measure.methods import soup_record
from configs.schema import Experiment, Recipe
from store.runs import RunFolder


def measure_coefficients(config: Experiment, *, recipe: Recipe) -> pd.DataFrame:
    """Column `group`, then one column for each model; rows sum to 1.

    Raises:
        UserError: there is no soup of this recipe.
    """
    soup_record(config, recipe)
    return pd.read_csv(RunFolder.of(config).soup(recipe) / "coefficients.csv")


@styled
def draw_coefficients(config: Experiment, shares: pd.DataFrame) -> Figure:
    """Mixing coefficients of a learned soup: groups of parameters down, models across (Appendix I)."""
    del config
    numbers = shares.drop(columns="group")
    width = 1.6 + 0.25 * len(numbers.columns)
    figure, ((axes,),) = panels(1, 1, 1.2 + 0.14 * len(numbers), width=width)
    image = axes.imshow(100 * numbers.to_numpy(), aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(numbers.columns)), [name.removeprefix("row ") for name in numbers.columns])
    axes.set_yticks(range(len(numbers)), shares["group"].tolist(), fontsize=6)
    axes.set_xlabel("Model (row of the sweep; 0 is the initialisation)")
    axes.grid(visible=False)
    figure.colorbar(image, label="Mixing coefficient (%)")
    return figure
