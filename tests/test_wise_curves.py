"""WiSE-FT curves begin at the initialisation, end at each model, and are the interpolation in between."""

import pytest
import torch

from analysis.artefacts import write_artefact
from analysis.figures.curves import ALPHAS, ends_of, measure_wise
from analysis.measure.methods import SHIFT_MEAN
from configs.errors import UserError
from configs.schema import load
from soups.experiment.pool import usable_pool
from soups.experiment.soups import make_soup
from tests.pools import finished_pool, recorded_pool

pytestmark = pytest.mark.usefixtures("in_process")

SOUPS = ("recipes=[best,uniform,greedy]", "sweep.rows=2", "cluster.workers=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config, evaluator = finished_pool(tmp_path_factory.mktemp("runs"), *SOUPS)
    with pytest.raises(UserError, match="recipe=uniform first"):
        write_artefact("figured1", [config])
    for recipe in config.recipes:
        make_soup(recipe, evaluator)
    return config, evaluator


@pytest.fixture(scope="module")
def table(finished):
    return measure_wise(finished[0])


def accuracy(evaluator, weights, split="test"):
    return evaluator.hits(evaluator.fresh_logits(weights, split), split).double().mean().item()


def at(table, end, alpha, column="test"):
    rows = table[(table["end"] == end) & (table["alpha"] == alpha) & (table["column"] == column)]
    return rows.iloc[0]["accuracy"]


@pytest.mark.slow
def test_there_is_a_curve_to_every_fine_tuned_model_and_to_both_soups(finished, table):
    assert list(table["end"].unique()) == ["row 1", "row 2", "uniform", "greedy"]
    assert sorted(table["alpha"].unique()) == list(ALPHAS) == [i / 10 for i in range(11)]


@pytest.mark.slow
def test_curves_start_at_the_initialisation_end_at_the_model_and_are_weighted_means_between(finished, table):
    config, evaluator = finished
    start, end = (each.load() for each in usable_pool(config)[:2])
    assert at(table, "row 1", 0.0) == at(table, "uniform", 0.0) == accuracy(evaluator, start)
    assert at(table, "row 1", 1.0) == accuracy(evaluator, end)
    mix = {n: (0.3 * end[n].double() + 0.7 * start[n].double()).to(end[n].dtype) for n in end}
    assert at(table, "row 1", 0.3) == accuracy(evaluator, mix)
    soup = ends_of(config)[2].load()
    assert at(table, "uniform", 1.0) == accuracy(evaluator, soup)


@pytest.mark.slow
def test_the_difference_is_to_the_end_of_the_curve(table):
    row = table[(table["end"] == "row 2") & (table["alpha"] == 0.5) & (table["column"] == SHIFT_MEAN)].iloc[0]
    assert row["difference"] == pytest.approx(row["accuracy"] - at(table, "row 2", 1.0, SHIFT_MEAN))
    assert table[table["alpha"] == 1]["difference"].eq(0).all()


@pytest.mark.slow
def test_models_are_coloured_by_their_augmentation_only_where_the_sweep_varies_it(finished, tmp_path):
    config, _ = finished  # rows 1 and 2 draw the same kind
    varied = load("demo_grid_zeroshot", f"paths.runs={tmp_path}", "recipes=[best]")
    recorded_pool(varied)
    assert {end.group for end in ends_of(varied)} == {"minimal", "medium", "rand"}
    assert {end.group for end in ends_of(config)} == {"individual", "uniform", "greedy"}


@pytest.mark.slow
def test_its_files_are_written_without_reading_weights_again(finished, table):
    config, _ = finished
    for each in usable_pool(config):
        torch.testing.assert_close(each.load(), each.load())
        (each.folder / "weights.safetensors").rename(each.folder / "away")
    try:
        files = write_artefact("figured1", [config])
    finally:
        for each in usable_pool(config):
            (each.folder / "away").rename(each.folder / "weights.safetensors")
    assert [file.name for file in files] == ["figured1.pdf", "figured1.png", "figured1.csv"]
