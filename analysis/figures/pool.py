"""A pool and its soups: scatters of test against shifts (Figures 1, 5, G.1 to G.3, L.3), and what recipes chose."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.figures.style import COLUMN, STYLE, leave_out, legend, panels, styled, two_lines
from analysis.measure.methods import NAN, SHIFT_MEAN, Method, measure, need_shifts, soup_record, tidy
from analysis.measure.mixtures import axis_labels
from analysis.tables.cells import NAMES
from configs.data import Emoji
from configs.errors import UserError
from configs.schema import Experiment, Recipe
from eval.forward import Evaluator
from soups.scorers.metrics import score
from soups.scoring import Metric
from store.runs import RunFolder
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
LOOKS = STYLE | {kind: (NAMES[kind], *drawn) for kind, drawn in MORE.items()}  # label, colour, marker, size
# Figure 1's methods lie above the others, which may be at the same place.
ABOVE = {kind: (kind in STYLE) + (kind == "greedy") - (kind == "individual") for kind in LOOKS}


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
    """Test accuracy against the mean of the shifts, from `scatter_points`, with bars where that has `BARS`.

    With `every_method`, all of Table 3 have markers, not those of Figure 1 alone.
    """
    height, width = (4.6, 4.2) if every_method else (3.5, COLUMN)
    figure, ((axes,),) = panels(1, 1, height, width=width)
    models = 100 * points.loc[points["kind"] == "individual", ["test", "shift_mean"]]
    _panel(axes, points.drop(leave_out(axes, models["test"], models["shift_mean"])), LOOKS if every_method else STYLE)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    note = "Bars: 95 % intervals of the difference to the best individual"
    legend(figure, axes, 2, note if axes.lines else "")
    return figure


def scatter_points(
    config: Experiment, pool: Sequence[Method], methods: Sequence[Method], scores: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row per point of Figure 1: name, kind (individual or the method's name), held_out, test, shift_mean.

    `pool` is the models, the initialisation first, which is drawn as a method. With `scores`, from `tidy`, soups and
    ensembles have the intervals of their differences to the best individual, in `BARS`.
    """
    task, rows = config.task, []
    for kind, method in [*(("individual", each) for each in pool[1:]), *((each.name, each) for each in methods)]:
        shifts = method.accuracy(*task.shifts) if task.shifts else NAN
        rows.append((method.name, kind, method.held_out, method.accuracy(task.test), shifts))
    points = pd.DataFrame(rows, columns=["name", "kind", "held_out", "test", "shift_mean"])
    if scores is not None:
        drawn = scores[scores["method"].isin(DRAWN_WITH_BARS)]
        shift = task.shifts[0] if len(task.shifts) == 1 else SHIFT_MEAN
        for name, column in (("test", task.test), ("shift", shift)) if len(drawn) else ():
            ends = drawn[drawn["column"] == column].set_index("method")
            points[[f"{name}_low", f"{name}_high"]] = ends[["low", "high"]].reindex(points["kind"]).to_numpy()
    return points


def _with(config: Experiment, **settings: object) -> Experiment:
    """The same experiment with other settings of its task, for what is drawn of it and what axes are called."""
    task = replace(config.task, **settings)  # type: ignore[type-var]
    return replace(config, task=task)  # type: ignore[type-var]  # mypy does not know pydantic's


def measure_scatter(config: Experiment, *, one_shift: bool = False, bars: bool = True) -> pd.DataFrame:
    """`scatter_points` from cached logits.

    With `one_shift`, of the first shift in place of the mean of all, as in Figure G.2; without `bars`, no intervals.
    """
    need_shifts(config)
    evaluator = Evaluator(config)
    pool, methods = measure(evaluator)
    scores = tidy(methods, evaluator) if bars else None
    return scatter_points(_with(config, shifts=config.task.shifts[:1]) if one_shift else config, pool, methods, scores)


def draw_scatter(
    config: Experiment, numbers: pd.DataFrame, *, one_shift: bool = False, every_method: bool = False
) -> Figure:
    """Figure 1's scatter of an experiment; tables that have no intervals are drawn without bars."""
    labels = axis_labels(_with(config, shifts=config.task.shifts[:1]) if one_shift else config)
    return scatter_figure(numbers, list(labels.values()), every_method=every_method)


def subgroups(evaluator: Evaluator, split: str) -> Tensor:
    """(N,) which group each image of a split is in: the data's own, or of the embedded benchmark Unicode's."""
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

    Of a task that is scored by groups or classes itself (FMoW, iWildCam), those of Figure 1; of others `scatter_points`
    by the accuracy of the worst group and by macro F1, with `metric` as a column.
    """
    task = config.task
    if any(metric != "top1" for metric in task.metrics.values()):
        return measure_scatter(config)
    need_shifts(config)
    evaluator = Evaluator(config)
    pool, methods = measure(evaluator)
    groups = {split: subgroups(evaluator, split) for split in task.reported}

    def scored(method: Method, metric: Metric) -> Method:
        scores = {}
        for split in task.reported:
            labels, answers = evaluator.split(split).labels, method.of(split).predicted[split]
            scores[split] = sum(score(metric, each, labels, groups[split]) for each in answers) / len(answers)
        return replace(method, scores=scores, best_in={})

    frames = []
    for metric in SUBGROUP_METRICS:
        drawn = [[scored(each, metric) for each in some] for some in (pool, methods)]
        frames.append(scatter_points(config, *drawn).assign(metric=metric))
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


# ---- decisions of greedy recipes, coefficients of learned ones, and held-out accuracy against test


def decisions(record: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model that was tried, in order, from the soup.json of a greedy recipe.

    Columns: model (row of the sweep), held_out (score with it), before (of the soup without it, which it must not
    lower), change, accepted; fractions.
    """
    trials = [(f"row {trial['row']}", trial["score"], trial["accepted"]) for trial in record["trials"]]
    return against_before(pd.DataFrame(trials, columns=["model", "held_out", "accepted"]))


def against_before(tried: pd.DataFrame) -> pd.DataFrame:
    """Trials in order, model, held_out and accepted, with what each was compared with: before, and the change to it."""
    before = tried["held_out"].where(tried["accepted"]).ffill().shift()
    columns = {"before": before, "change": tried["held_out"] - before}
    return tried.assign(**columns)[["model", "held_out", "before", "change", "accepted"]]


@styled
def draw_decisions(tried: pd.DataFrame) -> Figure:
    """Held-out score with each model that was tried, and of the soup so far, from `decisions`."""
    figure, ((axes,),) = panels(1, 1, 2.6, width=COLUMN)
    step, score, is_in = tried.index + 1, 100 * tried["held_out"], tried["accepted"]
    _, colour, marker, size = STYLE["greedy"]
    axes.step(step, score.where(is_in).ffill(), where="post", color=colour, lw=1.2, label="Soup so far")
    axes.scatter(step[is_in], score[is_in], s=0.4 * size, c=colour, marker=marker, label="kept", zorder=3)
    axes.scatter(step[~is_in], score[~is_in], s=18, c="#777777", marker="x", lw=1, label="left out", zorder=3)
    axes.set(xlabel="Model tried", ylabel="Held-out with it (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, axes, 3)
    return figure


def measure_coefficients(config: Experiment, *, recipe: Recipe) -> pd.DataFrame:
    """Column `group`, then one column for each model; rows sum to 1."""
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
