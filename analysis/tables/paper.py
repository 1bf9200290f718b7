"""The paper's numbers, from results/paper, and ours beside them."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from analysis.measure.methods import NAN
from analysis.tables.cells import NAMES
from configs.errors import UserError

PAPER = Path(__file__).resolve().parents[2] / "results/paper"
MARKS = {"H": "", "M": "†", "L": "‡"}  # confidence -> the mark that the table puts at a number
LEGEND = "The paper's numbers are from results/paper, which names their sources"
OTHER_METHODS = {  # rows of the paper's tables that are no method of this project
    "vit_g_zhai": "ViT-G/14 (Zhai et al. 2021)",
    "vit_g_re_evaluated": "ViT-G/14 (Zhai et al. 2021, re-evaluated)",
    "coatnet_7": "CoAtNet-7 (Dai et al. 2021)",
    "coca": "CoCa (Yu et al. 2022)",
}
MARKED = {"M": "† medium confidence", "L": "‡ low confidence"}


def paper_tables() -> tuple[str, ...]:
    """The tables that there are numbers of.

    >>> "table3" in paper_tables()
    True
    """
    return tuple(sorted(path.stem for path in PAPER.glob("*.csv")))


def paper_table(name: str) -> pd.DataFrame:
    """The paper's numbers of one table, one row a cell.

    Args:
        name: table1, table3, table4, table5, tablec1, tablej1, tablel1, tablel2, tablel3 or headlines.

    Returns:
        Columns table, row, column, value (as printed: per cent or points, see unit), spread (standard deviation, NaN
        where none is given), unit, source, confidence (H, M or L). A cell that is not known has no row.

    Raises:
        UserError: there is no such table.

    >>> paper_table("table3").query("row == 'greedy' and column == 'test'")["value"].item()
    81.03
    """
    if name not in paper_tables():
        raise UserError(
            f"no numbers of {name!r} in {PAPER}: there are {', '.join(paper_tables()) or 'none'}"
            "; git checkout results/paper brings back what is missing"
        )
    return pd.read_csv(PAPER / f"{name}.csv", float_precision="round_trip")


def beside(ours: pd.DataFrame, name: str, rows: Mapping[str, str], columns: Mapping[str, str]) -> pd.DataFrame:
    """Our numbers with the paper's, cell by cell.

    Args:
        ours: one row per `method` and `column` with `accuracy` (fraction), as from `analysis.measure.methods.tidy`.
        name: of the paper's table, as for `paper_table`.
        rows: a method of ours -> the paper's row. Methods that are not in it, or whose row the paper's table has not,
            stay, without a number of the paper.
        columns: a column of ours -> the paper's column, likewise.

    Returns:
        `ours`, in its order and with its columns, and six more: `ours` and `paper` (per cent), `paper_spread`
        (standard deviation, points), `minus_paper` (points), `confidence` and `source` (empty where the paper has no
        known number).

    Raises:
        UserError: no such table.
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


def only_in_paper(compared: pd.DataFrame, name: str, columns: Mapping[str, str]) -> pd.DataFrame:
    """The paper's rows that nothing of ours stands beside, in the form of `beside`, without numbers of ours.

    Args:
        compared: from `beside`.
        name: of the paper's table.
        columns: a column of ours -> the paper's column; others of the paper's are left out.
    """
    paper = paper_table(name).rename(columns={"row": "method", "value": "paper", "spread": "paper_spread"})
    ours = dict(zip(columns.values(), columns, strict=True))
    missing = paper[~paper["method"].isin(compared["method"]) & paper["column"].isin(ours)]
    missing = missing.assign(column=missing["column"].map(ours), bold=False)
    return missing[["method", "column", "paper", "paper_spread", "confidence", "source", "bold"]]


def beside_table(compared: pd.DataFrame, titles: Mapping[str, str], names: Mapping[str, str] = NAMES) -> pd.DataFrame:
    """One row per method, all cells text: ours, the paper's and ours minus the paper's, with two decimals.

    Args:
        compared: from `beside`; where it has a column `bold`, ours is bold where that is true.
        titles: column -> its title.
        names: method -> its name in the table.

    Returns:
        For each column ours, and where the paper has numbers of it the paper's, with the marks of `MARKS`; differences
        only where `compared` has some.
    """
    with_paper, with_difference = (
        set(compared.loc[compared[name].notna(), "column"]) for name in ("paper", "minus_paper")
    )
    rows = []
    for method, group in compared.groupby("method", sort=False):
        row = {"Method": names.get(str(method), str(method))}
        for cell in group.to_dict("records"):
            column = cell["column"]
            title = titles.get(column, column)
            ours = _number(cell["ours"], 100 * cell.get("spread", NAN))  # a fraction, as in `tidy`
            row[title] = f"**{ours}**" if cell.get("bold") and ours else ours
            if column in with_paper:
                mark = MARKS.get(cell["confidence"], "")
                row[f"{title}, paper"] = _number(cell["paper"], cell["paper_spread"]) + mark
            if column in with_difference:  # never -0.00
                minus = cell["minus_paper"]
                row[f"{title} − paper"] = "" if pd.isna(minus) else f"{round(minus, 2) + 0.0:+.2f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _number(value: float, spread: float) -> str:
    return "" if pd.isna(value) else f"{value:.2f}" + ("" if pd.isna(spread) else f" ({spread:.2f})")


def legend(compared: pd.DataFrame) -> str:
    """A sentence for the caption: where the paper's numbers are from, and what the marks in the table mean."""
    there = set(compared["confidence"])
    marks = [meaning for confidence, meaning in MARKED.items() if confidence in there]
    return "; ".join([LEGEND, *marks]) + "."
