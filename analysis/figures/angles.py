"""Figure 3: the further from parallel two fine-tuned models are, the more their mean gains."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from analysis.figures.style import COLUMN, legend, panels, styled
from analysis.measure.methods import difference_in, method_of_model, over_orders
from analysis.measure.mixtures import Pair, measure_midpoints, method_of_mixture
from configs.errors import UserError
from configs.schema import Experiment, dump
from soups.conformance import Layout, common_layout
from soups.descent import layer_of
from soups.experiment.pool import usable_pool
from soups.files.opening import opened
from soups.geometry import Geometry, geometry
from store.rows import row_config
from store.runs import RunFolder

SEED, LEARNING_RATE, AUGMENTATION, SEVERAL = "seed", "learning rate", "augmentation", "several settings"
SERIES = {  # Okabe and Ito's colours
    SEED: ("#0072B2", "o"),
    LEARNING_RATE: ("#D55E00", "^"),
    AUGMENTATION: ("#009E73", "s"),
    SEVERAL: ("#999999", "x"),
}
OTHER = ("#CC79A7", "D")
NOT_REPEATED = ("embed", "relative_attention_bias")  # tables that T5's blocks look values up in


def measured_part(layout: Layout, weights: Literal["repeated", "blocks", "all"]) -> Layout:
    """The tensors that angles and distances are over.

    Args:
        layout: of all tensors.
        weights: `repeated`: matrices and convolutions of the blocks, without gains, biases, embeddings and head;
            `blocks`: these with gains and biases; `all`.

    Raises:
        UserError: the network has none of them.

    Source: Appendix J.1: "we use the repeated weights which constitute the majority of the network parameters. We
    ignore gain terms".
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
    """What two rows differ in: seed, learning rate, augmentation, another setting by its name, or several.

    Rows that differ in nothing that is set have random streams of their own, and so differ in the seed.
    """
    ours, theirs = (dump(row_config(config, row)) for row in (first, second))
    names = {"augment": AUGMENTATION, "lr": LEARNING_RATE, "seed": SEED}
    groups = [name for name in ("task", "model", "augment", "regularizer") if ours[name] != theirs[name]]
    optim = [name for name, value in ours["optim"].items() if value != theirs["optim"][name]]
    differ = [names.get(name, name.replace("_", " ")) for name in (*groups, *optim)]
    if len(differ) > 1:
        return SEVERAL
    return differ[0] if differ else SEED


def chosen_pairs(config: Experiment) -> list[tuple[Pair, str]]:
    """Pairs of fine-tuned models with their series, in the order of their rows.

    Raises:
        UserError: rows are missing, or no two models are left that differ in one thing.
    """
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

    Raises:
        UserError: the sweep is not finished, or has no pairs to draw.
    """
    pairs, splits = chosen_pairs(config), config.task.reported
    evaluator = measure_midpoints(config, [pair for pair, _ in pairs])
    members = {each.row: each for pair, _ in pairs for each in (pair.first, pair.second)}
    rows = sorted(members)
    found = pool_geometry(config, rows)
    angles = np.degrees(np.arccos(np.clip(found.task_cosines, -1, 1)))
    singles = {row: method_of_model(f"row {row}", each, evaluator) for row, each in members.items()}
    table = []
    for pair, series in pairs:
        one, two = pair.first.row, pair.second.row
        i, j = rows.index(one), rows.index(two)
        middle = method_of_mixture("mean", pair.mean, evaluator)
        both = over_orders("both", [singles[one], singles[two]])
        advantage = difference_in(evaluator, middle, both, splits, redraw=True)
        apart = found.products[i, i] + found.products[j, j] - 2 * found.products[i, j]
        table.append(
            {
                "first": one,
                "second": two,
                "series": series,
                "larger_lr": pair.larger_lr(config),
                "angle": angles[i, j],
                "distance": max(apart, 0.0) ** 0.5,
                "distance_first": found.distances[i],
                "distance_second": found.distances[j],
                "weights": config.analysis.angles.weights,
                "accuracy_first": singles[one].accuracy(*splits),
                "accuracy_second": singles[two].accuracy(*splits),
                "accuracy_mean": middle.accuracy(*splits),
                "advantage": advantage.mean,
                "low": advantage.low,
                "high": advantage.high,
                "n": sum(len(evaluator.split(split)) for split in splits),
            }
        )
    return pd.DataFrame(table)


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
