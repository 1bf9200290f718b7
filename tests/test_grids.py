"""One-dimensional grids: the average of the ends against the best in between."""

import pytest

from analysis.artefacts import write_artefact
from analysis.figures.pairs import best_in_range, grids_of, measure_grids
from configs.errors import UserError
from soups.files.atomic import read_json, write_json
from store.runs import RunFolder
from tests.pools import finished_pool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]  # a pool is evaluated

LABELS = "analysis.labels=[high,middle,low]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = (LABELS, "+analysis.sets.rate=[1,2,3]", "+analysis.sets.two=[3,1]", "cluster.workers=1")
    return finished_pool(tmp_path_factory.mktemp("runs"), *settings)


@pytest.fixture(scope="module")
def table(finished):
    return measure_grids(finished[0])


def accuracy(evaluator, weights):
    return evaluator.hits(evaluator.fresh_logits(weights, "test"), "test").double().mean().item()


def test_grids_are_the_experiments_sets_in_their_order_with_every_pair_of_ends(finished, table):
    assert [(grid.name, grid.labels) for grid in grids_of(finished[0])] == [
        ("rate", ("high", "middle", "low")),
        ("two", ("low", "high")),
    ]
    drawn = table[(table["grid"] == "rate") & (table["column"] == "test")]
    assert list(zip(drawn["first"], drawn["last"], strict=True)) == [
        ("high", "middle"),
        ("high", "low"),
        ("middle", "low"),
    ]


def test_a_cell_is_the_average_of_the_ends_minus_the_best_from_one_end_to_the_other(finished, table):
    config, evaluator = finished
    models = [grids_of(config)[0].members[i].load() for i in range(3)]
    singles = [accuracy(evaluator, weights) for weights in models]
    one, _, two = models
    average = accuracy(evaluator, {n: ((one[n].double() + two[n].double()) / 2).to(one[n].dtype) for n in one})
    cell = table[(table["i"] == 0) & (table["j"] == 2) & (table["column"] == "test")].iloc[0]
    assert cell["average"] == average
    assert cell["best_accuracy"] == max(singles)
    assert cell["difference"] == pytest.approx(average - max(singles))
    assert cell["low"] <= cell["difference"] <= cell["high"]


def test_the_best_is_looked_for_between_the_ends_and_not_beyond():
    accuracies = [0.9, 0.5, 0.6, 0.8]
    assert [best_in_range(accuracies, i, j) for i, j in ((1, 2), (0, 2), (1, 3), (2, 2))] == [2, 0, 3, 2]
    assert best_in_range([0.5, 0.7, 0.7], 0, 2) == 1  # of equals the first


def test_a_row_that_diverged_is_no_end_and_a_grid_of_one_is_none(finished, tmp_path):
    config, _ = finished
    file = RunFolder.of(config).ingredient(1) / "done.json"
    done = read_json(file)
    write_json(file, done | {"status": "diverged"})
    try:
        assert [grid.labels for grid in grids_of(config)] == [("middle", "low")]
    finally:
        write_json(file, done)


def test_a_random_search_is_no_grid(tmp_path):
    config, _ = finished_pool(tmp_path)
    with pytest.raises(UserError, match="name the rows of one in"):
        grids_of(config)


def test_a_sweep_without_sets_is_one_grid_named_by_what_varies(tmp_path):
    config, _ = finished_pool(tmp_path, "sweep.grid.optim.seed=[4,7]", experiment="demo_seeds_only")
    assert [(grid.name, grid.labels) for grid in grids_of(config)] == [("grid", ("4", "7"))]


def test_its_files_are_written(finished):
    names = [file.name for file in write_artefact("figuref1", [finished[0]])]
    assert names == ["figuref1.pdf", "figuref1.png", "figuref1.csv"]


def test_a_row_that_two_grids_share_is_named_by_what_varies_in_the_second(tmp_path):
    config, _ = finished_pool(tmp_path, experiment="demo_grids", classes=2)
    assert {grid.name: grid.labels for grid in grids_of(config)} == {
        "optimiser": ("SGD", "RMSProp", "Adam", "AdamW"),
        "augmentation": ("minimal", "medium", "strong"),
        "learning rate": ("1e-2", "3e-3", "1e-3", "3e-4", "1e-4"),
    }
