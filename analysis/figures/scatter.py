"""Scatters of test against shifts: Figure 1 and those of its shape (5, G.1 to G.3, L.1 to L.3)."""

from collections.abc import Sequence

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from analysis.figures.style import SETTINGS, STYLE
from analysis.measure.methods import (
    SHIFT_MEAN,
    Method,
    measure,
    need_shifts,
    scatter_points,
    shift_name,
    tidy,
    titled,
)
from analysis.measure.mixtures import axis_labels
from analysis.tables.cells import METRICS, NAMES, measured
from analysis.tables.named_rows import measure_named_rows, named_rows_figure, need_labels, tidy_named_rows
from configs.data import Emoji
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from soups.scorers.metrics import score
from soups.scoring import Metric
from tasks.emoji.load import read_manifest
from tasks.files import ROOT

DRAWN_WITH_BARS = ("uniform", "greedy", "ensemble", "greedy_ensemble")
BARS = ["test_low", "test_high", "shift_low", "shift_high"]
SUBGROUP_METRICS: tuple[Metric, ...] = ("worst_group", "macro_f1")
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


def _markers(axes: Axes, points: pd.DataFrame) -> None:
    """One marker per model, soup and ensemble, test across and the shifts upwards, in per cent."""
    for kind, (label, colour, marker, size) in STYLE.items():
        drawn = points[points["kind"] == kind]
        if not drawn.empty:
            x, y = 100 * drawn["test"], 100 * drawn["shift_mean"]
            axes.scatter(x, y, s=size, c=colour, marker=marker, label=label, linewidths=0, alpha=0.9, zorder=3)


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
        _markers(axes, points)
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


def scatter_errors(scores: pd.DataFrame, test: str, shift: str = SHIFT_MEAN) -> pd.DataFrame:
    """The intervals around soups and ensembles in Figure 1: method, test_low, test_high, shift_low, shift_high.

    Args:
        scores: from `analysis.measure.methods.tidy`.
        test: name of the test split.
        shift: the column that is drawn upwards.
    """
    wide = scores.pivot(index="method", columns="column", values=["low", "high"])
    return pd.DataFrame(
        {
            "method": method,
            "test_low": wide.loc[method, ("low", test)],
            "test_high": wide.loc[method, ("high", test)],
            "shift_low": wide.loc[method, ("low", shift)],
            "shift_high": wide.loc[method, ("high", shift)],
        }
        for method in DRAWN_WITH_BARS
        if method in wide.index
    )


def scatter_numbers(
    config: Experiment,
    pool: Sequence[Method],
    methods: Sequence[Method],
    scores: pd.DataFrame,
    shifts: Sequence[str] | None = None,
) -> pd.DataFrame:
    """`scatter_points` with the intervals around soups and ensembles beside them, from `scatter_errors`.

    Args:
        config: of the experiment.
        pool: its models, the initialisation first.
        methods: of Table 3.
        scores: from `tidy`.
        shifts: those that are drawn; all where None.
    """
    points = scatter_points(config, pool, methods, shifts)
    bars = scatter_errors(scores, config.task.test, SHIFT_MEAN if shifts is None else shifts[0])
    return points.merge(bars.rename(columns={"method": "kind"}), on="kind", how="left") if len(bars) else points


def measure_scatter(config: Experiment, console: Console | None = None, *, one_shift: bool = False) -> pd.DataFrame:
    """The numbers of Figure 1's scatter of models, soups and ensembles, from cached logits.

    Args:
        config: of the experiment.
        console: not used; nothing is evaluated.
        one_shift: draw the first shift in place of the mean of all, as Figure G.2 does.

    Raises:
        UserError: a stage before this one is not finished, or a task without shifts.
    """
    del console
    need_shifts(config)
    evaluator = Evaluator(config)
    pool, methods = measure(config, evaluator)
    shifts = config.task.shifts[:1] if one_shift else None
    return scatter_numbers(config, pool, methods, tidy(config, methods, evaluator), shifts)


def draw_scatter(config: Experiment, numbers: pd.DataFrame, *, one_shift: bool = False) -> Figure:
    """Figure 1's scatter of an experiment; tables that have no intervals are drawn without bars."""
    task = config.task
    shifts = task.shifts[:1] if one_shift else task.shifts
    bars = numbers.dropna(subset=BARS) if set(BARS) <= set(numbers) else numbers.iloc[:0]
    metrics = measured(task, (task.test,)), measured(task, shifts)
    name = task.split_title(shifts[0]) if one_shift else shift_name(config)
    return figure1(
        numbers, bars.rename(columns={"kind": "method"}), titled(task.name), len(shifts), metrics, shift=name
    )


def subgroups(evaluator: Evaluator, split: str) -> Tensor:
    """(N,) which group each image of a split is in: the data's own, of the embedded benchmark its class's in Unicode.

    Raises:
        UserError: the data have no groups.
    """
    images, task = evaluator.split(split), evaluator.config.task
    if images.groups is not None:
        return images.groups
    if not isinstance(task, Emoji):
        raise UserError(f"Figure G.1 is by groups of images, such as regions, which {task.name} does not have")
    of_class = [row["group"] for row in read_manifest(ROOT / task.folder)["classes"]]
    names = sorted(set(of_class))
    return torch.tensor([names.index(of_class[i]) for i in task.ids])[images.labels]


def measure_subgroups(config: Experiment, console: Console | None = None) -> pd.DataFrame:
    """The numbers of Figure G.1, from cached logits.

    Of a task that is scored by groups or classes itself (FMoW, iWildCam), those of Figure 1. Of others `scatter_points`
    by the accuracy of the worst group and by macro F1, with `metric` as a column.

    Raises:
        UserError: a stage before this one is not finished, a task without shifts, or data without groups.
    """
    task = config.task
    if any(metric != "top1" for metric in task.metrics.values()):
        return measure_scatter(config, console)
    need_shifts(config)
    evaluator = Evaluator(config)
    pool, methods = measure(config, evaluator)
    groups = {split: subgroups(evaluator, split) for split in task.reported}
    points = scatter_points(config, pool, methods)
    drawn = [*pool[1:], *methods]

    def scored(metric: Metric, method: Method, split: str) -> float:
        labels, answers = evaluator.split(split).labels, method.predicted[split]
        return sum(score(metric, each, labels, groups[split]) for each in answers) / len(answers)

    frames = []
    for metric in SUBGROUP_METRICS:
        by_split = {split: [scored(metric, method, split) for method in drawn] for split in task.reported}
        mean = pd.DataFrame({shift: by_split[shift] for shift in task.shifts}).mean(axis=1)
        frames.append(points.assign(metric=metric, test=by_split[task.test], shift_mean=mean))
    return pd.concat(frames, ignore_index=True)


def draw_subgroups(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure G.1 of an experiment: a panel for each metric."""
    if "metric" not in numbers:
        return draw_scatter(config, numbers)
    with mpl.rc_context(SETTINGS):
        metrics = list(dict.fromkeys(numbers["metric"]))
        figure = Figure(figsize=(0.4 + 3.2 * len(metrics), 3.0))
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            _markers(axes, numbers[numbers["metric"] == metric])
            name = METRICS[metric]
            axes.set_xlabel(f"{titled(config.task.name)} test, {name[:1].lower()}{name[1:]} (%)")
            axes.set_ylabel(f"{titled(shift_name(config))}, {name[:1].lower()}{name[1:]} (%)")
        figure.subplots_adjust(wspace=0.3)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncol=4, frameon=False)
        return figure


def measure_rows(config: Experiment, console: Console | None = None) -> pd.DataFrame:
    """The numbers of Figures L.1 and L.2: rows as trained, their EMA and SWA, and soups and ensembles of each kind.

    Raises:
        UserError: rows without names in `analysis.labels`, a sweep that is not finished, or a task without shifts.
    """
    del console  # a few soups, evaluated here
    need_shifts(config)
    need_labels(config)
    evaluator = Evaluator(config)
    return tidy_named_rows(config, *measure_named_rows(config, evaluator), evaluator)


def draw_rows(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure L.1 of an experiment."""
    return named_rows_figure(numbers, config.task.test, titled(config.task.name))


def measure_methods(config: Experiment, console: Console | None = None) -> pd.DataFrame:
    """The numbers of Figure L.3: Figure 1 with all methods of Table 3 that the experiment has, from cached logits.

    Raises:
        UserError: a stage before this one is not finished, or the task has no shifts.
    """
    del console  # nothing is evaluated
    need_shifts(config)
    return scatter_points(config, *measure(config, Evaluator(config)))


def draw_methods(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure L.3 of an experiment."""
    test, shifts = axis_labels(config).values()
    return methods_figure(numbers, (test, shifts))
