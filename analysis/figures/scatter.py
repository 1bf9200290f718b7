"""Scatters of test against shifts: Figure 1 and those of its shape (5, G.1 to G.3 and L.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from analysis.figures.style import COLUMN, STYLE, legend, panels, styled, two_lines
from analysis.measure.methods import NAN, SHIFT_MEAN, Method, measure, need_shifts, tidy
from analysis.measure.mixtures import axis_labels
from analysis.tables.cells import NAMES
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
MORE = {  # for the rest of Table 3 Okabe and Ito's colours with other markers
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
# Figure 1's methods lie above the others, which may be at the same place.
ABOVE = {kind: (kind in STYLE) + (kind == "greedy") - (kind == "individual") for kind in STYLE | MORE}


def styles() -> dict[str, tuple[str, str, str, int]]:
    """Kind of point -> label, colour, marker, size."""
    return STYLE | {kind: (NAMES[kind], *drawn) for kind, drawn in MORE.items()}


def _panel(axes: Axes, points: pd.DataFrame, looks: Mapping[str, tuple[str, str, str, int]]) -> None:
    """One marker per model, soup and ensemble, test across and the shifts upwards, in per cent, with bars if known."""
    for kind, (label, colour, marker, size) in looks.items():
        drawn = points[points["kind"] == kind]
        if drawn.empty:
            continue
        x, y = 100 * drawn["test"], 100 * drawn["shift_mean"]
        look = {"alpha": 0.5, "lw": 0} if kind == "individual" else {"edgecolors": "white", "lw": 0.3}
        axes.scatter(x, y, s=0.6 * size, c=colour, marker=marker, label=label, zorder=3 + ABOVE[kind], **look)
    if set(BARS) <= set(points):
        best = 100 * points[points["kind"] == "best"].iloc[0]["test":"shift_mean"]
        for _, row in points.dropna(subset=BARS).iterrows():
            ends = 100 * row[BARS]
            line: dict[str, Any] = {"color": looks[row["kind"]][1], "lw": 0.8, "zorder": 2}
            axes.plot(best["test"] + ends[["test_low", "test_high"]], [100 * row["shift_mean"]] * 2, **line)
            axes.plot([100 * row["test"]] * 2, best["shift_mean"] + ends[["shift_low", "shift_high"]], **line)


@styled
def scatter_figure(points: pd.DataFrame, labels: Sequence[str], *, every_method: bool = False) -> Figure:
    """Test accuracy against the mean of the shifts: individual models faded, soups and ensembles each with a marker.

    Args:
        points: name, kind, test, shift_mean (fractions), from `scatter_points`; with the columns of `BARS`, bars
            are drawn around soups and ensembles.
        labels: of both axes.
        every_method: of Table 3 has a marker, not those of Figure 1 alone.
    """
    height, width = (4.6, 4.2) if every_method else (3.5, COLUMN)
    figure, ((axes,),) = panels(1, 1, height, width=width)
    _panel(axes, points, styles() if every_method else STYLE)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    note = "Bars: 95 % intervals of the difference to the best individual"
    legend(figure, axes, 2, note if axes.lines else "")
    return figure


def scatter_points(
    config: Experiment,
    pool: Sequence[Method],
    methods: Sequence[Method],
    scores: pd.DataFrame | None = None,
    *,
    one_shift: bool = False,
) -> pd.DataFrame:
    """One row per point of Figure 1: name, kind (individual or the method's name), held_out, test, shift_mean.

    Args:
        config: of the experiment.
        pool: its models, the initialisation first, which is drawn as a method.
        methods: of Table 3.
        scores: from `tidy`; with them soups and ensembles have the intervals of their differences to the best
            individual, in `BARS`.
        one_shift: the first shift stands in place of the mean of all.
    """
    task = config.task
    over, column = (task.shifts[:1], task.shifts[0]) if one_shift else (task.shifts, SHIFT_MEAN)
    kinds = [("individual", method) for method in pool[1:]] + [(method.name, method) for method in methods]
    points = pd.DataFrame(
        {
            "name": method.name,
            "kind": kind,
            "held_out": method.held_out,
            "test": method.accuracy(task.test),
            "shift_mean": method.accuracy(*over) if over else NAN,
        }
        for kind, method in kinds
    )
    drawn = pd.DataFrame() if scores is None else scores[scores["method"].isin(DRAWN_WITH_BARS)]
    for name, of in {"test": task.test, "shift": column}.items() if len(drawn) else ():
        ends = drawn[drawn["column"] == of].set_index("method")
        points[[f"{name}_low", f"{name}_high"]] = ends[["low", "high"]].reindex(points["kind"]).to_numpy()
    return points


def measure_scatter(config: Experiment, *, one_shift: bool = False, bars: bool = True) -> pd.DataFrame:
    """The numbers of Figure 1's scatter of models, soups and ensembles, from cached logits.

    With `one_shift`, of the first shift in place of the mean of all, as in Figure G.2; without `bars`, no intervals.

    Raises:
        UserError: a stage before this one is not finished, or a task without shifts.
    """
    need_shifts(config)
    evaluator = Evaluator(config)
    pool, methods = measure(evaluator)
    scores = tidy(methods, evaluator) if bars else None
    return scatter_points(config, pool, methods, scores, one_shift=one_shift)


def _with(config: Experiment, **settings: object) -> Experiment:
    """The same experiment with other settings of its task, for what axes are called."""
    task = replace(config.task, **settings)  # type: ignore[type-var]
    return replace(config, task=task)  # type: ignore[type-var]  # mypy does not know pydantic's


def draw_scatter(
    config: Experiment, numbers: pd.DataFrame, *, one_shift: bool = False, every_method: bool = False
) -> Figure:
    """Figure 1's scatter of an experiment; tables that have no intervals are drawn without bars."""
    if one_shift:
        config = _with(config, shifts=config.task.shifts[:1])
    return scatter_figure(numbers, [*axis_labels(config).values()], every_method=every_method)


@styled
def draw_held_out(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Test against held-out accuracy of individual models, from the numbers of Figure 1, and which held-out chooses."""
    pool, x_label = numbers[numbers["kind"].isin(["individual", "best"])], axis_labels(config)[config.task.test]
    figure, ((axes,),) = panels(1, 1, 3.2, width=COLUMN)
    for kind, drawn in pool.groupby("kind", sort=False):
        label, colour, marker, size = STYLE[str(kind)]
        look = {"s": 0.6 * size, "alpha": 0.5 if kind == "individual" else 1.0, "lw": 0, "label": label}
        axes.scatter(100 * drawn["held_out"], 100 * drawn["test"], c=colour, marker=marker, **look)
    ends = 100 * max(pool["held_out"].min(), pool["test"].min()), 100 * min(pool["held_out"].max(), pool["test"].max())
    axes.plot(ends, ends, color="black", lw=0.7, ls="--", zorder=1, label="equal")
    axes.set(xlabel=f"Held-out, {x_label.partition(', ')[2]}", ylabel=x_label)
    individual = pool[pool["kind"] == "individual"]
    if individual[["held_out", "test"]].nunique().min() > 1:
        rank = individual["held_out"].corr(individual["test"], method="spearman")
        axes.set_title(f"rank correlation {rank:.2f}")
    legend(figure, axes, 2)
    return figure


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


def measure_subgroups(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure G.1, from cached logits.

    Of a task that is scored by groups or classes itself (FMoW, iWildCam), those of Figure 1. Of others `scatter_points`
    by the accuracy of the worst group and by macro F1, with `metric` as a column.

    Raises:
        UserError: a stage before this one is not finished, a task without shifts, or data without groups.
    """
    task = config.task
    if any(metric != "top1" for metric in task.metrics.values()):
        return measure_scatter(config)
    need_shifts(config)
    evaluator = Evaluator(config)
    pool, methods = measure(evaluator)
    groups = {split: subgroups(evaluator, split) for split in task.reported}
    points = scatter_points(config, pool, methods)
    drawn = [*pool[1:], *methods]

    def scored(metric: Metric, method: Method, split: str) -> float:
        labels, answers = evaluator.split(split).labels, method.of(split).predicted[split]
        return sum(score(metric, each, labels, groups[split]) for each in answers) / len(answers)

    frames = []
    for metric in SUBGROUP_METRICS:
        by_split = {split: [scored(metric, method, split) for method in drawn] for split in task.reported}
        mean = pd.DataFrame({shift: by_split[shift] for shift in task.shifts}).mean(axis=1)
        frames.append(points.assign(metric=metric, test=by_split[task.test], shift_mean=mean))
    return pd.concat(frames, ignore_index=True)


@styled
def draw_subgroups(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure G.1 of an experiment: a panel for each metric."""
    if "metric" not in numbers:
        return draw_scatter(config, numbers)
    metrics = list(dict.fromkeys(numbers["metric"]))
    figure, (line,) = panels(1, len(metrics), 3.2)
    for axes, metric in zip(line, metrics, strict=True):
        _panel(axes, numbers[numbers["metric"] == metric], STYLE)
        x, y = axis_labels(_with(config, metrics=dict.fromkeys(config.task.reported, metric))).values()
        axes.set(xlabel=x, ylabel=two_lines(y))
    legend(figure, line[0], 4)
    return figure
