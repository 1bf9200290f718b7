"""Figure F.1: is the average of a one-dimensional grid's ends above the best model of the grid?"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis.figures.style import panels, styled
from analysis.measure.methods import method_of_model, numbers_of, titled
from analysis.measure.mixtures import (
    Mixture,
    axis_labels,
    drawn_columns,
    mean_mixture,
    measure_mixtures,
    method_of_mixture,
)
from configs.errors import UserError
from configs.schema import Experiment, dump
from soups.experiment.pool import usable_pool
from store.rows import draw, row_config
from store.runs import Ingredient

CLIP = 5.0  # points at which colours end, so that one bad end leaves the others theirs


@dataclass(frozen=True)
class Grid:
    """Rows of a sweep along one axis, in its order."""

    name: str
    members: tuple[Ingredient, ...]
    labels: tuple[str, ...]

    @property
    def ends(self) -> list[tuple[int, int]]:
        """Places i < j of every stretch of the grid."""
        return list(combinations(range(len(self.members)), 2))

    def average(self, i: int, j: int) -> Mixture:
        """The mean of two members."""
        return mean_mixture((self.members[i], self.members[j]))


def _label(config: Experiment, row: int) -> str:
    """The name that `analysis.labels` gives to a row, or else the first setting that the sweep gives it."""
    if config.analysis.labels:
        return config.analysis.labels[row - 1]
    return _written(next(iter(draw(config, row).values()), row))


def _written(value: Any) -> str:
    """A setting's value; small numbers are written as in 3e-4."""
    if not isinstance(value, float):
        return str(value)
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if 0 < abs(value) < 0.1 else f"{value:g}"


def _labels(config: Experiment, rows: Sequence[int], elsewhere: Collection[int]) -> tuple[str, ...]:
    """Names of a grid's rows; one that also stands in a grid before it is named by the setting that varies here.

    That is the one field in which the rows differ, or the `kind` of the one group.
    """
    settings = [dump(row_config(config, row)) for row in rows]
    fields = [(group, field) for group in ("optim", "augment", "regularizer") for field in settings[0][group]]
    differ = [(g, f) for g, f in fields if len({str(values[g][f]) for values in settings}) > 1]
    groups = {group for group, _ in differ}
    differing = differ[0] if len(differ) == 1 else (groups.pop(), "kind") if len(groups) == 1 else None
    return tuple(
        _written(values[differing[0]][differing[1]]) if row in elsewhere and differing else _label(config, row)
        for row, values in zip(rows, settings, strict=True)
    )


def grids_of(config: Experiment) -> list[Grid]:
    """The grids of an experiment: each of `analysis.sets`, or else all rows in their order; without rows that diverged.

    Raises:
        UserError: the sweep is not finished, or no grid has two models; a sweep of draws is no grid.
    """
    pool = {each.row: each for each in usable_pool(config)}
    listed = dict(config.analysis.sets)
    if not listed and not config.sweep.draw:
        listed = {"grid": tuple(range(1, config.sweep.size + 1))}
    grids: list[Grid] = []
    seen: set[int] = set()
    for name, rows in listed.items():
        there = [row for row in rows if row in pool]
        if len(there) > 1:
            grids.append(Grid(name, tuple(pool[row] for row in there), _labels(config, there, seen)))
        seen |= set(rows)
    if not grids:
        raise UserError(
            f"{config.name}: no one-dimensional grid of two models; name the rows of one in analysis.sets, "
            "with analysis.labels, as configs/experiment/demo_grids.yaml does"
        )
    return grids


def best_in_range(accuracies: Sequence[float], i: int, j: int) -> int:
    """The place from i to j, both included, with the highest accuracy; of equals the first.

    >>> best_in_range([0.9, 0.5, 0.7, 0.7], 1, 3)
    2
    """
    return max(range(i, j + 1), key=lambda place: (accuracies[place], -place))


def measure_grids(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure F.1: one row per grid, pair of ends and column (test, mean of shifts).

    It costs n (n - 1) / 2 evaluations of a grid of n models.

    Columns: grid, size, i, j (places in the grid), first, last (their names), best (name of the best in the range, as
    it is on this column), column, n, average (accuracy of the average of the ends), best_accuracy, and difference
    (average minus best) with its interval low and high; fractions.

    The best is chosen on the test and shift splits, as in the paper, which puts the average at a disadvantage.

    Raises:
        UserError: the sweep is not finished, or the experiment has no grid.
    """
    grids = grids_of(config)
    averages = [grid.average(i, j) for grid in grids for i, j in grid.ends]
    evaluator = measure_mixtures(config, "averages of ends", averages)
    rows: list[dict[str, Any]] = []
    for grid in grids:
        singles = [method_of_model(name, e, evaluator) for name, e in zip(grid.labels, grid.members, strict=True)]
        for i, j in grid.ends:
            average = method_of_mixture("ends", grid.average(i, j), evaluator)
            for column, splits in drawn_columns(config).items():
                accuracies = [single.accuracy(*splits) for single in singles]
                best = best_in_range(accuracies, i, j)
                head = {"grid": grid.name, "size": len(singles), "i": i, "j": j}
                head |= {"first": grid.labels[i], "last": grid.labels[j], "best": grid.labels[best]}
                for row in numbers_of(evaluator, average, singles[best], {column: splits}):
                    rows.append(head | row | {"best_accuracy": accuracies[best]})
    columns = ["grid", "size", "i", "j", "first", "last", "best", "column", "n", "average", "best_accuracy"]
    return pd.DataFrame(rows).rename(columns={"accuracy": "average"})[[*columns, "difference", "low", "high"]]


def _panel(axes: Axes, drawn: pd.DataFrame, norm: TwoSlopeNorm) -> AxesImage:
    """Rows are left ends, columns right ends; a number is bold where its interval leaves 0 out."""
    size = int(drawn["size"].iloc[0])
    values = np.full((size - 1, size - 1), np.nan)
    for cell in drawn.to_dict("records"):
        row, column = int(cell["i"]), int(cell["j"]) - 1
        values[row, column] = 100 * cell["difference"]
        weight = "bold" if cell["low"] > 0 or cell["high"] < 0 else "normal"
        colour = "white" if abs(norm(values[row, column]) - 0.5) > 0.32 else "black"
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5, "fontweight": weight, "color": colour}
        axes.text(column, row, f"{values[row, column]:+.1f}", **look)
    firsts = drawn.drop_duplicates("i").sort_values("i")["first"]
    lasts = drawn.drop_duplicates("j").sort_values("j")["last"]
    axes.set_xticks(range(size - 1), lasts.tolist(), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size - 1), firsts.tolist())
    axes.tick_params(length=0, labelsize=7)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")
    return axes.imshow(values, cmap="PuOr_r", norm=norm)


@styled
def draw_grids(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Upper-triangular maps of average of ends minus best in range, in points: grids across, columns down."""
    sizes = numbers.groupby("grid", sort=False)["size"].first()
    widths, labels = [max(size - 1, 2) + 0.9 for size in sizes], axis_labels(config)
    figure, grid = panels(len(labels), len(sizes), 0.7 + 2.0 * len(labels), width_ratios=widths)
    largest = min(CLIP, max(1.0, 100 * numbers["difference"].abs().max()))
    norm = TwoSlopeNorm(0, -largest, largest)
    for line, (column, label) in zip(grid, labels.items(), strict=True):
        for axes, name in zip(line, sizes.index, strict=True):
            image = _panel(axes, numbers[(numbers["grid"] == name) & (numbers["column"] == column)], norm)
            axes.set(title=titled(name), xlabel="Right end")
        line[0].set_ylabel(f"{label.partition(',')[0]}\n\nLeft end")
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.8)
    bar.set_label("Average of both ends minus best in the range (points);\nbold: the 95 % interval leaves out 0")
    return figure
