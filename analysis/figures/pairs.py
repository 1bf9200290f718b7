"""Figure 4: soups of two models against ensembles of the same two, by the larger of their learning rates."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from analysis.figures.style import panels, styled
from analysis.measure.methods import columns_of, method_of, numbers_of
from analysis.measure.mixtures import Pair, axis_labels, mean_logits, measure_midpoints, method_of_mixture
from configs.errors import UserError
from configs.schema import Experiment
from soups.chance import uniform
from soups.experiment.pool import usable_pool
from store.runs import Ingredient


def random_pairs(config: Experiment, pool: Sequence[Ingredient]) -> list[Pair]:
    """`analysis.pairs.count` pairs of fine-tuned models, or all where there are no more, in the order of their rows.

    A pair's chance depends on the seed and its rows alone: more pairs keep those that there were.

    Raises:
        UserError: fewer than two fine-tuned models.
    """
    tuned = [each for each in pool if each.row]
    if len(tuned) < 2:
        raise UserError(f"{config.name}: pairs need two fine-tuned models, and {len(tuned)} did not diverge")
    pairs = [Pair(one, two) for one, two in combinations(tuned, 2)]

    def chance(pair: Pair) -> float:
        return uniform("pairs", config.analysis.seed, pair.first.row, pair.second.row)

    chosen = sorted(pairs, key=chance)[: config.analysis.pairs.count]
    return sorted(chosen, key=lambda pair: (pair.first.row, pair.second.row))


def measure_pairs(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure 4: one row per pair and column (each test and shift split, and the mean of the shifts).

    Evaluates the means of two models that are not on disk.

    Columns: first, second (rows of the sweep), larger_lr, column, n, soup and ensemble (accuracies in [0, 1]),
    difference (soup minus ensemble) with its interval low and high.

    Raises:
        UserError: the sweep is not finished, or has fewer than two fine-tuned models.
    """
    pairs, columns = random_pairs(config, usable_pool(config)), columns_of(config)
    evaluator = measure_midpoints(config, pairs)
    table = []
    for pair in pairs:
        soup = method_of_mixture("soup", pair.mean, evaluator)
        ensemble = method_of("ensemble", 2, mean_logits(evaluator, (pair.first, pair.second)), evaluator)
        head = {"first": pair.first.row, "second": pair.second.row, "larger_lr": pair.larger_lr(config)}
        for row in numbers_of(evaluator, soup, ensemble, columns, redraw=True):
            table.append(head | row | {"ensemble": ensemble.accuracy(*columns[row["column"]])})
    numbers = ["column", "n", "soup", "ensemble", "difference", "low", "high"]
    return pd.DataFrame(table).rename(columns={"accuracy": "soup"})[["first", "second", "larger_lr", *numbers]]


def _panel(axes: Axes, drawn: pd.DataFrame, norm: LogNorm) -> None:
    soup, ensemble = 100 * drawn["soup"], 100 * drawn["ensemble"]
    low, high = min(soup.min(), ensemble.min()), max(soup.max(), ensemble.max())
    pad = 0.05 * max(high - low, 1)
    ends = (low - pad, high + pad)
    axes.plot(ends, ends, color="black", lw=0.7, ls="--", zorder=1)
    look: dict[str, Any] = {"cmap": "viridis", "s": 16, "edgecolors": "black", "linewidths": 0.2, "zorder": 3}
    axes.scatter(soup, ensemble, c=drawn["larger_lr"], norm=norm, **look)
    axes.set(xlim=ends, ylim=ends, aspect="equal")


@styled
def draw_pairs(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure 4: ensemble against soup, a panel for each column; above the diagonal the ensemble is better."""
    labels, rates = axis_labels(config), numbers["larger_lr"]
    figure, (line,) = panels(1, len(labels), 3.2)
    # Of a single rate a colour bar needs ends that differ.
    norm = LogNorm(rates.min(), rates.max()) if rates.nunique() > 1 else LogNorm(rates.min() / 2, rates.max() * 2)
    for axes, (column, label) in zip(line, labels.items(), strict=True):
        drawn, (title, _, metric) = numbers[numbers["column"] == column], label.partition(", ")
        _panel(axes, drawn, norm)
        better = int((drawn["difference"] > 0).sum())
        axes.set_title(f"{title}\nsoup better in {better} of {len(drawn)} pairs")
        axes.set(xlabel=f"Soup, {metric}", ylabel=f"Ensemble, {metric}")
    ticks = FixedLocator([rates.min(), rates.median(), rates.max()])
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=list(line), shrink=0.9, ticks=ticks, format="%.0e")
    bar.minorticks_off()
    bar.set_label("Larger learning rate of the pair")
    return figure
