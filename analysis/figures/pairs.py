"""Figures 3, 4 and F.1: means of two models, by the angle between the two, their ensemble, and models in between."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator
from scipy.stats import spearmanr

from analysis.figures.style import COLUMN, legend, panels, styled
from analysis.measure.methods import columns_of, method_of, method_of_model, numbers_of, over_orders, titled
from analysis.measure.mixtures import (
    Pair,
    axis_labels,
    drawn_columns,
    mean_logits,
    measure_midpoints,
    measure_mixtures,
    method_of_mixture,
)
from configs.errors import UserError
from configs.schema import Experiment, dump
from soups.chance import uniform
from soups.conformance import Layout, common_layout
from soups.descent import layer_of
from soups.experiment.pool import usable_pool
from soups.files.opening import opened
from soups.geometry import Geometry, geometry
from store.rows import draw, row_config
from store.runs import Ingredient, RunFolder

SEED, LEARNING_RATE, AUGMENTATION, SEVERAL = "seed", "learning rate", "augmentation", "several settings"
SERIES = {  # Okabe and Ito's colours
    SEED: ("#0072B2", "o"),
    LEARNING_RATE: ("#D55E00", "^"),
    AUGMENTATION: ("#009E73", "s"),
    SEVERAL: ("#999999", "x"),
}
OTHER = ("#CC79A7", "D")
CLIP = 5.0  # points at which colours of Figure F.1 end, so that one bad end leaves the others theirs
NOT_REPEATED = ("embed", "relative_attention_bias")  # tables that T5's blocks look values up in


# ---- Figure 3: the further from parallel two fine-tuned models are, the more their mean gains


def measured_part(layout: Layout, weights: Literal["repeated", "blocks", "all"]) -> Layout:
    """The tensors that angles and distances are over.

    `repeated` are matrices and convolutions of blocks, without gains, biases, embeddings and head (Appendix J.1: "we
    use the repeated weights which constitute the majority of the network parameters. We ignore gain terms"); `blocks`
    are these with gains and biases.
    """

    def is_measured(name: str) -> bool:
        is_in_block = layer_of(name).rpartition(".")[2] not in ("embedding", "head")
        is_matrix = len(layout.entries[name].shape) > 1 and not any(part in name for part in NOT_REPEATED)
        return weights == "all" or (is_in_block and (weights == "blocks" or is_matrix))

    kept = {name: entry for name, entry in layout.entries.items() if is_measured(name)}
    if not kept:
        raise UserError(f"analysis.angles.weights={weights}: the network has no such tensors; take all")
    return replace(layout, entries=kept)


def series_of(config: Experiment, first: int, second: int) -> str:
    """What two rows differ in: seed, learning rate, augmentation, another setting by its name, or several."""
    ours, theirs = (dump(row_config(config, row)) for row in (first, second))
    names = {"augment": AUGMENTATION, "lr": LEARNING_RATE, "seed": SEED}
    groups = [name for name in ("task", "model", "augment", "regularizer") if ours[name] != theirs[name]]
    optim = [name for name, value in ours["optim"].items() if value != theirs["optim"][name]]
    differ = [names.get(name, name.replace("_", " ")) for name in (*groups, *optim)]
    differ = differ or [SEED]  # rows for which nothing is set have random streams of their own
    return differ[0] if len(differ) == 1 else SEVERAL


def chosen_pairs(config: Experiment) -> list[tuple[Pair, str]]:
    """Pairs of fine-tuned models with their series, in the order of their rows."""
    settings = config.analysis.angles
    pool, below = [each for each in usable_pool(config) if each.row], settings.below_lr
    if below is not None:
        pool = [each for each in pool if row_config(config, each.row).optim.lr < below]
    found = [(Pair(one, two), series_of(config, one.row, two.row)) for one, two in combinations(pool, 2)]
    chosen = [(pair, series) for pair, series in found if settings.several or series != SEVERAL]
    if not chosen:
        raise UserError(
            f"{config.name}: of {len(pool)} fine-tuned models no two differ in one thing; "
            "analysis.angles.several=true takes pairs that differ in more"
        )
    return chosen


def pool_geometry(config: Experiment, rows: Sequence[int]) -> Geometry:
    """Angles and distances at the initialisation of some rows, over `analysis.angles.weights`."""
    run = RunFolder.of(config)
    with opened([run.ingredient(row) / "weights.safetensors" for row in (0, *rows)]) as checkpoints:
        start, *tuned = checkpoints
        layout = measured_part(common_layout(checkpoints), config.analysis.angles.weights)
        return geometry(tuned, layout, start)


def measure_angles(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure 3, one row per pair; evaluates the means of two models that are not on disk.

    Columns: first, second (rows of the sweep), series, larger_lr; angle (degrees, at the initialisation), distance
    (between the two), distance_first, distance_second (to the initialisation), weights (what these are over);
    accuracy_first, accuracy_second, accuracy_mean (of the model half way), advantage with its interval low and high
    (fractions, averaged over test and shifts), and n (examples over all splits).
    """
    pairs, splits = chosen_pairs(config), config.task.reported
    evaluator = measure_midpoints(config, [pair for pair, _ in pairs])
    members = {each.row: each for pair, _ in pairs for each in (pair.first, pair.second)}
    rows = sorted(members)
    found = pool_geometry(config, rows)
    angles = np.degrees(np.arccos(np.clip(found.task_cosines, -1, 1)))
    singles = [method_of_model(f"row {row}", members[row], evaluator) for row in rows]
    table: list[dict[str, Any]] = []
    for pair, series in pairs:
        i, j = rows.index(pair.first.row), rows.index(pair.second.row)
        middle = method_of_mixture("mean", pair.mean, evaluator)
        both = over_orders("both", [singles[i], singles[j]])
        apart = found.products[i, i] + found.products[j, j] - 2 * found.products[i, j]
        head: dict[str, Any] = {"first": pair.first.row, "second": pair.second.row, "series": series}
        head |= {"larger_lr": pair.larger_lr(config), "angle": angles[i, j], "distance": max(apart, 0.0) ** 0.5}
        head |= {"distance_first": found.distances[i], "distance_second": found.distances[j]}
        head |= {"weights": config.analysis.angles.weights}
        head |= {"accuracy_first": singles[i].accuracy(*splits), "accuracy_second": singles[j].accuracy(*splits)}
        for row in numbers_of(evaluator, middle, both, {"all": splits}, redraw=True):
            table.append(head | {"accuracy_mean": row["accuracy"], "advantage": row["difference"]} | row)
    numbers = ["accuracy_mean", "advantage", "low", "high", "n"]
    return pd.DataFrame(table)[[*head, *numbers]]


@styled
def draw_angles(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure 3: interpolation advantage against angle, a marker a series, with the rank correlation of all pairs."""
    figure, ((axes,),) = panels(1, 1, 3.5, width=COLUMN)
    axes.axhline(0, color="black", lw=0.6)
    for series, group in numbers.groupby("series", sort=False):
        colour, marker = SERIES.get(str(series), OTHER)
        y, low, high = (100 * group[name] for name in ("advantage", "low", "high"))
        look = {"color": colour, "fmt": marker, "ecolor": (*mpl.colors.to_rgb(colour), 0.35), "ms": 4, "lw": 0.6}
        label, ends = f"differ in {series} ({len(group)})", np.clip([y - low, high - y], 0, None)
        axes.errorbar(group["angle"], y, yerr=ends, label=label, zorder=3, **look)
    if len(numbers) > 2:
        rank = spearmanr(numbers["angle"], numbers["advantage"]).statistic
        axes.set_title(f"rank correlation {rank:.2f}, {len(numbers)} pairs")
    shifts = len(config.task.shifts)
    over = {0: "test", 1: "test and shift"}.get(shifts, f"test and {shifts} shifts")
    axes.set_xlabel(r"Angle $\phi$ at the initialisation (degrees)")
    axes.set_ylabel(f"Interpolation advantage,\naccuracy over {over} (points)")
    legend(figure, axes, 2, "Bars: 95 % intervals of the advantage")
    return figure


# ---- Figure 4: soups of two models against ensembles of the same two, by the larger of their learning rates


def random_pairs(config: Experiment, pool: Sequence[Ingredient]) -> list[Pair]:
    """`analysis.pairs.count` pairs of fine-tuned models, or all where there are no more, in the order of their rows.

    A pair's chance depends on the seed and its rows alone: more pairs keep those that there were.
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


def _scatter(axes: Axes, drawn: pd.DataFrame, norm: LogNorm) -> None:
    accuracies = 100 * drawn[["soup", "ensemble"]]
    low, high = accuracies.min(axis=None), accuracies.max(axis=None)
    pad = 0.05 * max(high - low, 1)
    ends = (low - pad, high + pad)
    axes.plot(ends, ends, color="black", lw=0.7, ls="--", zorder=1)
    look: dict[str, Any] = {"cmap": "viridis", "s": 16, "edgecolors": "black", "linewidths": 0.2, "zorder": 3}
    axes.scatter(accuracies["soup"], accuracies["ensemble"], c=drawn["larger_lr"], norm=norm, **look)
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
        _scatter(axes, drawn, norm)
        better = int((drawn["difference"] > 0).sum())
        axes.set_title(f"{title}\nsoup better in {better} of {len(drawn)} pairs")
        axes.set(xlabel=f"Soup, {metric}", ylabel=f"Ensemble, {metric}")
    ticks = FixedLocator([rates.min(), rates.median(), rates.max()])
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=list(line), shrink=0.9, ticks=ticks, format="%.0e")
    bar.minorticks_off()
    bar.set_label("Larger learning rate of the pair")
    return figure


# ---- Figure F.1: is the average of a one-dimensional grid's ends above the best model of the grid?


@dataclass(frozen=True)
class Grid:
    """Rows of a sweep along one axis, in its order."""

    name: str
    members: tuple[Ingredient, ...]
    labels: tuple[str, ...]


def _written(value: Any) -> str:
    """A setting's value; small numbers are written as in 3e-4."""
    if not isinstance(value, float):
        return str(value)
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if 0 < abs(value) < 0.1 else f"{value:g}"


def _labels(config: Experiment, rows: Sequence[int], elsewhere: Collection[int]) -> tuple[str, ...]:
    """Names of a grid's rows: those of `analysis.labels`, or else the first setting that the sweep gives each.

    A row that also stands in a grid before it is named by the one field in which the rows here differ, or the `kind` of
    the one group.
    """
    named, settings = config.analysis.labels, [dump(row_config(config, row)) for row in rows]
    fields = [(group, field) for group in ("optim", "augment", "regularizer") for field in settings[0][group]]
    differ = [(g, f) for g, f in fields if len({str(values[g][f]) for values in settings}) > 1]
    groups = {group for group, _ in differ}
    differing = differ[0] if len(differ) == 1 else (groups.pop(), "kind") if len(groups) == 1 else None
    labels = []
    for row, values in zip(rows, settings, strict=True):
        if row in elsewhere and differing:
            labels.append(_written(values[differing[0]][differing[1]]))
        else:
            labels.append(named[row - 1] if named else _written(next(iter(draw(config, row).values()), row)))
    return tuple(labels)


def grids_of(config: Experiment) -> list[Grid]:
    """Each of `analysis.sets`, or else all rows in their order, without rows that diverged."""
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
    """The place from i to j, both included, with the highest accuracy; of equals the first."""
    return max(range(i, j + 1), key=lambda place: (accuracies[place], -place))


def measure_grids(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure F.1: one row per grid, pair of ends and column (test, mean of shifts).

    It costs n (n - 1) / 2 evaluations of a grid of n models. The best is chosen on the test and shift splits, as in the
    paper, which puts the average at a disadvantage.

    Columns: grid, size, i, j (places in the grid), first, last (their names), best (name of the best in the range, as
    it is on this column), column, n, average (accuracy of the average of the ends), best_accuracy, and difference
    (average minus best) with its interval low and high; fractions.
    """
    grids = grids_of(config)
    cells = [(grid, i, j) for grid in grids for i, j in combinations(range(len(grid.members)), 2)]
    means = [Pair(grid.members[i], grid.members[j]).mean for grid, i, j in cells]
    evaluator = measure_mixtures(config, "averages of ends", means)
    singles = {grid.name: [method_of_model("", each, evaluator) for each in grid.members] for grid in grids}
    rows: list[dict[str, Any]] = []
    for (grid, i, j), mean in zip(cells, means, strict=True):
        average, models = method_of_mixture("ends", mean, evaluator), singles[grid.name]
        for column, splits in drawn_columns(config).items():
            accuracies = [model.accuracy(*splits) for model in models]
            best = best_in_range(accuracies, i, j)
            head = {"grid": grid.name, "size": len(models), "i": i, "j": j}
            head |= {"first": grid.labels[i], "last": grid.labels[j], "best": grid.labels[best]}
            for row in numbers_of(evaluator, average, models[best], {column: splits}):
                rows.append(head | row | {"best_accuracy": accuracies[best]})
    columns = ["grid", "size", "i", "j", "first", "last", "best", "column", "n", "average", "best_accuracy"]
    return pd.DataFrame(rows).rename(columns={"accuracy": "average"})[[*columns, "difference", "low", "high"]]


def _triangle(axes: Axes, drawn: pd.DataFrame, norm: TwoSlopeNorm) -> AxesImage:
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
            image = _triangle(axes, numbers[(numbers["grid"] == name) & (numbers["column"] == column)], norm)
            axes.set(title=titled(name), xlabel="Right end")
        line[0].set_ylabel(f"{label.partition(',')[0]}\n\nLeft end")
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.8)
    bar.set_label("Average of both ends minus best in the range (points);\nbold: the 95 % interval leaves out 0")
    return figure
