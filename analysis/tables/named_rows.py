"""Rows by name beside the soups and ensembles of chosen ones: the shape of Tables L.1 to L.3 and Figures L.1, L.2."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.style import COLUMN, PAGE, STYLE, leave_out, legend, panels, save, styled
from analysis.measure.methods import SHIFT_MEAN, Method, method_of, method_of_model, need_shifts, tidy, titled
from analysis.measure.mixtures import axis_labels, kept_logits, mean_logits
from analysis.tables.cells import caption, column_title, gain, percent, write_cells
from configs.data import Task
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from soups.experiment.pool import usable_pool
from soups.recipes import mean_of
from store.runs import RAW, Ingredient

WHAT = {  # what a point is -> its look in Figure 1
    "individual": STYLE["individual"],
    "soup": ("Soup", *STYLE["greedy"][1:]),
    "ensemble": STYLE["ensemble"],
}


def variants(config: Experiment) -> list[Ingredient]:
    """Every model of every row that did not diverge, row by row: its ingredient, and the kinds of weights beside it."""
    return [kind for each in usable_pool(config) if each.row for kind in each.kinds().values()]


def _kind_name(kind: str) -> str:
    return "last weights" if kind == RAW else kind.replace("_", " ").upper()


def measure_named_rows(evaluator: Evaluator) -> tuple[list[Method], pd.DataFrame]:
    """The rows, then soup and ensemble of each set, for every kind of weights that the rows left.

    The first method is the table's baseline. Beside them for each its kind of weights and what it is (individual, soup
    or ensemble). A UserError refuses rows without names in `analysis.labels`.
    """
    config, held_out = evaluator.config, evaluator.config.task.held_out
    if not config.analysis.labels:
        raise UserError(f"{config.name}: name the rows in analysis.labels, and sets of them in analysis.sets")
    pool = variants(config)
    kinds = list(dict.fromkeys(variant.kind for variant in pool))
    found: list[tuple[Method, str, str]] = []
    for kind in kinds:
        of_kind = {variant.row: variant for variant in pool if variant.kind == kind}
        suffix = "" if len(kinds) == 1 else f" ({_kind_name(kind)})"
        for row, variant in of_kind.items():
            method = method_of_model(config.analysis.labels[row - 1] + suffix, variant, evaluator)
            found.append((method, kind, "individual"))
        for name, rows in config.analysis.sets.items():
            if not set(rows) <= of_kind.keys():
                continue
            members = [of_kind[row] for row in rows]
            soup, ensemble = mean_of([member.load for member in members]), mean_logits(evaluator, members)
            for what, models, logits in (
                ("soup", 1, kept_logits(evaluator, soup)),
                ("ensemble", len(members), ensemble),
            ):
                score = evaluator.score(logits(held_out), held_out)
                method = method_of(f"{titled(what)} of {name}{suffix}", models, logits, evaluator, score)
                found.append((method, kind, what))
    return [method for method, *_ in found], pd.DataFrame([note for _, *note in found], columns=["kind", "what"])


def tidy_named_rows(evaluator: Evaluator) -> pd.DataFrame:
    """One row per method and column: accuracy, n, difference to the first method and its interval; fractions."""
    methods, notes = measure_named_rows(evaluator)
    rows = tidy(methods, evaluator, methods[0]).drop(columns="spread")
    what = notes.loc[notes.index.repeat(len(rows) // len(methods))].reset_index(drop=True)
    return pd.concat([rows[["method"]], what, rows.drop(columns="method")], axis=1)


def named_rows_table(tidy: pd.DataFrame, task: Task) -> pd.DataFrame:
    """One row per method, all cells text: per cent, and differences to the first row in points."""
    rows: list[dict[str, str]] = []
    for method, group in tidy.groupby("method", sort=False):
        first = group.iloc[0]
        row = {"Method": str(method), "Models at inference": str(first["models"])}
        row["Held-out"] = percent(first["held_out"])
        for cell in group[group["column"].isin([task.test, SHIFT_MEAN])].to_dict("records"):
            title = column_title(task, cell["column"])
            row |= {title: percent(cell["accuracy"]), f"{title} − first": gain(cell) if rows else ""}
        rows.append(row)
    return pd.DataFrame(rows)


def measure_rows(config: Experiment) -> pd.DataFrame:
    """The numbers of Figures L.1 and L.2: rows as trained, their EMA and SWA, and soups and ensembles of each kind."""
    need_shifts(config)
    return tidy_named_rows(Evaluator(config))


@styled
def draw_rows(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Test accuracy against the mean of shifts: a panel a kind of weights, in each the others' points in grey."""
    kinds = list(dict.fromkeys(numbers["kind"]))
    labels, is_several = axis_labels(config), len(kinds) > 1
    wide = 100 * numbers.pivot_table(index=["method", "kind", "what"], columns="column", values="accuracy", sort=False)
    figure, (line,) = panels(1, len(kinds), 2.9, width=PAGE if is_several else COLUMN, sharex=True, sharey=True)
    wide = wide.drop(leave_out(line[0], *(wide[column] for column in labels)))
    x, y = (wide[column] for column in labels)
    for axes, kind in zip(line, kinds, strict=True):
        axes.scatter(x, y, s=6, color="#BBBBBB", lw=0, zorder=1)
        for what, (name, colour, marker, size) in WHAT.items():
            is_it = (wide.index.get_level_values("kind") == kind) & (wide.index.get_level_values("what") == what)
            look = {"c": colour, "marker": marker, "s": 0.4 * size, "edgecolors": "white", "lw": 0.3, "zorder": 3}
            axes.scatter(x[is_it], y[is_it], label=name, **look)
        axes.set(xlabel=labels[config.task.test], title=titled(_kind_name(kind)) if is_several else None)
    line[0].set_ylabel(labels[SHIFT_MEAN])
    legend(figure, line[0], 3, "Grey: the points of the other panels" if is_several else "")
    return figure


def write_named_rows(evaluator: Evaluator, folder: Path, note: str) -> list[Path]:
    """Write rows.{md,tex,csv} and rows.{pdf,png} for an experiment with `analysis.labels`."""
    config, numbers = evaluator.config, tidy_named_rows(evaluator)
    text = caption(numbers, note, "the first row", config.task)
    files = write_cells(named_rows_table(numbers, config.task), numbers, folder / "rows", text)
    return files + (save(draw_rows(config, numbers), folder / "rows") if config.task.shifts else [])
