"""Figures D.1 and E.1: accuracy on the way to fine-tuned models, and while backbones are added to a soup."""

from collections.abc import Callable, Sequence
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
from analysis.figures.style import COLUMN, STYLE, legend, panels, styled, two_lines
from analysis.measure.methods import SHIFT_MEAN, method_of, need_shifts, numbers_of, soup_record
from analysis.measure.mixtures import Mixture, axis_labels, drawn_columns, measure_mixtures, method_of_mixture
from configs.errors import UserError
from configs.schema import Experiment
from soups.experiment.backbones import read_tower
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of, read_json
from soups.files.weights import Weights, load_weights
from soups.recipes import mean_of, wise_ft
from store.rows import row_config
from store.runs import Ingredient, RunFolder, done_row
from tasks.load import class_names

ALPHAS = tuple(i / 10 for i in range(11))
INDIVIDUAL = "individual"
AUGMENTATIONS = ("#009E73", "#D55E00", "#56B4E9", "#E69F00", "#999999", "#F0E442")  # Okabe and Ito's; not the soups'
SOUP, GAINS = "#0072B2", ("#009E73", "#D55E00")  # Okabe and Ito's; gains are up and down


# ---- Figure D.1: from the initialisation to every fine-tuned model and to two soups (WiSE-FT)


@dataclass(frozen=True)
class End:
    """A fine-tuned model or soup that the initialisation is interpolated with."""

    name: str
    kind: str  # individual, or the soup's recipe
    group: str  # its colour says this: the augmentation, where the sweep varies it
    digest: str
    load: Callable[[], Weights]


def ends_of(config: Experiment) -> list[End]:
    """Every fine-tuned model that did not diverge, then the uniform and greedy soup where the experiment has them."""
    kinds = {row: row_config(config, row).augment.kind for row in range(1, config.sweep.size + 1)}
    found = []
    for each in usable_pool(config):
        if each.row:
            group = kinds[each.row] if len(set(kinds.values())) > 1 else INDIVIDUAL
            found.append(End(f"row {each.row}", INDIVIDUAL, group, each.digest, each.load))
    for recipe in [each for each in ("uniform", "greedy") if each in config.recipes]:
        digest = soup_record(config, recipe)["digest"]
        load = partial(load_weights, RunFolder.of(config).soup(recipe) / "weights.safetensors", digest)
        found.append(End(recipe, recipe, recipe, digest, load))
    return found


def _mixtures(start: Ingredient, end: End) -> dict[float, Mixture]:
    """Alpha -> (1 - alpha) start + alpha end, without the two themselves."""
    keys = {alpha: digest_of({"wise_ft": [start.digest, end.digest], "alpha": alpha}) for alpha in ALPHAS[1:-1]}
    return {alpha: Mixture(key, partial(wise_ft, start.load, end.load, alpha)) for alpha, key in keys.items()}


def measure_wise(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure D.1: one row per end, alpha and column (test, mean of shifts).

    It costs 9 evaluations for each fine-tuned model and soup.

    Columns: end, kind, group, alpha, column, n, accuracy, and the difference to the end itself (alpha = 1) with its
    interval low and high; fractions.
    """
    need_shifts(config)
    start, ends = usable_pool(config)[0], ends_of(config)
    mixtures = [mixture for end in ends for mixture in _mixtures(start, end).values()]
    evaluator = measure_mixtures(config, "points of WiSE-FT curves", mixtures)
    rows: list[dict[str, Any]] = []
    for end in ends:
        first, last = (method_of("", 1, partial(evaluator.logits, e.digest, e.load), evaluator) for e in (start, end))
        between = {alpha: method_of_mixture("", each, evaluator) for alpha, each in _mixtures(start, end).items()}
        for alpha, found in {0.0: first, **between, 1.0: last}.items():
            head = {"end": end.name, "kind": end.kind, "group": end.group, "alpha": alpha}
            rows += [head | row for row in numbers_of(evaluator, found, last, drawn_columns(config))]
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


# ---- Figure E.1: soups of the zero-shot model and backbones fine-tuned on other data sets, added in random orders.
# Every model keeps the zero-shot head of the experiment's own classes, on which none was trained. Sets that several
# orders share are evaluated once.


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
    """The rows that `towers` names, or all fine-tuned rows of the experiment where it names none."""
    if config.model.head != "zero_shot":
        raise UserError(f"{config.name}: Figure E.1 needs heads from class names, model.head=zero_shot")
    folders = config.towers or tuple(each.folder for each in usable_pool(config) if each.row)
    if len(folders) < 2:
        raise UserError(f"{config.name}: name two rows or more in towers=[runs/NAME/ingredients/001,...]")
    done = [read_json(file) if (file := folder / "done.json").exists() else {} for folder in folders]
    if absent := [folder for folder, record in zip(folders, done, strict=True) if record.get("status") != "done"]:
        raise UserError(f"towers: {absent[0]} holds no finished row; it is a folder as runs/NAME/ingredients/001")
    names = [_data_set(folder) for folder in folders]
    found = []
    for name, folder, record in zip(names, folders, done, strict=True):
        apart = f"{name}, {folder.parts[-3]} {int(folder.name)}" if names.count(name) > 1 else name
        found.append(Tower(apart, folder, record["digest"]))
    return found


def zero_shot_model(config: Experiment) -> Weights:
    """The pretrained model with the head of the experiment's classes: row 0 where there is one, else made anew."""
    folder, done = RunFolder.of(config).ingredient(0), done_row(config, 0)
    if done is not None:
        return load_weights(folder / "weights.safetensors", done["digest"])
    from models.classifier import pretrained  # noqa: PLC0415  # seconds that cached numbers need not wait for

    return pretrained(config.model, class_names(config.task)).state_dict()


def sets_along(orders: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The distinct sets, sorted within, of backbones that orders add one by one; the empty one first."""
    return list(dict.fromkeys(tuple(sorted(order[:k])) for order in orders for k in range(len(order) + 1)))


def _sum_up(config: Experiment, towers: Sequence[Tower]) -> dict[str, Tensor]:
    zero_shot = zero_shot_model(config)
    return mean_of([lambda: zero_shot, *(partial(read_tower, each.folder, zero_shot) for each in towers)])


def _soup_of(config: Experiment, towers: Sequence[Tower]) -> Mixture:
    """The mean of the zero-shot model and some towers, all under its head; named without reading them."""
    head = {"model": repr(config.model), "classes": list(class_names(config.task))}
    key = digest_of({"zero-shot": head, "towers": sorted(tower.digest for tower in towers)})
    return Mixture(key, partial(_sum_up, config, towers))


def measure_backbones(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure E.1: one row per order, number of backbones added (0 is zero-shot) and column.

    It costs an evaluation of each distinct set of backbones.

    Columns: order, added, last (the data set that was added last), column, n, accuracy, difference (to zero-shot) with
    its interval low and high, change (to one backbone less); fractions.
    """
    towers = towers_of(config)
    orders = orders_of(config, len(towers))
    soups = {chosen: _soup_of(config, [towers[i] for i in chosen]) for chosen in sets_along(orders)}
    evaluator = measure_mixtures(config, "soups of backbones", list(soups.values()))
    methods = {chosen: method_of_mixture("soup", soup, evaluator) for chosen, soup in soups.items()}
    rows: list[dict[str, Any]] = []
    for place, order in enumerate(orders):
        for k in range(len(order) + 1):
            head = {"order": place, "added": k, "last": towers[order[k - 1]].name if k else ""}
            soup = methods[tuple(sorted(order[:k]))]
            rows += [head | row for row in numbers_of(evaluator, soup, methods[()], drawn_columns(config))]
    tidy = pd.DataFrame(rows)
    return tidy.assign(change=tidy.groupby(["order", "column"])["accuracy"].diff())


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
