"""Figures B.1 and H.1 to H.4: soups and ensembles of the first k models of random orders.

Orders are those of Table 3's greedy soups in random order. In an order the uniform soups cost one evaluation for each
k. The greedy soup of the first k models is Recipe 1 over these; decisions of smaller k are used again where soup and
candidate are the same, so a new model that is rejected costs one evaluation on the held-out split. Only distinct greedy
soups are evaluated on test and shifts. Ensembles and single models come from cached logits.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.figures.style import STYLE, legend, panels, styled, two_lines
from analysis.measure.methods import Method, method_of_answers, method_of_model, numbers_of, over_orders
from analysis.measure.mixtures import (
    answers,
    axis_labels,
    drawn_columns,
    mean_logits,
    mean_mixture,
    measure_mixtures,
    method_of_mixture,
)
from configs.schema import Experiment
from eval.forward import Evaluator
from soups.experiment.pool import ingredients_of
from soups.recipes import Growing
from soups.scorers.metrics import score
from soups.selection import Result, Ties, add_in_order, best_first, random_order
from store.runs import Ingredient

BEST = "best"
LABELS = {kind: STYLE[kind][0] for kind in ("uniform", "greedy", "ensemble", "greedy_ensemble")} | {
    BEST: "Best individual so far (held-out)"
}
WIDTHS = {"greedy": 3.0, BEST: 1.2}  # where curves are one, all of them are seen
PointOfCurve = tuple[str, int, Method]  # method, how many models were considered, what it answers


def orders_of(config: Experiment, number: int) -> list[list[int]]:
    """`cooking.orders` random orders of so many models, those of `recipe=greedy_random_order`."""
    return [random_order(number, config.sweep.seed + order, 0) for order in range(config.cooking.orders)]


def greedy_of_first(
    order: Sequence[int], held_out: Sequence[float], accuracy: Callable[[tuple[int, ...]], float], ties: Ties = "keep"
) -> list[tuple[int, ...]]:
    """What Recipe 1 keeps of the first 1, 2, ..., K models of an order, each time sorted by held-out accuracy.

    `accuracy` is that of the equal-weight mean of some models, named best first; it is called once for each set that is
    tried, which is K - 1 to K (K - 1) / 2 times.
    """
    known = cache(accuracy)  # of a set that several k try

    def scored(sets: Sequence[tuple[int, ...]], _: float) -> list[Result]:
        return [Result(known(chosen)) for chosen in sets]

    found: list[tuple[int, ...]] = []
    for k in range(1, len(order) + 1):
        considered = sorted(order[:k])
        ranked = [considered[place] for place in best_first([held_out[i] for i in considered])]
        found.append(add_in_order(ranked, held_out[ranked[0]], scored, ties=ties).mixture)
    return found


def best_of_first(order: Sequence[int], held_out: Sequence[float]) -> list[int]:
    """The index with the highest held-out accuracy among the first 1, 2, ..., K of an order, of equals the smallest."""
    return [min(order[:k], key=lambda i: (-held_out[i], i)) for k in range(1, len(order) + 1)]


def _greedy_along(
    name: str, evaluator: Evaluator, pool: Sequence[Ingredient], order: Sequence[int]
) -> Iterator[PointOfCurve]:
    """Greedy soups (`greedy`) or ensembles (`greedy_ensemble`) of the first 1, 2, ..., K models of an order."""
    task, is_soup = evaluator.config.task, name == "greedy"
    held_out = evaluator.split(task.held_out)
    metric = task.metrics.get(task.held_out, "top1")

    def predicted(chosen: tuple[int, ...], split: str) -> Tensor:
        members = [pool[i] for i in chosen]
        if is_soup and len(members) > 1:
            return answers(evaluator, mean_mixture(members), split)
        return evaluator.predicted(mean_logits(evaluator, members)(split), split)

    def accuracy(chosen: tuple[int, ...]) -> float:
        return score(metric, predicted(chosen, task.held_out), held_out.labels, held_out.groups)

    @cache
    def method(kept: tuple[int, ...]) -> Method:
        if is_soup and len(kept) > 1:
            return method_of_mixture(name, mean_mixture([pool[i] for i in kept]), evaluator)
        return method_of_answers(name, len(kept), partial(predicted, kept), evaluator)

    scores, ties = [each.held_out_score for each in pool], evaluator.config.cooking.ties
    for k, kept in enumerate(greedy_of_first(order, scores, accuracy, ties), 1):
        yield name, k, method(kept)


def _from_logits_along(
    evaluator: Evaluator, pool: Sequence[Ingredient], order: Sequence[int]
) -> Iterator[PointOfCurve]:
    """Best individual, ensemble and greedy ensemble of the first 1, 2, ..., K models of an order."""
    best = cache(lambda i: method_of_model(BEST, pool[i], evaluator))
    for k, i in enumerate(best_of_first(order, [each.held_out_score for each in pool]), 1):
        yield BEST, k, best(i)
    ids: dict[str, list[Tensor]] = {}
    for split in evaluator.config.task.reported:
        # Running sums, which read each model's logits once.
        sums = accumulate(mean_logits(evaluator, [pool[i]])(split) for i in order)
        ids[split] = [evaluator.predicted(total / k, split) for k, total in enumerate(sums, 1)]
    for k in range(1, len(order) + 1):
        of_first = {split: of_split[k - 1] for split, of_split in ids.items()}
        yield "ensemble", k, method_of_answers("ensemble", k, of_first.__getitem__, evaluator)
    yield from _greedy_along("greedy_ensemble", evaluator, pool, order)


def _soups_along(evaluator: Evaluator, pool: Sequence[Ingredient], order: Sequence[int]) -> Iterator[PointOfCurve]:
    """Uniform and greedy soup of the first 1, 2, ..., K models of an order; for the uniform ones each is read once."""
    members = [pool[i] for i in order]
    growing = Growing([each.load for each in members])
    yield "uniform", 1, method_of_model("uniform", members[0], evaluator)
    for k in range(2, len(members) + 1):
        mixture = mean_mixture(members[:k], partial(growing.mean, tuple(range(k))))
        yield "uniform", k, method_of_mixture("uniform", mixture, evaluator)
    yield from _greedy_along("greedy", evaluator, pool, order)


def _measure_order(config: Experiment, order: Sequence[int]) -> str:
    for _ in _soups_along(Evaluator(config), ingredients_of(config), order):
        pass
    return f"soups of the first 1 to {len(order)} models of an order: evaluated"


def measure_pool_size(config: Experiment) -> pd.DataFrame:
    """The numbers of Figures B.1 and H.1 to H.4; evaluates what is not on disk.

    One row per order ("mean" is the mean over all), method, number of models considered, and column (test, mean of
    shifts). Other columns: n, models (at inference), accuracy; and of the mean order difference (to the best individual
    of as many) with its interval low and high; fractions.
    """
    pool = ingredients_of(config)
    orders = orders_of(config, len(pool))
    soups = [mean_mixture([pool[i] for i in order[:k]]) for order in orders for k in range(2, len(pool) + 1)]
    calls = [partial(_measure_order, config, order) for order in orders]
    evaluator = measure_mixtures(config, "uniform soups, and greedy ones", soups, calls)
    found: dict[tuple[str, int], list[Method]] = {}
    for order in orders:
        for along in (_from_logits_along, _soups_along):
            for name, k, method in along(evaluator, pool, order):
                found.setdefault((name, k), []).append(method)
    rows: list[dict[str, Any]] = []
    for (name, k), methods in found.items():
        mean, best = over_orders(name, methods), over_orders(BEST, found[BEST, k])
        models = sum(method.models for method in methods) / len(methods)
        for column, splits in drawn_columns(config).items():
            of_orders = [(str(j), each.models, each, None) for j, each in enumerate(methods)]
            for label, number, method, baseline in (*of_orders, ("mean", models, mean, best)):
                head = {"order": label, "method": name, "considered": k, "models": number}
                rows += [head | row for row in numbers_of(evaluator, method, baseline, {column: splits})]
    numbers = ["column", "n", "models", "accuracy", "difference", "low", "high"]
    return pd.DataFrame(rows)[["order", "method", "considered", *numbers]]


def _accuracies(axes: Axes, drawn: pd.DataFrame) -> None:
    for method, label in LABELS.items():
        line = {"color": STYLE[method][1], "ls": "--" if method == BEST else "-"}
        mean = {"lw": WIDTHS.get(method, 1.5), "alpha": 1.0, "label": label, "zorder": 3}
        for order, curve in drawn[drawn["method"] == method].groupby("order", sort=False):
            look: dict[str, Any] = line | (mean if order == "mean" else {"lw": 0.6, "alpha": 0.3, "zorder": 2})
            axes.plot(curve["considered"], 100 * curve["accuracy"], **look)


def _differences(axes: Axes, drawn: pd.DataFrame) -> None:
    """Mean curves less that of the best individual; a uniform soup far below leaves the panel."""
    wide = 100 * drawn[drawn["order"] == "mean"].pivot(index="considered", columns="method").drop(columns="n")
    for method in (each for each in LABELS if each != BEST):
        y, colour = wide["difference", method], STYLE[method][1]
        axes.plot(y.index, y, color=colour, lw=WIDTHS.get(method, 1.5), zorder=3)
    low, high = (wide[end, "greedy"] for end in ("low", "high"))
    axes.fill_between(wide.index, low, high, color=STYLE["greedy"][1], alpha=0.15, lw=0, zorder=1)
    axes.axhline(0, color=STYLE[BEST][1], ls="--", lw=WIDTHS[BEST], zorder=2)
    kept = pd.concat([low, high, wide["difference"].drop(columns="uniform")], axis=1)  # of some metrics no low, high
    ends = kept.min(axis=None), kept.max(axis=None)
    room = 0.06 * max(ends[1] - ends[0], 1.0)
    axes.set_ylim(ends[0] - room, ends[1] + room)
    if wide["difference", "uniform"].min() < ends[0] - room:
        axes.text(0.1, 0.03, "uniform soup: further below", transform=axes.transAxes, fontsize=6.5)


@styled
def draw_pool_size(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Against the number of models, accuracy and the difference to the best individual: mean of orders, and each."""
    labels = axis_labels(config)
    figure, grid = panels(2, len(labels), 4.4, sharex=True, height_ratios=[1.3, 1])
    for (above, below), (column, label) in zip(grid.T, labels.items(), strict=True):
        drawn = numbers[numbers["column"] == column]
        _accuracies(above, drawn)
        _differences(below, drawn)
        above.set_ylabel(two_lines(label))
        below.set(xlabel="Number of models considered", ylabel="Difference to the\nbest individual so far (points)")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    orders = numbers["order"].nunique() - 1
    note = f"Thick: mean of {orders} random orders; thin: each. Shaded: 95 % interval of greedy soup − best individual"
    legend(figure, grid[0, 0], 3, note)
    return figure
