"""Figure D.1: accuracy on the way from the initialisation to every fine-tuned model and to two soups (WiSE-FT)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from analysis.figures.style import SETTINGS, STYLE
from analysis.measure.methods import SHIFT_MEAN, Method, method_of, need_shifts, numbers_of, soup_record
from analysis.measure.mixtures import Mixture, axis_labels, drawn_columns, measure_mixtures, method_of_mixture
from configs.schema import Experiment
from eval.forward import Evaluator
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of
from soups.files.weights import Weights, load_weights
from soups.recipes import wise_ft
from store.rows import row_config
from store.runs import Ingredient, RunFolder

ALPHAS = tuple(i / 10 for i in range(11))
SOUPS = ("uniform", "greedy")
INDIVIDUAL = "individual"
AUGMENTATIONS = ("#009E73", "#D55E00", "#56B4E9", "#E69F00", "#999999", "#F0E442")  # Okabe and Ito's; not the soups'


@dataclass(frozen=True)
class End:
    """A fine-tuned model or soup that the initialisation is interpolated with."""

    name: str
    kind: str  # individual, or the soup's recipe
    group: str  # its colour says this: the augmentation, where the sweep varies it
    digest: str
    load: Callable[[], Weights]


def is_augmentation_varied(config: Experiment) -> bool:
    """Whether rows of the sweep differ in the kind of their augmentation."""
    return len({row_config(config, row).augment.kind for row in range(1, config.sweep.size + 1)}) > 1


def _soup_end(config: Experiment, recipe: str) -> End:
    name = soup_record(config, recipe)["digest"]
    load = partial(load_weights, RunFolder.of(config).soup(recipe) / "weights.safetensors", name)
    return End(recipe, recipe, recipe, name, load)


def ends_of(config: Experiment) -> list[End]:
    """Every fine-tuned model that did not diverge, then the uniform and the greedy soup where the experiment has them.

    Raises:
        UserError: the sweep is not finished, or a soup is missing.
    """
    varied = is_augmentation_varied(config)
    found = []
    for each in usable_pool(config):
        if each.row:
            group = row_config(config, each.row).augment.kind if varied else INDIVIDUAL
            found.append(End(f"row {each.row}", INDIVIDUAL, group, each.digest, each.load))
    return found + [_soup_end(config, recipe) for recipe in SOUPS if recipe in config.recipes]


def mixture_at(start: Ingredient, end: End, alpha: float) -> Mixture:
    """(1 - alpha) start + alpha end."""
    key = digest_of({"wise_ft": [start.digest, end.digest], "alpha": alpha})
    return Mixture(key, partial(wise_ft, start.load, end.load, alpha))


def point(evaluator: Evaluator, start: Ingredient, end: End, alpha: float) -> Method:
    """What (1 - alpha) start + alpha end answers; the two ends are from cached logits."""
    if 0 < alpha < 1:
        return method_of_mixture(end.name, mixture_at(start, end, alpha), evaluator)
    digest, load = (end.digest, end.load) if alpha else (start.digest, start.load)
    return method_of(end.name, 1, partial(evaluator.logits, digest, load), float("nan"), evaluator)


def wise_table(config: Experiment, evaluator: Evaluator) -> pd.DataFrame:
    """One row per end, alpha and column (test, mean of shifts).

    Columns: end, kind, group, alpha, column, n, accuracy, and the difference to the end itself (alpha = 1) with its
    interval low and high; fractions.
    """
    start = usable_pool(config)[0]
    rows: list[dict[str, Any]] = []
    for end in ends_of(config):
        at_end = point(evaluator, start, end, 1.0)
        for alpha in ALPHAS:
            head = {"end": end.name, "kind": end.kind, "group": end.group, "alpha": alpha}
            found = point(evaluator, start, end, alpha)
            rows += [head | row for row in numbers_of(config, evaluator, found, at_end, drawn_columns(config))]
    return pd.DataFrame(rows)


def _draw(axes: Axes, curve: pd.DataFrame, x: str, colour: str, label: str | None, *, is_soup: bool) -> None:
    wide = 100 * curve.pivot(index="alpha", columns="column", values="accuracy").sort_index()
    y = SHIFT_MEAN
    axes.plot(
        wide[x],
        wide[y],
        color=colour,
        lw=1.8 if is_soup else 0.8,
        alpha=1.0 if is_soup else 0.7,
        marker="o",
        ms=2.4 if is_soup else 1.4,
        label=label,
        zorder=4 if is_soup else 3,
    )
    kind = str(curve["kind"].iloc[0])
    _, _, marker, size = STYLE[kind]
    axes.scatter(wide[x].iloc[-1:], wide[y].iloc[-1:], color=colour, marker=marker, s=0.7 * size, lw=0, zorder=5)


def wise_figure(tidy: pd.DataFrame, test: str, labels: dict[str, str]) -> Figure:
    """Mean of shifts against test along each curve; the marker of Figure 1 stands at alpha = 1.

    Args:
        tidy: from `wise_table`.
        test: name of the test split.
        labels: test and the mean of shifts -> what their axis says.
    """
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(3.6, 3.3))
        axes = figure.subplots()
        individual = tidy[tidy["kind"] == INDIVIDUAL]
        groups = list(dict.fromkeys(individual["group"]))
        colours = dict(zip(groups, AUGMENTATIONS, strict=False))
        named = set()
        for (_, kind), curve in tidy.groupby(["end", "kind"], sort=False):
            group = curve["group"].iloc[0]
            is_soup = kind != INDIVIDUAL
            title = STYLE[str(kind)][0] if is_soup or len(groups) == 1 else f"Individual, {group}"
            colour = STYLE[str(kind)][1] if is_soup else colours.get(group, AUGMENTATIONS[-1])
            _draw(axes, curve, test, colour, None if title in named else title, is_soup=is_soup)
            named.add(title)
        start = 100 * tidy[tidy["alpha"] == 0].groupby("column")["accuracy"].first()
        label, colour, marker, size = STYLE["initialisation"]
        axes.scatter(start[test], start[SHIFT_MEAN], c=colour, marker=marker, s=size, lw=0, label=label, zorder=6)
        axes.set(xlabel=labels[test], ylabel=labels[SHIFT_MEAN])
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncol=3, frameon=False)
        return figure


def measure_wise(config: Experiment, console: Console | None = None) -> pd.DataFrame:
    """The numbers of Figure D.1, from `wise_table`; 9 evaluations for each fine-tuned model and soup.

    Raises:
        UserError: the sweep is not finished, a soup is missing, or the task has no shifts.
    """
    need_shifts(config)
    start, ends = usable_pool(config)[0], ends_of(config)
    mixtures = [mixture_at(start, end, alpha) for end in ends for alpha in ALPHAS[1:-1]]
    measure_mixtures(config, "points of WiSE-FT curves", mixtures, console)
    return wise_table(config, Evaluator(config))


def draw_wise(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure D.1 of an experiment."""
    return wise_figure(numbers, config.task.test, axis_labels(config))
