"""Table 3's shape: methods by splits, with paired-bootstrap intervals against the best individual model."""

from pathlib import Path

import pandas as pd

from analysis.results import SHIFT_MEAN
from store.atomic import replacing, write_text

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
    "learned_by_layer": "Learned soup (by layer)",
    "learned_by_tensor": "Learned soup (by tensor)",
    "model_stock": "Model Stock",
    "wise_ft": "WiSE-FT",
    "ensemble": "Ensemble",
    "calibrated_ensemble": "Ensemble (calibrated first)",
    "greedy_ensemble": "Greedy ensemble",
    "ensemble_with_replacement": "Greedy ensemble (with replacement)",
}
HEADS = {"linear_probe": "linear probe", "zero_shot": "zero-shot", "random": "random head"}
SPLITS = {"test": "Test", "v2": "V2", "r": "R", "sketch": "Sketch", "objectnet": "ObjectNet-like", "a": "A-like"}


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


def _accuracy(cell: pd.Series) -> str:
    """Per cent, with the standard deviation over random orders where there is one."""
    spread = "" if pd.isna(cell["spread"]) else f" ({percent(cell['spread'])})"
    return percent(cell["accuracy"]) + spread


def table3(tidy: pd.DataFrame, head: str = "linear_probe") -> pd.DataFrame:
    """One row per method, all cells text: accuracies in per cent, differences to the best individual in points.

    Args:
        tidy: from `analysis.results.tidy`.
        head: how the initialisation's was made, as in `model.head`.
    """
    names = NAMES | {"initialisation": f"Initialisation ({HEADS[head]})"}
    test, *shifts = [column for column in tidy["column"].unique() if column != SHIFT_MEAN]
    rows = []
    for method, group in tidy.groupby("method", sort=False):
        cells = group.set_index("column")
        row = {"Method": names.get(str(method), str(method)), "Models at inference": str(cells["models"].iloc[0])}
        held_out = cells["held_out"].iloc[0]
        row["Held-out"] = "" if pd.isna(held_out) else percent(held_out)  # an oracle was not chosen there
        for column in (test, *shifts):
            row[SPLITS.get(column, column)] = _accuracy(cells.loc[column])
        if shifts:
            row["Mean of shifts"] = _accuracy(cells.loc[SHIFT_MEAN])
        for column, title in ((test, "Test − best"), (SHIFT_MEAN, "Shifts − best"))[: 2 if shifts else 1]:
            cell = cells.loc[column]
            row[title] = "" if method == "best" else points(cell["difference"], cell["low"], cell["high"])
        rows.append(row)
    return pd.DataFrame(rows)


def caption(tidy: pd.DataFrame, note: str, baseline: str) -> str:
    """What the table shows, with n of every split."""
    sizes = tidy.drop_duplicates("column").set_index("column")["n"]
    counts = ", ".join(f"{SPLITS.get(c, c)} {n}" for c, n in sizes.items() if c != SHIFT_MEAN)
    return (
        f"Top-1 accuracy in %, n: {counts}. Differences in percentage points to {baseline}, with 95 % "
        f"paired-bootstrap intervals. {note}"
    )


BEST = "the best individual model, chosen on the held-out split"


def write_table(table: pd.DataFrame, tidy: pd.DataFrame, stem: Path, note: str, baseline: str = BEST) -> list[Path]:
    """Write stem.md, stem.tex (booktabs) and stem.csv (the tidy numbers behind both)."""
    text = caption(tidy, note, baseline)
    markdown, latex, csv = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".md", ".tex", ".csv"))
    write_text(markdown, f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{text}\n")
    escaped = table.rename(columns=_escape).map(_escape)
    write_text(
        latex,
        escaped.to_latex(index=False, caption=_escape(text), column_format="l" + "r" * (len(table.columns) - 1)),
    )
    with replacing(csv) as temporary:
        tidy.to_csv(temporary, index=False, float_format="%.8f")
    return [markdown, latex, csv]


def _escape(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_").replace("−", "$-$")
