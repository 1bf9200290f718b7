"""Tables and figures say what the numbers say."""

from dataclasses import replace

import pandas as pd
import pytest

from analysis.figures.pool import BARS, DRAWN_WITH_BARS, draw_coefficients, draw_scatter
from analysis.figures.style import STYLE, save
from analysis.measure.methods import SHIFT_MEAN
from analysis.measure.mixtures import axis_labels
from analysis.tables.cells import BEST, NAMES, caption, table3, write_cells
from analysis.tables.table3 import note, seeds_table
from configs.schema import load

TASK = load("demo").task
METHODS = {"best": 0.53, "greedy": 0.586}


def tidy_of(accuracies):
    rows = []
    for method, accuracy in accuracies.items():
        for column, value in (("test", accuracy), ("v2", accuracy - 0.1), (SHIFT_MEAN, accuracy - 0.1)):
            gain = accuracy - accuracies["best"]
            rows.append(
                {
                    "method": method,
                    "models": 1,
                    "held_out": 0.6,
                    "column": column,
                    "n": 620,
                    "accuracy": value,
                    "spread": 0.004 if method == "greedy_random_order" else float("nan"),
                    "difference": gain,
                    "low": gain - 0.03,
                    "high": gain + 0.03,
                }
            )
    return pd.DataFrame(rows)


def test_a_row_shows_percent_and_the_difference_to_the_best_with_its_interval():
    table = table3(tidy_of(METHODS), TASK).set_index("Method")
    greedy = table.loc["Greedy soup"]
    assert (greedy["Test"], greedy["Mean of shifts"]) == ("58.6", "48.6")
    assert greedy["Test − best"] == "+5.6 [+2.6, +8.6]"
    assert table.loc["Best individual model", "Test − best"] == ""


@pytest.mark.parametrize(
    ("experiment", "shifts", "named"),
    [
        ("demo", "v2 r sketch objectnet a", "V2 R Sketch ObjectNet-like A-like"),
        ("table4_vitg", "v2 r sketch objectnet a", "IN-V2 IN-R IN-Sketch ObjectNet IN-A"),
        ("figureg2_cifar10", "cifar10_1", "CIFAR-10.1"),
        ("figureg1_fmow", "ood", "OOD"),
    ],
)
def test_columns_are_called_as_their_task_says(experiment, shifts, named):
    task = load(experiment).task
    row = {"method": "best", "models": 1, "held_out": 0.6, "n": 9, "accuracy": 0.5, "spread": float("nan")}
    row |= {"difference": 0.0, "low": 0.0, "high": 0.0}
    tidy = pd.DataFrame([row | {"column": column} for column in ("test", *shifts.split(), SHIFT_MEAN)])
    heads = " ".join(table3(tidy, task).columns)
    assert f"Test {named} Mean of shifts" in heads
    assert f"Test 9, {', '.join(f'{name} 9' for name in named.split())}." in caption(tidy, "", "it", task)


def test_a_benchmark_is_called_by_its_title_wherever_its_folder_is(monkeypatch):
    monkeypatch.setenv("IMAGENET", "/scratch/ilsvrc")
    config = load("table3_clip_b32")
    assert note(config).startswith("Benchmark ImageNet; ")
    assert list(axis_labels(config).values()) == [
        "ImageNet test, top-1 accuracy (%)",
        "Mean of 5 shifts, top-1 accuracy (%)",
    ]
    named = replace(config.task, title=None, titles={"test": "Validation", "v2": "Version 2"})
    assert (named.name, named.split_title("test"), named.split_title("v2")) == ("ilsvrc", "Validation", "Version 2")


def test_every_recipe_has_a_name_and_every_drawn_one_a_marker():
    for recipe in load("demo").recipes:
        assert recipe in NAMES
    assert set(DRAWN_WITH_BARS) | {"best", "initialisation", "individual"} == set(STYLE)


def test_random_orders_show_their_standard_deviation():
    table = table3(tidy_of(METHODS | {"greedy_random_order": 0.57}), TASK).set_index("Method")
    assert table.loc["Greedy soup (random order)", "Test"] == "57.0 (0.4)"
    assert table.loc["Greedy soup", "Test"] == "58.6"


def test_the_map_of_coefficients_has_a_row_for_each_group_and_a_column_for_each_model():
    shares = pd.DataFrame({"group": ["stem", "blocks.0", "head"], "row 0": [0.2, 0.5, 0.1], "row 1": [0.8, 0.5, 0.9]})
    axes = draw_coefficients(load("demo"), shares).axes[0]
    assert axes.images[0].get_array().shape == (3, 2)
    assert axes.images[0].get_array()[2, 1] == pytest.approx(90)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stem", "blocks.0", "head"]


def test_a_table_is_written_as_markdown_latex_and_csv_with_n_and_proxies(tmp_path):
    tidy = tidy_of(METHODS)
    text = caption(tidy, "A proxy for ImageNet.", BEST, TASK)
    files = write_cells(table3(tidy, TASK), tidy, tmp_path / "table3", text)
    markdown, latex, csv = (file.read_text() for file in files)
    assert "| Greedy soup" in markdown
    assert "n: Test 620, V2 620" in markdown
    assert "A proxy for ImageNet." in markdown
    assert r"\toprule" in latex
    assert r"Top-1 accuracy in \%" in latex
    assert "−" not in latex
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table3.csv"), tidy)
    assert csv.count("\n") == 7


def test_seeds_are_summarised_by_mean_spread_and_how_often_the_interval_excludes_zero():
    tables = {0: tidy_of(METHODS), 1: tidy_of({"best": 0.53, "greedy": 0.55})}
    row = seeds_table(tables, TASK).set_index("Method").loc["Greedy soup"]
    assert row["Test"] == "56.8 (2.5)"
    assert row["Test − best, per seed"] == "+5.6, +2.0"
    assert row["Test: interval above 0"] == "1 of 2"


POINTS = pd.DataFrame(
    [
        ["row 1", "individual", 0.5, 0.4, *[float("nan")] * 4],
        ["best", "best", 0.53, 0.43, *[float("nan")] * 4],
        ["greedy", "greedy", 0.586, 0.45, 0.02, 0.08, 0.01, 0.03],
    ],
    columns=["name", "kind", "test", "shift_mean", *BARS],
)


@pytest.fixture(scope="module")
def drawing():
    return draw_scatter(load("demo"), POINTS)


def test_points_without_intervals_are_drawn_without_bars_and_without_a_word_of_them():
    figure = draw_scatter(load("demo"), POINTS.drop(columns=BARS))
    assert not figure.axes[0].lines
    assert figure.legends[0].get_title().get_text() == ""


def test_equal_figures_are_equal_files(drawing, tmp_path):
    first = [path.read_bytes() for path in save(drawing, tmp_path / "a")]
    second = [path.read_bytes() for path in save(drawing, tmp_path / "b")]
    assert first == second
    assert first[0].startswith(b"%PDF")
    assert first[1].startswith(b"\x89PNG")


def test_axes_say_what_a_task_is_scored_by():
    axes = draw_scatter(load("figureg1_iwildcam"), POINTS).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("WILDS-iWildCam test, macro F1 (%)", "OOD, macro F1 (%)")
