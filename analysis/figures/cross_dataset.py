"""Figure E.1: soups of the zero-shot model and backbones fine-tuned on other data sets, on classes none was trained on.

Backbones are added to the zero-shot model in random orders; every model keeps the zero-shot head of the experiment's
own classes. Sets that several orders share are evaluated once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.figures.pool_size import orders_of
from analysis.figures.style import legend, panels, styled, two_lines
from analysis.measure.methods import numbers_of
from analysis.measure.mixtures import Mixture, axis_labels, drawn_columns, measure_mixtures, method_of_mixture
from configs.errors import UserError
from configs.schema import Experiment
from soups.average import Average
from soups.experiment.backbones import read_tower
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of, read_json
from soups.files.weights import Weights, load_weights
from store.runs import RunFolder, done_row
from tasks.load import class_names

SOUP, GAINS = "#0072B2", ("#009E73", "#D55E00")  # Okabe and Ito's colours; gains are up and down


@dataclass(frozen=True)
class Tower:
    """A backbone that was fine-tuned on a data set."""

    name: str  # the data set's
    folder: Path
    digest: str


def _data_set(folder: Path) -> str:
    """What a row was trained on, from the settings beside it."""
    task = read_json(folder / "config.json")["task"]
    if task.get("parts", 1) > 1:
        return f"part {task['part'] + 1}"
    named = {"folders", "image_folder", "image_table", "parquet"}
    return task.get("title") or (Path(task["folder"]).name if task["kind"] in named else task["kind"])


def towers_of(config: Experiment) -> list[Tower]:
    """The rows that `towers` names, or all fine-tuned rows of the experiment where it names none.

    Raises:
        UserError: no zero-shot heads, a folder without a finished row, or fewer than two backbones.
    """
    if config.model.head != "zero_shot":
        raise UserError(f"{config.name}: Figure E.1 needs heads from class names, model.head=zero_shot")
    folders = config.towers or tuple(each.folder for each in usable_pool(config) if each.row)
    if len(folders) < 2:
        raise UserError(f"{config.name}: name two rows or more in towers=[runs/NAME/ingredients/001,...]")
    for folder in folders:
        if not (folder / "done.json").exists() or read_json(folder / "done.json")["status"] != "done":
            raise UserError(f"towers: {folder} holds no finished row; it is a folder as runs/NAME/ingredients/001")
    names = [_data_set(folder) for folder in folders]
    shared = {name for name, count in Counter(names).items() if count > 1}
    return [
        Tower(
            f"{name}, {folder.parts[-3]} {int(folder.name)}" if name in shared else name,
            folder,
            read_json(folder / "done.json")["digest"],
        )
        for name, folder in zip(names, folders, strict=True)
    ]


def zero_shot_model(config: Experiment) -> Weights:
    """The pretrained model with the head of the experiment's classes: row 0 where there is one, else made anew."""
    folder, done = RunFolder.of(config).ingredient(0), done_row(config, 0)
    if done is not None:
        return load_weights(folder / "weights.safetensors", done["digest"])
    from models.classifier import pretrained  # noqa: PLC0415  # seconds that cached numbers need not wait for

    return pretrained(config.model, class_names(config.task)).state_dict()


def sets_along(orders: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The distinct sets, sorted within, of backbones that orders add one by one; the empty one first.

    >>> sets_along([[1, 0], [0, 1]])
    [(), (1,), (0, 1), (0,)]
    """
    return list(dict.fromkeys(tuple(sorted(order[:k])) for order in orders for k in range(len(order) + 1)))


def _sum_up(config: Experiment, towers: Sequence[Tower], chosen: Sequence[int]) -> dict[str, Tensor]:
    zero_shot = zero_shot_model(config)
    total = Average().plus(zero_shot)
    for i in chosen:
        total = total.plus(read_tower(towers[i].folder, zero_shot))
    return total.weights()


def soup_of(config: Experiment, towers: Sequence[Tower], chosen: Sequence[int]) -> Mixture:
    """The mean of the zero-shot model and some towers, all under its head; named without reading them."""
    head = {"model": repr(config.model), "classes": list(class_names(config.task))}
    key = digest_of({"zero-shot": head, "towers": sorted(towers[i].digest for i in chosen)})
    return Mixture(key, partial(_sum_up, config, towers, chosen))


def measure_backbones(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure E.1: one row per order, number of backbones added (0 is zero-shot) and column.

    It costs an evaluation of each distinct set of backbones. Columns of the figure are test and the mean of shifts.

    Columns: order, added, last (the data set that was added last), column, n, accuracy, change (to one backbone less),
    difference (to zero-shot) with its interval low and high; fractions.

    Raises:
        UserError: as `towers_of`; backbones of another network.
    """
    towers = towers_of(config)
    orders = orders_of(config, len(towers))
    soups = {chosen: soup_of(config, towers, chosen) for chosen in sets_along(orders)}
    evaluator = measure_mixtures(config, "soups of backbones", list(soups.values()))
    methods = {chosen: method_of_mixture("soup", soup, evaluator) for chosen, soup in soups.items()}
    rows: list[dict[str, Any]] = []
    for place, order in enumerate(orders):
        before: dict[str, float] = {}
        for k in range(len(order) + 1):
            head = {"order": place, "added": k, "last": towers[order[k - 1]].name if k else ""}
            for row in numbers_of(evaluator, methods[tuple(sorted(order[:k]))], methods[()], drawn_columns(config)):
                change = {"change": row["accuracy"] - before[row["column"]]} if k else {}
                before[row["column"]] = row["accuracy"]
                rows.append(head | row | change)
    return pd.DataFrame(rows)


def changes_of(tidy: pd.DataFrame, column: str) -> pd.DataFrame:
    """A line a data set, sorted by the mean: the change when its model is added, in each order and in the mean."""
    drawn = tidy[(tidy["column"] == column) & (tidy["added"] > 0)]
    changes = drawn.pivot(index="last", columns="order", values="change")
    return changes.assign(mean=changes.mean(axis=1)).sort_values("mean")


def _curves(axes: Axes, drawn: pd.DataFrame) -> None:
    wide = 100 * drawn.pivot(index="added", columns="order", values="accuracy")
    lines = axes.plot(wide.index, wide, color=SOUP, lw=0.7, alpha=0.4, zorder=2)
    lines[0].set_label("Soup in one order")
    look: dict[str, Any] = {"marker": "o", "ms": 3.5, "zorder": 4}
    axes.plot(wide.index, wide.mean(axis=1), color=SOUP, lw=1.8, label="Mean of the orders", **look)
    axes.axhline(wide.iloc[0, 0], color="black", lw=0.8, ls="--", zorder=1, label="Zero-shot")
    last = 100 * drawn[drawn["added"] == wide.index[-1]].iloc[0][["accuracy", "difference", "low", "high"]]
    ends = [[last["difference"] - last["low"]], [last["high"] - last["difference"]]]  # all orders end at this soup
    label = "95 % interval of soup − zero-shot"
    axes.errorbar([wide.index[-1]], [last["accuracy"]], yerr=ends, color=SOUP, lw=1, capsize=2, zorder=3, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _changes(axes: Axes, changes: pd.DataFrame) -> None:
    mean, orders = 100 * changes["mean"], 100 * changes.drop(columns="mean")
    axes.barh(range(len(changes)), mean, color=[GAINS[value < 0] for value in mean], height=0.6, alpha=0.6, zorder=2)
    for order in orders:
        axes.plot(orders[order], range(len(changes)), "o", color="black", ms=2.5, zorder=3)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(changes)), changes.index.tolist())


@styled
def draw_backbones(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure E.1: accuracy against backbones added, and the change with each data set's model; a line a column."""
    labels = axis_labels(config)
    figure, grid = panels(len(labels), 2, 0.9 + 1.9 * len(labels))
    for (left, right), (column, label) in zip(grid, labels.items(), strict=True):
        _curves(left, numbers[numbers["column"] == column])
        left.set_ylabel(two_lines(label))
        _changes(right, changes_of(numbers, column))
        right.set_title(label.partition(",")[0])
    grid[-1, 0].set_xlabel("Fine-tuned models added to the soup")
    grid[-1, 1].set_xlabel("Change when added (points)")
    legend(figure, grid[0, 0], 2, "Right: bars are means of the orders, and each dot is an order")
    return figure
