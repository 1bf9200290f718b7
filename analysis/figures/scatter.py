"""Figures L.1 to L.3: Figure 1's scatter with averages along training, and with all of Table 3's methods."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from analysis.figures.style import SETTINGS, STYLE, save_with_numbers
from analysis.measure.methods import measure, need_shifts, scatter_points, titled
from analysis.measure.mixtures import axis_labels
from analysis.tables.cells import NAMES
from analysis.tables.named_rows import measure_named_rows, named_rows_figure, need_labels, tidy_named_rows
from configs.schema import Experiment
from eval.forward import Evaluator
from store.runs import RunFolder

# Those of Figure 1, and for the rest of Table 3 Okabe and Ito's colours with other markers.
MORE = {
    "second_best": ("#E69F00", "D", 45),
    "greedy_random_order": ("#CC79A7", "^", 60),
    "greedy_with_replacement": ("#CC79A7", "v", 60),
    "learned": ("#D55E00", "X", 60),
    "learned_by_layer": ("#D55E00", "<", 60),
    "learned_by_tensor": ("#D55E00", ">", 60),
    "model_stock": ("#0072B2", "p", 70),
    "wise_ft": ("#0072B2", "d", 60),
    "subset": ("#0072B2", "8", 60),
    "calibrated_ensemble": ("#56B4E9", "^", 60),
    "ensemble_with_replacement": ("#E69F00", "v", 60),
}


def styles() -> dict[str, tuple[str, str, str, int]]:
    """Kind of point -> label, colour, marker, size."""
    return STYLE | {kind: (NAMES[kind], *drawn) for kind, drawn in MORE.items()}


def methods_figure(points: pd.DataFrame, labels: tuple[str, str]) -> Figure:
    """Test accuracy against the mean of the shifts: individual models faded, every method of Table 3 with a marker.

    Args:
        points: name, kind, test, shift_mean (fractions), from `analysis.measure.methods.scatter_points`.
        labels: of both axes.
    """
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(3.8, 3.4))
        axes = figure.subplots()
        for kind, (label, colour, marker, size) in styles().items():
            drawn = points[points["kind"] == kind]
            if drawn.empty:
                continue
            x, y = 100 * drawn["test"], 100 * drawn["shift_mean"]
            is_pool = kind == "individual"
            axes.scatter(
                x,
                y,
                s=0.6 * size,
                c=colour,
                marker=marker,
                label=label,
                alpha=0.5 if is_pool else 1.0,
                edgecolors="none" if is_pool else "white",
                linewidths=0.3,
                zorder=2 if is_pool else 3,
            )
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncol=2, frameon=False)
        return figure


def figurel1(config: Experiment, stem: str = "figurel1", console: Console | None = None) -> list[Path]:
    """Write figurel1.{pdf,png,csv}: rows as trained, their EMA and SWA, and soups and ensembles of each kind.

    Raises:
        UserError: rows without names in `analysis.labels`, a sweep that is not finished, or a task without shifts.
    """
    del console  # a few soups, evaluated here
    need_shifts(config)
    need_labels(config)
    evaluator = Evaluator(config)
    tidy = tidy_named_rows(config, *measure_named_rows(config, evaluator), evaluator)
    figure = named_rows_figure(tidy, config.task.test, titled(config.task.name))
    return save_with_numbers(figure, tidy, RunFolder.of(config).analysis / stem)


def figurel2(config: Experiment, console: Console | None = None) -> list[Path]:
    """As `figurel1`, of an initialisation that was pretrained on ImageNet-21k."""
    return figurel1(config, "figurel2", console)


def figurel3(config: Experiment, console: Console | None = None) -> list[Path]:
    """Write figurel3.{pdf,png,csv}: Figure 1 with all methods of Table 3 that the experiment has, from cached logits.

    Raises:
        UserError: a stage before this one is not finished, or the task has no shifts.
    """
    del console  # nothing is evaluated
    need_shifts(config)
    points = scatter_points(config, *measure(config, Evaluator(config)))
    test, shifts = axis_labels(config).values()
    return save_with_numbers(methods_figure(points, (test, shifts)), points, RunFolder.of(config).analysis / "figurel3")
