"""Tables of text cells: numbers as they are printed, methods by splits as in Table 3, captions, and the files."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from analysis.figures.style import write_csv
from analysis.measure.methods import SHIFT_MEAN
from configs.data import Task
from soups.files.atomic import write_text

NAMES = {
    "zero-shot": "Zero-shot",
    "initialisation": "Initialisation (linear probe)",
    "best": "Best individual model",
    "second_best": "Second best model",
    "oracle": "Best individual on each test set (oracle)",
    "uniform": "Uniform soup",
    "subset": "Uniform soup of chosen models",
    "greedy": "Greedy soup",
    "greedy_random_order": "Greedy soup (random order)",
    "greedy_with_replacement": "Greedy soup (with replacement)",
    "learned": "Learned soup",
    "learned_by_layer": "Learned soup (by block)",
    "learned_by_tensor": "Learned soup (by layer: every tensor)",
    "model_stock": "Model Stock",
    "wise_ft": "WiSE-FT",
    "ensemble": "Ensemble",
    "calibrated_ensemble": "Ensemble (calibrated first)",
    "greedy_ensemble": "Greedy ensemble",
    "ensemble_with_replacement": "Greedy ensemble (with replacement)",
}
HEADS = {
    "linear_probe": "linear probe",
    "zero_shot": "zero-shot",
    "random": "random head",
    "prompt": "pretrained, asked",
}
ANNOTATIONS = {"real": "ReaL", "multilabel": "Multilabel"}  # columns that score the test split otherwise
METRICS = {
    "top1": "Top-1 accuracy",
    "macro_f1": "Macro F1",
    "worst_group": "Accuracy of the worst group",
    "matthews": "Matthews correlation",
    "accuracy_and_f1": "Mean of accuracy and F1",
}
LATEX = {"%": r"\%", "_": r"\_", "−": "$-$", "†": r"\dag{}", "‡": r"\ddag{}", "θ": r"$\theta$", "Σ": r"$\sum$"}
BEST = "the best individual model, chosen on the held-out split"


def names_for(head: str) -> dict[str, str]:
    """`NAMES`, with how the initialisation's head was made, as in `model.head`."""
    return NAMES | {"initialisation": f"Initialisation ({HEADS[head]})"}


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal.

    >>> percent(0.5304)
    '53.0'
    """
    return f"{100 * fraction:.1f}"


def points(difference: float, low: float, high: float) -> str:
    """A difference in percentage points with its interval.

    >>> points(0.056, 0.027, 0.083)
    '+5.6 [+2.7, +8.3]'
    """
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def gain(cell: Mapping[str, float]) -> str:
    """The difference of a row of numbers to its baseline, as `points`."""
    return points(cell["difference"], cell["low"], cell["high"])


def column_title(task: Task, column: str) -> str:
    """The title of a column: the split's in its task, ReaL, Multilabel, or Mean of shifts.

    >>> from configs.schema import load
    >>> [column_title(load(name).task, "objectnet") for name in ("demo", "table4_vitg")]
    ['ObjectNet-like', 'ObjectNet']
    """
    return "Mean of shifts" if column == SHIFT_MEAN else ANNOTATIONS.get(column) or task.split_title(column)


def table3(tidy: pd.DataFrame, task: Task, head: str = "linear_probe") -> pd.DataFrame:
    """One row per method, all cells text: accuracies in per cent, differences to the best individual in points.

    Standard deviations over random orders stand in brackets; `head` is how the initialisation's was made.
    """
    names, rows = names_for(head), []
    titles = {column: column_title(task, column) for column in tidy["column"].unique()}  # the mean of shifts is last
    test = next(iter(titles))
    differences = {test: f"{titles[test]} − best", SHIFT_MEAN: "Shifts − best"}
    for method, group in tidy.groupby("method", sort=False):
        first, cells = group.iloc[0], {cell["column"]: cell for cell in group.to_dict("records")}
        row = {"Method": names.get(str(method), str(method)), "Models at inference": str(first["models"])}
        row["Held-out"] = "" if pd.isna(first["held_out"]) else percent(first["held_out"])  # no oracle is chosen there
        for column, cell in cells.items():
            spread = "" if pd.isna(cell["spread"]) else f" ({percent(cell['spread'])})"
            row[titles[column]] = percent(cell["accuracy"]) + spread
        for column, title in differences.items():
            if column in cells:
                row[title] = "" if method == "best" else gain(cells[column])
        rows.append(row)
    return pd.DataFrame(rows)


def measured(task: Task, columns: Iterable[str]) -> str:
    """The metric of a table's numbers, split by split where they differ.

    >>> from configs.schema import load
    >>> measured(load("figureg1_fmow").task, ["test", "ood"])
    'Top-1 accuracy (Test), accuracy of the worst group (OOD)'
    """
    titles: dict[str, list[str]] = {}
    for column in columns:
        if column != SHIFT_MEAN:
            titles.setdefault(METRICS[task.metrics.get(column, "top1")], []).append(column_title(task, column))
    if len(titles) == 1:
        return next(iter(titles))
    first, *others = [f"{metric} ({', '.join(of)})" for metric, of in titles.items()]
    return ", ".join([first, *(other[:1].lower() + other[1:] for other in others)])


def counts(numbers: pd.DataFrame, task: Task) -> str:
    """The n of every split, for a caption."""
    sizes = numbers.drop_duplicates("column").set_index("column")["n"]
    return ", ".join(f"{column_title(task, c)} {n:.0f}" for c, n in sizes.items() if c != SHIFT_MEAN)


def caption(tidy: pd.DataFrame, note: str, baseline: str, task: Task) -> str:
    """Caption of a table: metric, n of every split, and the baseline of differences."""
    return (
        f"{measured(task, tidy['column'].unique())} in %, n: {counts(tidy, task)}. "
        f"Differences in percentage points to {baseline}, with 95 % paired-bootstrap intervals. {note}"
    )


def markdown(table: pd.DataFrame, text: str) -> str:
    """A table of text cells with its caption below."""
    return f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{text}\n"


def write_cells(table: pd.DataFrame, numbers: pd.DataFrame, stem: Path, text: str) -> list[Path]:
    """Write a table of text cells and its caption as stem.md and stem.tex (booktabs), its numbers as stem.csv."""
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".md", ".tex", ".csv")]
    write_text(files[0], markdown(table, text))
    escaped, format_ = table.rename(columns=_escape).map(_escape), "l" + "r" * (len(table.columns) - 1)
    write_text(files[1], escaped.to_latex(index=False, caption=_escape(text), column_format=format_))
    write_csv(numbers, files[2])
    return files


def _escape(text: str) -> str:
    for sign, latex in LATEX.items():
        text = text.replace(sign, latex)
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)
