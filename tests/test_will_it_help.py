"""How often soups help: shares and checks on planted pools, and the committed table from the committed files."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.claims import resampled
from analysis.will_it_help import (
    NOISE,
    OUTCOMES,
    TABLES,
    held_back,
    improvement,
    jeffreys,
    read_lines,
    reliability,
    rows_of,
    share,
    table_of,
    with_error,
    write_will_it_help,
)
from configs.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "results/measured"


@pytest.fixture(scope="module")
def lines():
    return read_lines(MEASURED)


@pytest.fixture(scope="module")
def predicted(lines):
    return held_back(lines)


def planted(better, pools=6, each=8):
    """Pools in which the soups are better where `better` says so of the numbers of pool and sub-pool."""
    rows = []
    for pool in range(pools):
        for number in range(each):
            row = {"pool": f"p{pool}", "what": "", "models": 10, "held-out examples": 500, "best score": 0.6}
            row |= {"best minus median score": 0.01 * number}
            rows.append(row | {" ".join(each): NOISE + (0.1 if better(pool, number) else -0.1) for each in OUTCOMES})
    return pd.DataFrame(rows)


def test_the_committed_table_is_what_the_command_makes_of_the_committed_files(lines, predicted):
    kept = json.loads((ROOT / "soups/will_it_help.json").read_text())
    assert len(kept.pop("commit")) == 40
    assert kept == json.loads(json.dumps(table_of(lines, predicted)))
    numbers = rows_of(lines, predicted)
    pd.testing.assert_frame_equal(pd.read_csv(MEASURED / "will_it_help.csv"), numbers, check_dtype=False, atol=1e-6)


def test_the_page_has_the_table_that_the_command_prints():
    printed = (MEASURED / "will_it_help.md").read_text(encoding="utf-8").split("\n\n")[0]
    assert f"<!-- will_it_help -->\n{printed}\n\n" in (ROOT / "docs/will-it-help.md").read_text(encoding="utf-8")


def test_scores_of_older_pools_are_counts_of_the_held_out_images_that_are_said():
    for name, (_, held_out) in TABLES.items():
        for file in MEASURED.glob(f"{name}_seed*_figure1.csv"):
            models = pd.read_csv(file)
            right = held_out * models.loc[models["kind"] == "individual", "held_out"]
            np.testing.assert_allclose(right, right.round(), atol=1e-4)


def test_a_line_of_a_whole_pool_has_its_models_scores_and_its_soups_gain(lines):
    row = lines[(lines["pool"] == "demo_seeds_seed0")].iloc[0]
    assert (row["models"], row["held-out examples"]) == (13, 596)  # with the initialisation
    assert row["best score"] == pytest.approx(0.42281879)
    assert row["greedy test"] == pytest.approx(0.03225806 / ((0.05967742 - 0.00483871) / 3.92))
    swapped = lines[lines["what"] == "all models, test selects"].iloc[0]
    assert (swapped["models"], swapped["held-out examples"]) == (72, 615)


def test_a_pool_without_held_out_scores_counts_in_the_base_rate_alone(lines, predicted):
    (row,) = lines[lines["pool"] == "demo_grid_lp"].to_dict("records")
    assert row["models"] == 13 and np.isnan(row["best score"])
    assert row["greedy shifts"] == pytest.approx(3.92 * 0.01383904 / (0.02453596 - 0.00312934))
    of_pool = predicted[predicted["pool"] == "demo_grid_lp"]
    assert of_pool["features"].isna().all() and of_pool["base rate"].notna().all()
    without = lines[lines["pool"] != "demo_grid_lp"]
    others = predicted["pool"] != "demo_grid_lp"
    assert held_back(without)["features"].tolist() == predicted.loc[others, "features"].tolist()
    assert held_back(without)["base rate"].tolist() != predicted.loc[others, "base rate"].tolist()


def test_the_error_of_a_difference_is_that_of_a_bootstrap_over_classes():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 4, (3, 80))  # classes of several sizes, some absent from a split
    found = np.stack([generator.integers(-1, 2, (3, 80)) * counts * generator.random(80), counts], axis=1)
    difference, error = with_error(found)
    mean, draws = resampled([found[None]], 4000, 0)
    assert difference == pytest.approx(mean)
    assert error == pytest.approx(draws.std(), rel=0.05)


def test_a_pool_counts_once_however_many_sub_pools_it_has():
    few = planted(lambda pool, number: pool < 2, each=1)
    many = pd.concat([few, *[few[few["pool"] == "p0"]] * 99])
    assert share(few, OUTCOMES[0]) == share(many, OUTCOMES[0]) == jeffreys(2, 6)


def test_what_came_of_a_pool_has_no_say_in_its_prediction(lines, predicted):
    other = lines.copy()
    chosen = other["pool"] == "demo_seeds_seed1"
    other.loc[chosen, [" ".join(each) for each in OUTCOMES]] *= -1
    again = held_back(other)
    rows, how = predicted["pool"] == "demo_seeds_seed1", ["base rate", "features"]
    pd.testing.assert_frame_equal(again.loc[rows, how], predicted.loc[rows, how])
    assert not again.loc[rows, "better"].equals(predicted.loc[rows, "better"])


def test_texts_have_no_say_in_what_is_said_of_images(lines, predicted):
    other = lines.copy()
    chosen = other["pool"].str.startswith("demo_text")
    assert chosen.sum() == 3
    other.loc[chosen, [" ".join(each) for each in OUTCOMES]] = 9.0
    assert table_of(other, held_back(other)) == table_of(lines, predicted)


def test_features_are_found_to_predict_where_they_do_and_not_where_pools_differ_by_chance():
    gain, error = improvement(held_back(planted(lambda pool, number: number > 3)))
    assert gain > 0.05 > 2 * error
    lines = planted(lambda pool, number: pool % 2)
    predicted = held_back(lines)
    gain, error = improvement(predicted)
    assert gain < 2 * error + 1e-9
    assert "do not predict better" in table_of(lines, predicted)["note"]


def test_a_reliability_diagram_compares_shares_with_what_was_predicted():
    frame = pd.DataFrame({"pool": list("aabb"), "base rate": [0.1, 0.1, 0.1, 0.9], "better": [0, 1, 0, 1]})
    found = reliability(frame, "base rate")
    assert found["predicted"].tolist() == pytest.approx([0.1, 0.9])
    assert found["observed"].tolist() == [0.25, 1]  # of a 1 in 2, of b none
    assert found["pools"].tolist() == [2, 1]
    assert (found["low"][0], found["high"][0]) == jeffreys(0.5, 2)[1:]


def test_one_pool_is_too_few_to_hold_one_back(tmp_path):
    for suffix in ("table3", "figure1"):
        name = f"demo_seeds_seed0_{suffix}.csv"
        (tmp_path / name).write_bytes((MEASURED / name).read_bytes())
    with pytest.raises(UserError, match="fewer than two pools"):
        write_will_it_help(tmp_path, tmp_path / "table.json")
    name = "demo_seeds_seed1_"
    for suffix in ("table3", "figure1"):
        (tmp_path / f"{name}{suffix}.csv").write_bytes((MEASURED / f"{name}{suffix}.csv").read_bytes())
    files = write_will_it_help(tmp_path, tmp_path / "table.json")
    assert all(file.exists() for file in files) and len(files) == 7
