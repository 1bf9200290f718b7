"""Reliability diagrams: is a model right as often as it says, before and after temperature scaling."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from analysis.figures.style import SETTINGS
from analysis.measure.calibration import calibration_of
from analysis.measure.methods import soup_record
from analysis.tables.cells import NAMES
from configs.schema import Experiment
from eval.calibration import Bins, Calibration, calibrate
from eval.forward import Evaluator
from soups.experiment.cook import logits_of

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
            columns = {"count": bins.count, "confidence": bins.confidence, "accuracy": bins.accuracy}
            frame = pd.DataFrame({key: column.numpy() for key, column in columns.items()})
            frame.insert(0, "bin", range(len(frame)))
            for place, (key, value) in enumerate(
                {"model": name, "stage": stage, "beta": beta, "ece": bins.ece}.items()
            ):
                frame.insert(place, key, value)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def reliability_figure(models: Mapping[str, Calibration]) -> Figure:
    """One column per model; above as it is, below with its temperature fitted on the held-out split.

    A bar stands at the mean confidence of its bin and is as high as the bin's accuracy; what is missing from the
    diagonal, or too much, is the gap. Below each diagram is the number of examples of every bin.

    Args:
        models: the name of each model -> from `eval.calibration.calibrate`.

    Raises:
        ValueError: there are no models.
    """
    if not models:
        raise ValueError("a reliability diagram needs at least one model")
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(0.6 + 2.0 * len(models), 5.4))
        # Each stage is a diagram above its counts; an empty row keeps the stages apart.
        grid = figure.subplots(
            5,
            len(models),
            sharex=True,
            squeeze=False,
            height_ratios=[3, 0.8, 0.35, 3, 0.8],
            gridspec_kw={"hspace": 0.1},
        )
        for column, (name, found) in enumerate(models.items()):
            grid[2, column].remove()
            stages = (("as trained", found.before), (f"β = {found.beta:.2f}", found.after))
            for top, (stage, bins) in zip((0, 3), stages, strict=True):
                _diagram(grid[top, column], bins)
                _counts(grid[top + 1, column], bins)
                grid[top, column].set_title(f"{name}\n{stage}" if top == 0 else stage, fontsize=8)
                for axes in grid[top : top + 2, column]:
                    axes.tick_params(labelbottom=False, labelleft=column == 0)
            grid[4, column].tick_params(labelbottom=True)
            grid[4, column].set_xlabel("confidence (%)")
        _share_counts(grid[[1, 4]])
        for top in (0, 3):
            grid[top, 0].set_ylabel("accuracy (%)")
            grid[top + 1, 0].set_ylabel("images")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, -0.03), ncol=3, frameon=False)
        return figure


def _widths(centres: np.ndarray) -> np.ndarray:
    """Bars of bins at these places, as wide as to the nearest neighbour and 1 to 6 points."""
    if len(centres) < 2:
        return np.full(len(centres), 6.0)
    apart = np.diff(centres, prepend=-np.inf, append=np.inf)
    return np.clip(0.9 * np.minimum(apart[:-1], apart[1:]), 1.0, 6.0)


def _drawn(bins: Bins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence and accuracy in per cent, and the number of examples, of the bins that have any."""
    full = bins.count > 0
    return 100 * bins.confidence[full].numpy(), 100 * bins.accuracy[full].numpy(), bins.count[full].numpy()


def _diagram(axes: Axes, bins: Bins) -> None:
    confidence, accuracy, _ = _drawn(bins)
    widths = _widths(confidence)
    axes.bar(confidence, accuracy, widths, color=ACCURACY, alpha=0.75, linewidth=0, label="accuracy", zorder=2)
    axes.bar(
        confidence,
        confidence - accuracy,
        widths,
        bottom=accuracy,
        facecolor=(*mpl.colors.to_rgb(GAP), 0.35),
        edgecolor=GAP,
        linewidth=0.6,
        hatch="////",
        label="gap to confidence",
        zorder=3,
    )
    axes.plot([0, 100], [0, 100], color="black", lw=0.8, ls="--", label="calibrated", zorder=4)
    axes.set(xlim=(0, 100), ylim=(0, 100))
    text = f"ECE {100 * bins.ece:.1f} %\nn = {int(bins.count.sum()):,}"
    # Bars of a model that is too modest can reach this corner, hence the box.
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    axes.text(4, 95, text, va="top", fontsize=7, zorder=5, bbox=box)


def _counts(axes: Axes, bins: Bins) -> None:
    confidence, _, count = _drawn(bins)
    axes.bar(confidence, count, _widths(confidence), color="#666666", linewidth=0, zorder=2)


def _share_counts(rows: np.ndarray) -> None:
    """One scale for all counts, so that models are comparable."""
    highest = max(axes.get_ylim()[1] for axes in rows.flat)
    for axes in rows.flat:
        axes.set_ylim(0, highest)


def calibrations(config: Experiment) -> dict[str, Calibration]:
    """Best individual, uniform soup, greedy soup and ensemble, those that the experiment has, by their names in tables.

    Temperatures are fitted on the held-out split, and bins are of the test split; logits come from the cache.

    Raises:
        UserError: a soup is missing, or was selected on a test or shift split.
    """
    evaluator, task = Evaluator(config), config.task
    labels = {split: evaluator.split(split).labels for split in (task.held_out, task.test)}
    return {
        name: calibrate(
            (logits_of(soup, task.held_out, evaluator), labels[task.held_out]),
            (evaluator.projected(logits_of(soup, task.test, evaluator), task.test), labels[task.test]),
            bins=config.analysis.bins,
        )
        for name, soup in _soups(config).items()
    }


def _soups(config: Experiment) -> dict[str, dict[str, Any]]:
    return {NAMES[recipe]: soup_record(config, recipe) for recipe in SHOWN if recipe in config.recipes}


def measure_reliability(config: Experiment, console: Console | None = None) -> pd.DataFrame:
    """One row per model, stage and bin, from cached logits: `reliability_rows`, with those of `calibration_of`.

    Raises:
        UserError: as `calibrations`.
    """
    del console  # nothing is evaluated
    evaluator, test, found = Evaluator(config), config.task.test, calibrations(config)
    scores = []
    for name, soup in _soups(config).items():
        logits = evaluator.projected(logits_of(soup, test, evaluator), test).double()
        for stage, beta in (("before", 1.0), ("after", found[name].beta)):
            errors = calibration_of(config, evaluator, {test: beta * logits}.__getitem__, [test])
            scores.append({"model": name, "stage": stage} | errors)
    return reliability_rows(found).merge(pd.DataFrame(scores).drop(columns="ece"), on=["model", "stage"])


def draw_reliability(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Reliability diagrams of an experiment, from `measure_reliability`."""
    del config
    models = {}
    for name, rows in numbers.groupby("model", sort=False):
        stages = {str(stage): _bins(group) for stage, group in rows.groupby("stage", sort=False)}
        beta = float(rows.loc[rows["stage"] == "after", "beta"].iloc[0])
        models[str(name)] = Calibration(beta, stages["before"], stages["after"])
    return reliability_figure(models)


def _bins(rows: pd.DataFrame) -> Bins:
    count, confidence, accuracy = (torch.tensor(rows[key].to_numpy()) for key in ("count", "confidence", "accuracy"))
    return Bins(count, confidence, accuracy)
