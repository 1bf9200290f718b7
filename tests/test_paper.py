"""The paper's numbers hang together, and ours stand beside the right ones."""

import numpy as np
import pandas as pd
import pytest

from analysis.measure.methods import SHIFT_MEAN
from analysis.tables.cells import NAMES, write_cells
from analysis.tables.paper import PAPER, beside, beside_table, legend, paper_table
from configs.errors import UserError
from configs.schema import load

TABLES = ("headlines", *(f"table{name}" for name in ("1", "3", "4", "5", "c1", "j1", "l1", "l2", "l3")))
SHIFTS = ["v2", "r", "sketch", "objectnet", "a"]
GLUE = ["mrpc", "rte", "cola", "sst2"]


def wide(name):
    return paper_table(name).pivot(index="row", columns="column", values="value")


def ours_of(accuracies, **more):
    return pd.DataFrame([{"method": m, "column": c, "accuracy": a, **more} for (m, c), a in accuracies.items()])


OURS = {("mine", "test"): 0.5, ("mine", SHIFT_MEAN): 0.25, ("new", "test"): 0.75, ("new", SHIFT_MEAN): 0.5}
ROWS = {"mine": "second_best"}
TITLES = {"test": "Test", SHIFT_MEAN: "Mean of shifts"}
COLUMNS = {"test": "test", SHIFT_MEAN: SHIFT_MEAN}


def test_every_table_with_numbers_is_there():
    assert {path.stem for path in PAPER.glob("*.csv")} == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_line_is_one_number_with_a_source_and_a_confidence(name):
    table = paper_table(name)
    assert list(table.columns) == ["table", "row", "column", "value", "spread", "unit", "source", "confidence"]
    assert set(table["table"]) == {name}
    assert not table.duplicated(["row", "column"]).any()
    assert table["value"].between(0, 100).all()
    assert table.drop(columns="spread").notna().all(axis=None)
    assert set(table["confidence"]) <= {"H", "M", "L"}
    assert "H" not in set(table.loc[table["source"].str.contains("memory"), "confidence"])


def test_rows_and_columns_are_called_as_in_our_own_tables():
    assert set(paper_table("table3")["row"]) <= set(NAMES)
    assert set(paper_table("table4")["column"]) <= {
        *load("table4_vitg").task.reported,
        SHIFT_MEAN,
        "real",
        "multilabel",
    }


@pytest.mark.parametrize(("name", "rows"), [("table4", 4), ("tablec1", 1)])
def test_the_five_shifts_average_to_the_printed_mean(name, rows):
    # But an oracle's: its mean is of the one model that is best in the mean.
    whole = wide(name).dropna(subset=SHIFTS).drop(index="oracle", errors="ignore")
    assert len(whole) == rows
    np.testing.assert_allclose(whole[SHIFTS].mean(axis=1), whole[SHIFT_MEAN], atol=0.01)


def test_table_1_repeats_table_4():
    short = paper_table("table1")
    both = short.merge(paper_table("table4"), on=["row", "column"])
    assert len(both) == len(short)
    assert both["value_x"].equals(both["value_y"])


def test_10_of_20_greedy_soups_of_texts_gain_and_no_uniform_one_does():
    table = wide("tablej1")[GLUE]
    scores = {method: table.filter(like=f"/{method}", axis=0).to_numpy() for method in ("best", "uniform", "greedy")}
    assert scores["greedy"].shape == (5, 4)
    assert (scores["greedy"] > scores["best"]).sum() == wide("headlines").loc["text", "greedy above best, of 20"] == 10
    assert (scores["uniform"] <= scores["best"]).all()


def test_tables_that_share_rows_agree():
    for short, long in (("table5", "tablej1"), ("tablel2", "tablel1")):
        both = paper_table(short).merge(paper_table(long), on=["row", "column"])
        assert len(both) == 16
        assert both["value_x"].equals(both["value_y"])


def test_ours_stand_beside_the_papers_cell_with_the_difference_in_points():
    compared = beside(ours_of(OURS), "table3", ROWS, COLUMNS).set_index(["method", "column"])
    cell = compared.loc[("mine", SHIFT_MEAN)]
    assert (cell["ours"], cell["paper"], cell["minus_paper"]) == (25, 43.87, pytest.approx(-18.87))
    assert cell["confidence"] == "M"
    alone = compared.loc[("new", "test")]
    assert alone["ours"] == 75
    assert pd.isna(alone["paper"])
    assert alone["source"] == ""
    assert beside(ours_of(OURS), "table3", {"mine": "gredy"}, COLUMNS)["paper"].isna().all()


def test_a_column_that_the_paper_has_not_keeps_ours_alone():
    table = beside_table(beside(ours_of(OURS), "table3", ROWS, {"test": "test"}), TITLES).set_index("Method")
    assert list(table.columns) == ["Test", "Test, paper", "Test − paper", "Mean of shifts"]
    assert table.loc["mine"].tolist() == ["50.00", "79.89†", "-29.89", "25.00"]
    assert table.loc["new"].tolist() == ["75.00", "", "", "50.00"]


def test_a_method_without_a_column_has_an_empty_cell_there():
    ours = ours_of({key: value for key, value in OURS.items() if key != ("new", SHIFT_MEAN)})
    table = beside_table(beside(ours, "table3", ROWS, COLUMNS), TITLES).set_index("Method")
    assert table.loc["new"].tolist() == ["75.00", "", "", "", "", ""]


def test_spreads_of_ours_and_the_papers_stand_in_brackets():
    ours = ours_of({("mine", "test"): 0.8}, spread=0.004)
    row = beside_table(beside(ours, "table3", {"mine": "greedy_random_order"}, {"test": "test"}), TITLES).iloc[0]
    assert row["Test"] == "80.00 (0.40)"
    assert row["Test, paper"] == "80.79 (0.05)"


def test_no_difference_has_no_sign_of_less():
    ours = ours_of({("mine", "test"): 0.81028})  # 0.002 points below the paper
    row = beside_table(beside(ours, "table3", {"mine": "greedy"}, {"test": "test"}), TITLES).iloc[0]
    assert row["Test − paper"] == "+0.00"


def test_the_caption_explains_the_marks_that_the_table_has():
    low = beside(ours_of({("mine", "test"): 0.8}), "tablel3", {"mine": "Soup of SAM"}, {"test": "test"})
    assert "‡ low" in legend(low)
    assert "†" not in legend(low)


def test_marks_are_written_as_latex_commands(tmp_path):
    compared = beside(ours_of(OURS), "table3", ROWS, COLUMNS)
    _, latex, csv = write_cells(beside_table(compared, TITLES), compared, tmp_path / "t", legend(compared))
    assert r"79.89\dag{}" in latex.read_text()
    assert latex.read_text().isascii()
    assert pd.read_csv(csv)["paper"].tolist()[:2] == [79.89, 43.87]


def test_the_readme_explains_every_source():
    readme = (PAPER / "README.md").read_text()
    explained = [line.split("|")[1].strip() for line in readme.splitlines() if line.startswith("| ")]
    for name in TABLES:
        for source in paper_table(name)["source"]:
            first = source.removeprefix("as in Table 5: ").removeprefix("as in Table L.1: ").split("; ")[0]
            assert any(first.startswith(known) for known in explained), source


def test_a_table_that_is_missing_is_told_with_what_brings_it_back(monkeypatch, tmp_path):
    monkeypatch.setattr("analysis.tables.paper.PAPER", tmp_path)
    with pytest.raises(UserError, match=r"table3\.csv is missing: git checkout results/paper"):
        paper_table("table3")
