"""Rows by name beside the soups and ensembles of chosen ones: the shape of Tables L.1 to L.3 and Figures L.1, L.2."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from analysis.figures.style import SETTINGS, save
from analysis.measure.methods import SHIFT_MEAN, Method, columns_of, method_of, method_of_model, tidy, titled
from analysis.measure.mixtures import kept_logits, mean_logits
from analysis.tables.cells import column_title, percent, points, write_table
from configs.data import Task
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from soups.experiment.pool import usable_pool
from soups.recipes import mean_of
from store.runs import RAW, Ingredient

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito's, a kind of weights each


def need_labels(config: Experiment) -> None:
    """Refuse an experiment whose rows have no names.

    Raises:
        UserError: it is one.
    """
    if not config.analysis.labels:
        raise UserError(f"{config.name}: name the rows in analysis.labels, and sets of them in analysis.sets")


def variants(config: Experiment) -> list[Ingredient]:
    """Every model of every row that did not diverge, row by row: its ingredient, and the kinds of weights beside it."""
    return [kind for each in usable_pool(config) if each.row for kind in each.kinds().values()]


def _made(evaluator: Evaluator, name: str, models: int, logits: Callable[[str], Tensor]) -> Method:
    held_out = evaluator.config.task.held_out
    return method_of(name, models, logits, evaluator.score(logits(held_out), held_out), evaluator)


def _suffix(kind: str, kinds: Sequence[str]) -> str:
    return "" if len(kinds) == 1 else f" ({kind.replace('_', ' ').upper() if kind != RAW else 'last weights'})"


def measure_named_rows(config: Experiment, evaluator: Evaluator) -> tuple[list[Method], pd.DataFrame]:
    """The rows, then soup and ensemble of each set, for every kind of weights that the rows left.

    Returns:
        The methods, the first of which is the table's baseline; and for each its kind of weights and what it is
        (individual, soup or ensemble).
    """
    pool = variants(config)
    kinds = list(dict.fromkeys(variant.kind for variant in pool))
    methods: list[Method] = []
    notes: list[dict[str, str]] = []
    for kind in kinds:
        of_kind = {variant.row: variant for variant in pool if variant.kind == kind}
        suffix = _suffix(kind, kinds)
        for row, variant in of_kind.items():
            methods.append(method_of_model(config.analysis.labels[row - 1] + suffix, variant, evaluator))
            notes.append({"kind": kind, "what": "individual"})
        for name, rows in config.analysis.sets.items():
            members = [of_kind[row] for row in rows if row in of_kind]
            if len(members) == len(rows):
                soup = kept_logits(evaluator, mean_of([member.load for member in members]))
                methods.append(_made(evaluator, f"Soup of {name}{suffix}", 1, soup))
                ensemble = mean_logits(evaluator, members)
                methods.append(_made(evaluator, f"Ensemble of {name}{suffix}", len(members), ensemble))
                notes += [{"kind": kind, "what": "soup"}, {"kind": kind, "what": "ensemble"}]
    return methods, pd.DataFrame(notes)


def tidy_named_rows(
    config: Experiment, methods: Sequence[Method], notes: pd.DataFrame, evaluator: Evaluator
) -> pd.DataFrame:
    """One row per method and column: accuracy, n, difference to the first method and its interval; fractions."""
    rows = tidy(config, methods, evaluator, methods[0]).drop(columns="spread")
    what = notes.loc[notes.index.repeat(len(columns_of(config)))].reset_index(drop=True)
    return pd.concat([rows[["method"]], what, rows.drop(columns="method")], axis=1)


def named_rows_table(tidy: pd.DataFrame, task: Task) -> pd.DataFrame:
    """One row per method, all cells text: per cent, and differences to the first row in points."""
    rows = []
    for i, (method, group) in enumerate(tidy.groupby("method", sort=False)):
        cells = group.set_index("column")
        row = {"Method": str(method), "Models at inference": str(cells["models"].iloc[0])}
        row["Held-out"] = percent(cells["held_out"].iloc[0])
        for column in (task.test, SHIFT_MEAN):
            title = column_title(task, column)
            if column not in cells.index:
                continue
            cell = cells.loc[column]
            row[title] = percent(cell["accuracy"])
            row[f"{title} − first"] = "" if i == 0 else points(cell["difference"], cell["low"], cell["high"])
        rows.append(row)
    return pd.DataFrame(rows)


def named_rows_figure(tidy: pd.DataFrame, test: str, title: str) -> Figure:
    """Test accuracy against the mean of shifts: one colour a kind of weights, one marker for what a point is."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(3.8, 3.2))
        axes = figure.subplots()
        wide = tidy.pivot_table(index=["method", "kind", "what"], columns="column", values="accuracy", sort=False)
        kinds = list(dict.fromkeys(tidy["kind"]))
        markers = {"individual": "o", "soup": "*", "ensemble": "s"}
        for (kind, what), group in wide.groupby(level=["kind", "what"], sort=False):
            axes.scatter(
                100 * group[test],
                100 * group[SHIFT_MEAN],
                color=COLOURS[kinds.index(str(kind)) % len(COLOURS)],
                marker=markers[str(what)],
                s={"soup": 110, "ensemble": 40}.get(str(what), 20),
                alpha=0.9,
                edgecolor="white",
                linewidth=0.4,
                zorder=2 if what == "individual" else 3,
                label=f"{'last weights' if kind == RAW else str(kind).replace('_', ' ').upper()}, {what}",
            )
        axes.set_xlabel(f"{title} test top-1 accuracy (%)")
        axes.set_ylabel("mean top-1 accuracy on the shifts (%)")
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncol=len(kinds), frameon=False)
        return figure


def write_named_rows(config: Experiment, evaluator: Evaluator, folder: Path, note: str) -> list[Path]:
    """Write rows.{md,tex,csv} and rows.{pdf,png} for an experiment with `analysis.labels`."""
    methods, notes = measure_named_rows(config, evaluator)
    tidy = tidy_named_rows(config, methods, notes, evaluator)
    test = config.task.test
    files = write_table(
        named_rows_table(tidy, config.task), tidy, folder / "rows", note, config.task, baseline="the first row"
    )
    if not config.task.shifts:
        return files
    return files + save(named_rows_figure(tidy, test, titled(config.task.name)), folder / "rows")
