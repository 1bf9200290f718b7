"""Tables with the paper's numbers, from results/paper, beside ours; bold is what is not significantly below the best.

Tables 1, 3, 4 and C.1 are of an experiment's recipes, L.1 to L.3 of its named rows, and 5 and J.1 of several text
models on several tasks, an experiment for each model and task.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from analysis.tables.cells import BEST, METRICS, NAMES, column_title, counts, gain, measured, names_for, points
from analysis.tables.named_rows import measure_named_rows
from analysis.tables.table3 import note
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.significance import paired_permutation

PAPER = Path(__file__).resolve().parents[2] / "results/paper"
MARKS = {"H": "", "M": "†", "L": "‡"}  # confidence -> the mark that the table puts at a number
MARKED = {"M": "† medium confidence", "L": "‡ low confidence"}
LEGEND = "The paper's numbers are from results/paper, which names their sources"
OTHER_METHODS = {  # rows of the paper's tables that are no method of this project
    "vit_g_zhai": "ViT-G/14 (Zhai et al. 2021)",
    "vit_g_re_evaluated": "ViT-G/14 (Zhai et al. 2021, re-evaluated)",
    "coatnet_7": "CoAtNet-7 (Dai et al. 2021)",
    "coca": "CoCa (Yu et al. 2022)",
}
LEVEL = 0.05
ORACLE = "oracle"
RATE = re.compile(r", (\d+e-\d+)$")  # at the end of a row's name in Tables L.1 and L.2
PAPER_ONLY = "paper only"  # ends the name of a row without numbers of ours
DEMO_RATE = "3e-5"  # the paper has two; rows that name none stand beside this one
RECIPES = {"table5": ("best", "greedy"), "tablej1": ("best", "uniform", "greedy")}
MODELS = {"bert_base": "BERT-base", "bert_large": "BERT-large", "t5_small": "T5-small"}
MODELS |= {"t5_base": "T5-base", "t5_large": "T5-large"}
Cells = tuple[pd.DataFrame, str]  # of text, and the caption


def paper_table(name: str) -> pd.DataFrame:
    """The paper's numbers of one table, one row a cell; a cell that is not known has no row.

    Columns table, row, column, value (as printed: per cent or points, see unit), spread (standard deviation, NaN where
    none is given), unit, source, confidence (H, M or L).

    >>> paper_table("table3").query("row == 'greedy' and column == 'test'")["value"].item()
    81.03
    """
    file = PAPER / f"{name}.csv"
    if not file.exists():
        raise UserError(f"{file} is missing: git checkout results/paper brings it back")
    return pd.read_csv(file, float_precision="round_trip")


def beside(ours: pd.DataFrame, name: str, rows: Mapping[str, str], columns: Mapping[str, str]) -> pd.DataFrame:
    """Our numbers with the paper's, cell by cell.

    Args:
        ours: one row per `method` and `column` with `accuracy` (fraction), as from `analysis.measure.methods.tidy`.
        name: of the paper's table, as for `paper_table`.
        rows: a method of ours -> the paper's row. Others stay without a number of the paper.
        columns: a column of ours -> the paper's column, likewise.

    Returns:
        `ours`, in its order and with its columns, and `ours` and `paper` (per cent), `paper_spread` (standard
        deviation) and `minus_paper` (points), `confidence` and `source` (empty where the paper has no known number).
    """
    wanted = pd.MultiIndex.from_arrays([ours["method"].map(rows), ours["column"].map(columns)])
    cells = paper_table(name).set_index(["row", "column"]).reindex(wanted).set_axis(ours.index)
    percents = 100 * ours["accuracy"]
    return ours.assign(
        ours=percents,
        paper=cells["value"],
        paper_spread=cells["spread"],
        minus_paper=percents - cells["value"],
        confidence=cells["confidence"].fillna(""),
        source=cells["source"].fillna(""),
    )


def _only_in_paper(compared: pd.DataFrame, name: str, columns: Mapping[str, str]) -> pd.DataFrame:
    """The paper's rows that nothing of ours stands beside, in the form and with the `columns` of `beside`."""
    paper = paper_table(name).rename(columns={"row": "method", "value": "paper", "spread": "paper_spread"})
    ours = dict(zip(columns.values(), columns, strict=True))
    missing = paper[~paper["method"].isin(compared["method"]) & paper["column"].isin(ours)]
    missing = missing.assign(column=missing["column"].map(ours), bold=False)
    return missing[["method", "column", "paper", "paper_spread", "confidence", "source", "bold"]]


def beside_table(compared: pd.DataFrame, titles: Mapping[str, str], names: Mapping[str, str] = NAMES) -> pd.DataFrame:
    """One row per method, all cells text: ours, the paper's and ours minus the paper's, with two decimals.

    Ours is bold where a column `bold` of what `beside` gave is true. The paper's, with its marks, and differences stand
    only where a column has some. `titles` are of columns, `names` of methods.
    """
    with_paper, with_difference = (
        set(compared.loc[compared[name].notna(), "column"]) for name in ("paper", "minus_paper")
    )
    rows = []
    for method, group in compared.groupby("method", sort=False):
        row = {"Method": names.get(str(method), str(method))}
        for cell in group.to_dict("records"):
            column, minus = cell["column"], cell["minus_paper"]
            title = titles.get(column, column)
            ours = _number(cell["ours"], 100 * cell.get("spread", NAN))  # a fraction, as in `tidy`
            row[title] = f"**{ours}**" if cell.get("bold") and ours else ours
            if column in with_paper:
                mark = MARKS.get(cell["confidence"], "")
                row[f"{title}, paper"] = _number(cell["paper"], cell["paper_spread"]) + mark
            if column in with_difference:  # never -0.00
                row[f"{title} − paper"] = "" if pd.isna(minus) else f"{round(minus, 2) + 0.0:+.2f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _number(value: float, spread: float) -> str:
    return "" if pd.isna(value) else f"{value:.2f}" + ("" if pd.isna(spread) else f" ({spread:.2f})")


def legend(compared: pd.DataFrame) -> str:
    """A sentence for the caption: where the paper's numbers are from, and what the marks in the table mean."""
    there = set(compared["confidence"])
    return "; ".join([LEGEND, *(meaning for confidence, meaning in MARKED.items() if confidence in there)]) + "."


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
        found = difference_in(evaluator, method, best, columns_of(evaluator.config)[column], redraw=True)
        return found.high < 0, NAN
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
            is_best = method is best
            is_worse, p = (False, 1.0) if is_best else _p_to_best(evaluator, method.of(column), best, column)
            row |= {"p_to_best": p, "bold": not is_worse and method.name != ORACLE}
    numbers = ["accuracy", "spread", "n", "p_to_best", "bold", "difference", "low", "high"]
    return pd.DataFrame(rows)[["method", "models", "held_out", "column", *numbers]]


def _cells(config: Experiment, compared: pd.DataFrame, names: Mapping[str, str], baseline: str) -> Cells:
    """Text cells and caption of numbers beside the paper's."""
    task, methods = config.task, compared["method"].unique()
    titles = {column: column_title(task, column) for column in compared["column"]}
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
            cells[f"{title}, paper"] = ["" if pd.isna(each) or not each else f"{each:+.2f}" for each in gains]
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
    """
    evaluator = Evaluator(config)
    _, methods = measure(evaluator, with_oracle=ORACLE in set(paper_table(table)["row"]))
    ours = with_significance(evaluator, methods, best_of(methods))
    if table == "table1":
        ours = ours[ours["column"].isin([config.task.test, SHIFT_MEAN])]
    columns = {column: column for column in ours["column"]} | {config.task.test: "test"}
    compared = beside(ours, table, {name: name for name in ours["method"]}, columns)
    return pd.concat([compared, _only_in_paper(compared, table, columns)], ignore_index=True)


def cells_beside_paper(config: Experiment, numbers: pd.DataFrame) -> Cells:
    """Table 1, 3, 4 or C.1 as text cells, and its caption; `numbers` are from `measure_beside_paper`."""
    names = names_for(config.model.head) | OTHER_METHODS
    has_ours = numbers.groupby("method")["ours"].count() > 0
    names |= {row: f"{names[row]}, {PAPER_ONLY}" for row in has_ours.index[~has_ours]}
    return _cells(config, numbers, names, BEST)


def measure_rows_beside_paper(config: Experiment, table: str) -> pd.DataFrame:
    """The numbers of Table L.1, L.2 or L.3: named rows, soups and ensembles of sets of them, beside the paper's.

    Names that end in a learning rate stand beside the paper's number at that rate, others beside those at 3e-5.
    """
    evaluator = Evaluator(config)
    methods, _ = measure_named_rows(evaluator)
    ours = with_significance(evaluator, methods, methods[0])
    rates = ours["method"].str.extract(RATE, expand=False).fillna(DEMO_RATE)
    has_rates = paper_table(table)["column"].str.contains("@").any()
    parts = []
    for rate, group in ours.groupby(rates, sort=False):
        rows = {method: RATE.sub("", method) for method in group["method"]}
        ending = f"@{rate}" if has_rates else ""
        columns = {config.task.test: f"test{ending}", SHIFT_MEAN: f"{SHIFT_MEAN}{ending}"}
        parts.append(beside(group, table, rows, columns))
    return pd.concat(parts)


def row_cells_beside_paper(config: Experiment, numbers: pd.DataFrame) -> Cells:
    """Table L.1, L.2 or L.3 as text cells, and its caption; `numbers` are from `measure_rows_beside_paper`."""
    return _cells(config, numbers, {}, "the first row")


def text_numbers(configs: Sequence[Experiment], table: str) -> pd.DataFrame:
    """One row per experiment and recipe, on its test split, beside the paper's number where it has one.

    Columns: those of `with_significance` and of `beside`, network, task, metric, and protocol: apart, or paper, which
    selects on the reported split.
    """
    parts = []
    for config in configs:
        evaluator, task = Evaluator(config), config.task
        _, methods = measure(evaluator)
        chosen = [method for method in methods if method.name in RECIPES[table]]
        found = with_significance(evaluator, chosen, best_of(methods))
        network, name, metric = network_of(config), task.subset or task.name, task.metrics.get(task.test, "top1")
        more = {"network": network, "task": name, "protocol": task.protocol, "metric": metric}
        rows = {method: f"{network}/{method}" for method in RECIPES[table]}
        ours = found[found["column"] == task.test].assign(**more)
        parts.append(beside(ours, table, rows, {task.test: name}).drop(columns="paper_spread"))
    return pd.concat(parts, ignore_index=True)


def network_of(config: Experiment) -> str:
    """The network of an experiment as results/paper calls it, e.g. bert_base; other networks by their names."""
    name = config.model.name or config.model.kind
    key = name.rpartition("/")[2].removesuffix("-uncased").replace("-", "_")
    return key if key in MODELS else name


def text_cells(configs: Sequence[Experiment], numbers: pd.DataFrame, table: str) -> Cells:
    """Table 5 or J.1 as text cells, and its caption: `text_numbers`, then what only the paper has."""
    rows = []
    for cell in numbers.to_dict("records"):
        ours, minus = f"{cell['ours']:.1f}", cell["minus_paper"]
        row = {"Model": MODELS.get(cell["network"], cell["network"]), "Task": cell["task"]}
        row |= {"Metric": METRICS[cell["metric"]], "n": str(cell["n"]), "Method": NAMES[cell["method"]]}
        row |= {"Ours": f"**{ours}**" if cell["bold"] else ours, "Paper": _of_paper(cell["paper"], cell["confidence"])}
        row["Ours − paper"] = "" if pd.isna(minus) else f"{minus:+.1f}"
        row["Ours − best"] = gain(cell) if cell["method"] != "best" else ""
        rows.append(row)
    if not any(row["Ours − paper"] for row in rows):
        rows = [{key: row[key] for key in row if key != "Ours − paper"} for row in rows]
    ran = set(numbers[["network", "method", "task"]].itertuples(index=False, name=None))
    for cell in paper_table(table).to_dict("records"):
        network, method = cell["row"].split("/")
        if method in NAMES and (network, method, cell["column"]) not in ran:
            row = {"Model": MODELS[network], "Task": cell["column"], "Method": NAMES[method]}
            rows.append(row | {"Paper": _of_paper(cell["value"], cell["confidence"])})
    notes = " ".join(dict.fromkeys(note(config) for config in configs))
    text = (
        "Scores in %, on the test split. Bold: the better of an experiment's recipes, and what is not "
        f"significantly different from it (p >= {LEVEL}). Ours − best: points to {BEST}, with 95 % paired-bootstrap "
        "intervals. Rows without a number of ours are the paper's alone. "
        f"{notes} {legend(pd.concat([numbers, paper_table(table)]))}"
    )
    return pd.DataFrame(rows).fillna(""), text


def _of_paper(value: float, confidence: str) -> str:
    return "" if pd.isna(value) else f"{value:.1f}{MARKS[confidence]}"
