"""Figure D.1: accuracy on the way from the initialisation to every fine-tuned model and to two soups (WiSE-FT)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.style import COLUMN, STYLE, legend, panels, styled
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


def ends_of(config: Experiment) -> list[End]:
    """Every fine-tuned model that did not diverge, then the uniform and the greedy soup where the experiment has them.

    Raises:
        UserError: the sweep is not finished, or a soup is missing.
    """
    kinds = {row: row_config(config, row).augment.kind for row in range(1, config.sweep.size + 1)}
    found = []
    for each in usable_pool(config):
        if each.row:
            group = kinds[each.row] if len(set(kinds.values())) > 1 else INDIVIDUAL
            found.append(End(f"row {each.row}", INDIVIDUAL, group, each.digest, each.load))
    for recipe in [each for each in SOUPS if each in config.recipes]:
        digest = soup_record(config, recipe)["digest"]
        load = partial(load_weights, RunFolder.of(config).soup(recipe) / "weights.safetensors", digest)
        found.append(End(recipe, recipe, recipe, digest, load))
    return found


def mixture_at(start: Ingredient, end: End, alpha: float) -> Mixture:
    """(1 - alpha) start + alpha end."""
    key = digest_of({"wise_ft": [start.digest, end.digest], "alpha": alpha})
    return Mixture(key, partial(wise_ft, start.load, end.load, alpha))


def point(evaluator: Evaluator, start: Ingredient, end: End, alpha: float) -> Method:
    """What (1 - alpha) start + alpha end answers; the two ends are from cached logits."""
    if 0 < alpha < 1:
        return method_of_mixture(end.name, mixture_at(start, end, alpha), evaluator)
    model = end if alpha else start
    return method_of(end.name, 1, partial(evaluator.logits, model.digest, model.load), evaluator)


def measure_wise(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure D.1: one row per end, alpha and column (test, mean of shifts).

    It costs 9 evaluations for each fine-tuned model and soup.

    Columns: end, kind, group, alpha, column, n, accuracy, and the difference to the end itself (alpha = 1) with its
    interval low and high; fractions.

    Raises:
        UserError: the sweep is not finished, a soup is missing, or the task has no shifts.
    """
    need_shifts(config)
    start, ends = usable_pool(config)[0], ends_of(config)
    mixtures = [mixture_at(start, end, alpha) for end in ends for alpha in ALPHAS[1:-1]]
    evaluator = measure_mixtures(config, "points of WiSE-FT curves", mixtures)
    rows: list[dict[str, Any]] = []
    for end in ends:
        at_end = point(evaluator, start, end, 1.0)
        for alpha in ALPHAS:
            head = {"end": end.name, "kind": end.kind, "group": end.group, "alpha": alpha}
            found = point(evaluator, start, end, alpha)
            rows += [head | row for row in numbers_of(evaluator, found, at_end, drawn_columns(config))]
    return pd.DataFrame(rows)


@styled
def draw_wise(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure D.1: mean of shifts against test along each curve; the marker of Figure 1 stands at alpha = 1."""
    labels = axis_labels(config)
    figure, ((axes,),) = panels(1, 1, 3.6, width=COLUMN)
    groups = list(dict.fromkeys(numbers.loc[numbers["kind"] == INDIVIDUAL, "group"]))
    colours = dict(zip(groups, AUGMENTATIONS, strict=False))
    named: set[str] = set()
    for (_, kind), curve in numbers.groupby(["end", "kind"], sort=False):
        wide = 100 * curve.pivot(index="alpha", columns="column", values="accuracy").sort_index()
        x, y = (wide[column] for column in labels)
        title, colour, marker, size = STYLE[str(kind)]
        look: dict[str, Any] = {"lw": 1.8, "ms": 2.4, "zorder": 4}
        if kind == INDIVIDUAL:
            look, group = {"lw": 0.8, "ms": 1.4, "alpha": 0.7, "zorder": 3}, curve["group"].iloc[0]
            colour, title = colours.get(group, AUGMENTATIONS[-1]), f"Individual, {group}" if len(groups) > 1 else title
        axes.plot(x, y, color=colour, marker="o", label=None if title in named else title, **look)
        axes.scatter(x.iloc[-1:], y.iloc[-1:], color=colour, marker=marker, s=0.5 * size, lw=0, zorder=5)
        named.add(title)
    start = 100 * numbers[numbers["alpha"] == 0].groupby("column")["accuracy"].first()
    label, colour, marker, size = STYLE["initialisation"]
    axes.scatter(*start[list(labels)], c=colour, marker=marker, s=0.7 * size, lw=0, label=label, zorder=6)
    axes.set(xlabel=labels[config.task.test], ylabel=labels[SHIFT_MEAN])
    legend(figure, axes, 2)
    return figure
