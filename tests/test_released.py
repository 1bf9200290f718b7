"""Table 3 and Figure 1 of the authors' released models say what they published."""

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.measure.methods import SHIFT_MEAN
from analysis.released import (
    REPORTED,
    SIZES,
    by_held_out,
    read,
    released_numbers,
    released_points,
    released_table,
    released_tidy,
    write_released,
)
from configs.errors import UserError

PUBLISHED = Path(__file__).resolve().parents[2] / "shared/reference/released"
COLUMNS = {
    "ImageNet2p": "held_out",
    "ImageNet": "test",
    "ImageNetV2": "v2",
    "ImageNetR": "r",
    "ImageNetSketch": "sketch",
    "ObjectNet": "objectnet",
    "ImageNetA": "a",
}
there = pytest.mark.skipif(not PUBLISHED.exists(), reason="the authors' files are not here")


def published(name):
    lines = (PUBLISHED / f"{name}_results.jsonl").read_text().splitlines()
    return {
        row.pop("model_name"): {COLUMNS[key]: value for key, value in row.items()} for row in map(json.loads, lines)
    }


@there
def test_individual_results_are_the_authors_to_the_last_digit():
    ours = read("individual").set_index("model")[list(SIZES)]
    assert ours.to_dict("index") == published("individual_model")


@there
@pytest.mark.parametrize("soup", ["uniform", "greedy"])
def test_soups_are_the_authors_to_the_last_digit(soup):
    ours = read("soups").set_index("method").loc[soup, list(SIZES)]
    assert ours.to_dict() == published(f"{soup}_soup")[f"{soup}_soup"]


def test_every_accuracy_is_a_whole_number_of_images():
    exact = pd.concat([read("individual"), read("soups").query("method in ['uniform', 'greedy']")])
    assert len(exact) == 74
    for column, n in SIZES.items():
        counts = exact[column] * n
        assert (counts - counts.round()).abs().max() < 1e-6, column


def test_table_3_chooses_model_43_on_held_out_and_has_the_published_and_the_papers_numbers():
    table = released_table().set_index("Method")
    columns = ["ImageNet", "ImageNet, paper", "Mean of shifts", "Mean of shifts, paper"]
    assert table.loc["Best individual model", "Model"] == "model_43"
    assert table.loc["Best individual model", columns].tolist() == ["80.39", "80.38", "47.97", "47.83"]
    assert table.loc["Second best model", columns].tolist() == ["79.89", "79.89†", "43.99", "43.87†"]
    assert table.loc["Uniform soup", columns].tolist() == ["79.97", "79.97", "51.58", "51.45"]
    assert table.loc["Greedy soup", columns].tolist() == ["81.03", "81.03", "50.86", "50.75"]
    assert table.loc["Ensemble", columns].tolist() == ["81.19", "81.19", "50.88", "50.77"]


def test_the_choice_looks_at_held_out_alone():
    toy = pd.DataFrame(
        {
            "model": ["model_0", "good on test", "good on held-out"],
            "held_out": [0.5, 0.6, 0.7],
            **{column: [0.5, 0.9, 0.4] for column in REPORTED},
        }
    )
    chosen = by_held_out(toy).set_index("method")["model"]
    assert chosen.to_dict() == {"initialisation": "model_0", "best": "good on held-out", "second_best": "good on test"}


def test_the_offset_to_the_paper_is_as_the_note_says():
    numbers = released_numbers().dropna(subset="minus_paper")
    off = numbers.set_index(["method", "column"])["minus_paper"].unstack()
    assert off["test"].abs().max() < 0.0101
    assert off[SHIFT_MEAN].dropna().round(2).between(0.11, 0.14).all()
    assert len(off[SHIFT_MEAN].dropna()) == 5


def test_there_is_no_mean_of_shifts_where_one_is_missing(tmp_path):
    read("soups").assign(a=float("nan")).to_csv(tmp_path / "soups.csv", index=False)
    assert read("soups", tmp_path)[SHIFT_MEAN].isna().all()


def test_what_was_not_published_is_empty():
    learned = released_tidy().query("method == 'learned_by_tensor'").set_index("column")["accuracy"]
    assert learned["test"] == 0.8138
    assert learned.drop("test").isna().all()


def test_figure_1_has_the_71_models_their_initialisation_and_what_was_made_of_them():
    points = released_points()
    kinds = points["kind"].value_counts().to_dict()
    assert kinds == {"individual": 71, "initialisation": 1, "best": 1, "uniform": 1, "greedy": 1, "ensemble": 1}
    assert points.notna().all(axis=None)
    best = points.set_index("kind").loc["best"]
    assert (best["name"], best["test"]) == ("model_43", 0.80386)


def test_table_and_figure_are_written_and_open(tmp_path):
    files = {path.name: path for path in write_released(tmp_path)}
    assert set(files) == {
        *(f"table3_released.{suffix}" for suffix in ("md", "tex", "csv")),
        *(f"figure1_released.{suffix}" for suffix in ("pdf", "png", "csv")),
    }
    text = files["table3_released.md"].read_text()
    assert "0.11 to 0.14 points higher" in text
    assert files["table3_released.tex"].read_text().isascii()
    assert files["figure1_released.png"].read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(files["figure1_released.csv"])) == 76


@pytest.mark.parametrize("content", [None, "model,held_out\nmodel_0,0.5\n", "\x00"])
def test_a_missing_or_damaged_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "individual.csv").write_text(content)
    with pytest.raises(UserError, match=r"individual\.csv"):
        read("individual", tmp_path)
