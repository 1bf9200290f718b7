"""Tables with the paper's numbers beside ours, and in bold what is not significantly worse than the best."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.measure.methods import (
    NAN,
    SHIFT_MEAN,
    Method,
    best_of,
    bootstrap_groups,
    columns_of,
    difference_in,
    measure,
    tidy,
)
from analysis.tables.cells import BEST, HEADS, NAMES, column_title, counts, measured, points
from analysis.tables.named_rows import measure_named_rows
from analysis.tables.paper import OTHER_METHODS, beside, beside_table, legend, only_in_paper, paper_table
from analysis.tables.table3 import note
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.significance import paired_permutation

LEVEL = 0.05
ORACLE = "oracle"
RATE = re.compile(r", (\d+e-\d+)$")  # at the end of a row's name in Tables L.1 and L.2
PAPER_ONLY = "paper only"  # ends the name of a row without numbers of ours
DEMO_RATE = "3e-5"  # the paper has two; rows that name none stand beside this one


def _hits(evaluator: Evaluator, method: Method, column: str) -> tuple[list[Tensor], list[Tensor]] | None:
    """Per-image results of a column and the groups that are swapped together; None where top-1 does not score it."""
    if column in method.annotated:
        found = method.annotated[column]
        everything = torch.arange(len(found.right))
        if found.classes is None:
            return [found.right], [everything]
        by_class = [everything[found.classes == label] for label in found.classes.unique()]  # classes weigh alike
        return [found.right[images] for images in by_class], by_class
    splits = columns_of(evaluator.config)[column]
    if any(split in method.scores for split in splits):
        return None
    return [method.hits[split] for split in splits], bootstrap_groups(evaluator, splits)


def _p_to_best(evaluator: Evaluator, method: Method, best: Method, column: str) -> tuple[bool, float]:
    """Whether `method` is significantly worse than `best`, and the p-value where a permutation test gives one."""
    ours, theirs = _hits(evaluator, method, column), _hits(evaluator, best, column)
    if ours is None or theirs is None:  # scored by no mean over images: by the bootstrap interval of the difference
        gain = difference_in(evaluator, method, best, columns_of(evaluator.config)[column], redraw=True)
        return gain.high < 0, NAN
    p = paired_permutation(ours[0], theirs[0], ours[1], seed=evaluator.config.analysis.seed)
    return p < LEVEL, p


def with_significance(evaluator: Evaluator, methods: Sequence[Method], baseline: Method) -> pd.DataFrame:
    """One row per method and column: accuracy, n, difference to the baseline and its interval, and whether it is bold.

    Bold is the best of a column and what is not significantly different from it by a paired permutation test at 0.05,
    in which images of a `task.bootstrap_unit` are swapped together. An oracle is never bold: it was not chosen fairly.

    Columns: method, models, held_out, column, n, accuracy, spread, difference, low, high, p_to_best, bold; fractions.
    """
    rows: list[dict[str, Any]] = []
    for method in methods:
        head = {"method": method.name, "models": method.models, "held_out": method.held_out}
        for name in methods[0].annotated:
            seen = method.of(name).annotated[name]
            rows.append(head | {"column": name, "n": len(seen.right), "accuracy": seen.accuracy})
        rows += tidy([method], evaluator, baseline).to_dict("records")
    for column in dict.fromkeys(row["column"] for row in rows):
        pairs = list(zip(methods, (row for row in rows if row["column"] == column), strict=True))
        best, _ = max((each for each in pairs if each[0].name != ORACLE), key=lambda each: each[1]["accuracy"])
        for method, row in pairs:
            ours = method.of(column), best, column
            is_worse, p = _p_to_best(evaluator, *ours) if method is not best else (False, 1.0)
            row |= {"p_to_best": p, "bold": not is_worse and method.name != ORACLE}
    numbers = ["accuracy", "spread", "n", "p_to_best", "bold", "difference", "low", "high"]
    return pd.DataFrame(rows)[["method", "models", "held_out", "column", *numbers]]


def _cells(
    config: Experiment, compared: pd.DataFrame, names: Mapping[str, str], baseline: str
) -> tuple[pd.DataFrame, str]:
    """Text cells and caption of numbers beside the paper's."""
    task = config.task
    titles = {column: column_title(task, column) for column in compared["column"]}
    methods = compared["method"].unique()
    cells = beside_table(compared, titles, names)
    for column in (task.test, SHIFT_MEAN):
        rows = compared[compared["column"] == column].set_index("method").reindex(methods)
        if rows["ours"].isna().all():
            continue
        title = f"{titles[column]} − {baseline.split()[1]}"
        ends = zip(rows["difference"], rows["low"], rows["high"], strict=True)
        cells[title] = [points(*each) if any(each) and pd.notna(each[0]) else "" for each in ends]
        gains = rows["paper"] - (rows.loc["best"] if baseline == BEST else rows.iloc[0])["paper"]
        if gains.notna().sum() > 1:
            cells[f"{title}, paper"] = ["" if pd.isna(gain) or not gain else f"{gain:+.2f}" for gain in gains]
    missing = f" Rows marked {PAPER_ONLY} have no number of ours." if compared["ours"].isna().any() else ""
    minus = ", and ours minus the paper's in points" if compared["minus_paper"].notna().any() else ""
    text = (
        f"{measured(task, columns_of(config))} in %, n: {counts(compared.dropna(subset='ours'), task)}. "
        f"Ours beside the paper's{minus}. Bold: the best of a column, and what is not significantly "
        f"different from it (paired permutation test, p >= {LEVEL}). Last columns: points to "
        f"{baseline}, with 95 % paired-bootstrap intervals, and the paper's.{missing} {note(config)} {legend(compared)}"
    )
    return cells, text


def measure_beside_paper(config: Experiment, table: str) -> pd.DataFrame:
    """The numbers of Table 1, 3, 4 or C.1: an experiment's recipes in every column, with the paper's beside them.

    Columns: those of `with_significance` and of `beside`. Rows that only the paper has follow, without numbers of ours.

    Raises:
        UserError: a stage before this one is not finished.
    """
    evaluator = Evaluator(config)
    _, methods = measure(evaluator, with_oracle=ORACLE in set(paper_table(table)["row"]))
    tidy = with_significance(evaluator, methods, best_of(methods))
    if table == "table1":
        tidy = tidy[tidy["column"].isin([config.task.test, SHIFT_MEAN])]
    columns = {column: column for column in tidy["column"]} | {config.task.test: "test"}
    compared = beside(tidy, table, {name: name for name in tidy["method"]}, columns)
    return pd.concat([compared, only_in_paper(compared, table, columns)], ignore_index=True)


def cells_beside_paper(config: Experiment, numbers: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Table 1, 3, 4 or C.1 as text cells, and its caption; `numbers` are from `measure_beside_paper`."""
    names = NAMES | {"initialisation": f"Initialisation ({HEADS[config.model.head]})"} | OTHER_METHODS
    has_ours = numbers.groupby("method")["ours"].count() > 0
    names |= {row: f"{names[row]}, {PAPER_ONLY}" for row in has_ours.index[~has_ours]}
    return _cells(config, numbers, names, BEST)


def measure_rows_beside_paper(config: Experiment, table: str) -> pd.DataFrame:
    """The numbers of Table L.1, L.2 or L.3: named rows, soups and ensembles of sets of them, beside the paper's.

    Names that end in a learning rate stand beside the paper's number at that rate, others beside those at 3e-5.

    Raises:
        UserError: rows without names in `analysis.labels`, or a sweep that is not finished.
    """
    evaluator = Evaluator(config)
    methods, _ = measure_named_rows(evaluator)
    tidy = with_significance(evaluator, methods, methods[0])
    rates = tidy["method"].str.extract(RATE, expand=False).fillna(DEMO_RATE)
    has_rates = paper_table(table)["column"].str.contains("@").any()
    parts = []
    for rate, group in tidy.groupby(rates, sort=False):
        rows = {method: RATE.sub("", method) for method in group["method"]}
        ending = f"@{rate}" if has_rates else ""
        columns = {config.task.test: f"test{ending}", SHIFT_MEAN: f"{SHIFT_MEAN}{ending}"}
        parts.append(beside(group, table, rows, columns))
    return pd.concat(parts)


def row_cells_beside_paper(config: Experiment, numbers: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Table L.1, L.2 or L.3 as text cells, and its caption; `numbers` are from `measure_rows_beside_paper`."""
    return _cells(config, numbers, {}, "the first row")
