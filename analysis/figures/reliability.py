"""Reliability diagrams: is a model right as often as it says, before and after temperature scaling."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.style import legend, panels, styled
from analysis.measure.calibration import calibration_of
from analysis.measure.methods import soup_record
from analysis.tables.cells import NAMES
from configs.schema import Experiment
from eval.calibration import Calibration, calibrate
from eval.forward import Evaluator
from soups.experiment.soups import logits_of

SHOWN = ("best", "uniform", "greedy", "ensemble")
ACCURACY, GAP = "#0072B2", "#D55E00"  # Okabe and Ito's colours, like those of analysis.figures.style


def reliability_rows(models: Mapping[str, Calibration]) -> pd.DataFrame:
    """One row per model, stage and bin, the numbers behind the figure.

    Args:
        models: the name of each model -> from `eval.calibration.calibrate`.

    Returns:
        model, stage (before or after), beta (of that stage: 1 before), ece (of all bins), bin, count, confidence,
        accuracy; fractions throughout, and NaN in bins without examples.
    """
    frames = []
    for name, found in models.items():
        for stage, beta, bins in (("before", 1.0, found.before), ("after", found.beta, found.after)):
            whole = {"model": name, "stage": stage, "beta": beta, "ece": bins.ece, "bin": range(len(bins.count))}
            of_bins = {"count": bins.count, "confidence": bins.confidence, "accuracy": bins.accuracy}
            frames.append(pd.DataFrame(whole | {key: column.numpy() for key, column in of_bins.items()}))
    return pd.concat(frames, ignore_index=True)


@styled
def draw_reliability(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """One column per model; above as it is, below with its temperature fitted on the held-out split.

    A bar stands at the mean confidence of its bin and is as high as the bin's accuracy; what is missing from the
    diagonal, or too much, is the gap. Below each diagram is the number of examples of every bin.
    """
    del config
    models = numbers["model"].unique()
    # Each stage is a diagram above its counts, and all counts have one scale.
    width, heights = 0.6 + 1.9 * len(models), [3, 0.8, 3, 0.8]
    figure, grid = panels(4, len(models), 5.4, width=width, sharex=True, height_ratios=heights)
    for column, model in zip(grid.T, models, strict=True):
        for top, stage in ((0, "before"), (2, "after")):
            bins = numbers[(numbers["model"] == model) & (numbers["stage"] == stage)]
            column[top].set_title(f"{model}\nas trained" if top == 0 else f"β = {bins['beta'].iloc[0]:.2f}")
            _diagram(column[top], column[top + 1], bins)
            column[top].sharey(grid[0, 0])
            column[top + 1].sharey(grid[1, 0])
        column[-1].set_xlabel("Confidence (%)")
    for top in (0, 2):
        grid[top, 0].set_ylabel("Accuracy (%)")
        grid[top + 1, 0].set_ylabel("Images")
    for axes in grid.flat:
        axes.label_outer()
    legend(figure, grid[0, 0], 3)
    return figure


def _widths(centres: np.ndarray) -> np.ndarray:
    """Bars of bins at these places, as wide as to the nearest neighbour and 1 to 6 points."""
    if len(centres) < 2:
        return np.full(len(centres), 6.0)
    apart = np.diff(centres, prepend=-np.inf, append=np.inf)
    return np.clip(0.9 * np.minimum(apart[:-1], apart[1:]), 1.0, 6.0)


def _diagram(above: Axes, below: Axes, bins: pd.DataFrame) -> None:
    full = bins[bins["count"] > 0]
    confidence, accuracy, count = 100 * full["confidence"].to_numpy(), 100 * full["accuracy"].to_numpy(), full["count"]
    widths = _widths(confidence)
    above.bar(confidence, accuracy, widths, color=ACCURACY, alpha=0.75, linewidth=0, label="accuracy", zorder=2)
    look: dict[str, Any] = {
        "facecolor": (*mpl.colors.to_rgb(GAP), 0.35),
        "edgecolor": GAP,
        "linewidth": 0.6,
        "hatch": "////",
    }
    gap = confidence - accuracy
    above.bar(confidence, gap, widths, bottom=accuracy, label="gap to confidence", zorder=3, **look)
    above.plot([0, 100], [0, 100], color="black", lw=0.8, ls="--", label="calibrated", zorder=4)
    above.set(xlim=(0, 100), ylim=(0, 100))
    # Bars of a model that is too modest can reach this corner, hence the box.
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    text = f"ECE {100 * full['ece'].iloc[0]:.1f} %\nn = {count.sum():,}"
    above.text(4, 95, text, va="top", fontsize=7, zorder=5, bbox=box)
    below.bar(confidence, count, widths, color="#666666", linewidth=0, zorder=2)


def measure_reliability(config: Experiment) -> pd.DataFrame:
    """One row per model, stage and bin, from cached logits: `reliability_rows`, with those of `calibration_of`.

    Models are the best individual, the uniform and greedy soup and the ensemble, those that the experiment has, by
    their names in tables. Temperatures are fitted on the held-out split, and bins are of the test split.

    Raises:
        UserError: a soup is missing, or was selected on a test or shift split.
    """
    evaluator, held_out, test = Evaluator(config), config.task.held_out, config.task.test
    labels = {split: evaluator.split(split).labels for split in (held_out, test)}
    found, scores = {}, []
    for recipe in [each for each in SHOWN if each in config.recipes]:
        name, soup = NAMES[recipe], soup_record(config, recipe)
        logits = evaluator.projected(logits_of(soup, test, evaluator), test)
        fitted_on = logits_of(soup, held_out, evaluator), labels[held_out]
        found[name] = calibrate(fitted_on, (logits, labels[test]), bins=config.analysis.bins)
        for stage, beta in (("before", 1.0), ("after", found[name].beta)):
            errors = calibration_of(evaluator, {test: beta * logits.double()}.__getitem__, [test])
            scores.append({"model": name, "stage": stage} | errors)
    return reliability_rows(found).merge(pd.DataFrame(scores).drop(columns="ece"), on=["model", "stage"])
