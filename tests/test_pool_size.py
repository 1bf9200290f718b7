"""Curves over the number of models considered: Recipe 1 over every prefix, cheaply, and ends that must agree."""

import pandas as pd
import pytest
import torch

from analysis.artefacts import write_artefact
from analysis.figures.pool_size import best_of_first, draw_pool_size, greedy_of_first, measure_pool_size, orders_of
from analysis.measure.methods import SHIFT_MEAN
from analysis.measure.mixtures import mean_mixture
from soups.experiment.pool import ingredients_of
from soups.recipes import greedy
from store.runs import RunFolder
from tests.pools import finished_pool

pytestmark = pytest.mark.usefixtures("in_process")

VALUES = [0.7, 1.2, 0.9, 1.05, 0.4, 1.05]
HELD_OUT = [1 - abs(value - 1) for value in VALUES]


def model(value):
    return lambda: {"w": torch.tensor([value], dtype=torch.float64)}


def closeness(weights):
    return 1 - abs(weights["w"].item() - 1)


class Scores:
    """Accuracy of a set of one-weight models, which counts how often it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, chosen):
        self.asked.append(chosen)
        return 1 - abs(sum(VALUES[i] for i in chosen) / len(chosen) - 1)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0, 3, 1, 4]])
@pytest.mark.parametrize("ties", ["keep", "drop"])
def test_each_prefix_keeps_what_recipe_1_keeps_of_it(order, ties):
    found = greedy_of_first(order, HELD_OUT, Scores(), ties)
    for k, kept in enumerate(found, 1):
        first = sorted(order[:k])
        soup = greedy([model(VALUES[i]) for i in first], [HELD_OUT[i] for i in first], closeness, ties=ties)
        assert kept == tuple(first[i] for i in soup.ingredients)


def test_no_set_is_scored_twice_and_a_rejected_newcomer_costs_one_look():
    # Best first 0.9, 1.2, 0.7: their means 1.05 and then 0.933 keep the first two. 0.4, the worst, is tried once.
    scores = Scores()
    assert greedy_of_first([2, 1, 0, 4], HELD_OUT, scores) == [(2,), (2, 1), (2, 1), (2, 1)]
    assert scores.asked == [(2, 1), (2, 1, 0), (2, 1, 4)]


def test_the_best_so_far_is_chosen_on_held_out_and_of_equals_the_first_of_the_pool():
    assert best_of_first([3, 1, 0], [0.5, 0.4, 0.9, 0.5]) == [3, 3, 0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_pool(tmp_path_factory.mktemp("runs"), "cooking.orders=2", "cluster.workers=1")


@pytest.fixture(scope="module")
def table(finished):
    return measure_pool_size(finished[0])


def cell(table, order, method, considered, column="test"):
    rows = table[(table["order"] == order) & (table["method"] == method)]
    return rows[(rows["considered"] == considered) & (rows["column"] == column)].iloc[0]


@pytest.mark.slow
def test_of_one_model_all_methods_are_that_model_and_of_all_models_the_order_does_not_matter(finished, table):
    size = len(ingredients_of(finished[0]))
    for order in ("0", "1"):
        first = table[(table["order"] == order) & (table["considered"] == 1)]
        assert first.groupby("column")["accuracy"].nunique().eq(1).all()
    last = table[table["considered"] == size]
    assert last.groupby(["method", "column"])["accuracy"].nunique().eq(1).all()
    one, two = orders_of(finished[0], size)
    assert one != two


@pytest.mark.slow
def test_uniform_soup_and_ensemble_of_the_first_k_are_the_means_of_weights_and_of_logits(finished, table):
    config, evaluator = finished
    pool = ingredients_of(config)
    first = [pool[i] for i in orders_of(config, len(pool))[1][:3]]
    loaded = [each.load() for each in first]
    mean = {name: torch.stack([each[name].double() for each in loaded]).mean(0).float() for name in loaded[0]}
    right = evaluator.hits(evaluator.fresh_logits(mean, "test"), "test")
    assert cell(table, "1", "uniform", 3)["accuracy"] == right.double().mean().item()
    logits = torch.stack([evaluator.fresh_logits(each, "test") for each in loaded]).mean(0)
    assert cell(table, "1", "ensemble", 3)["accuracy"] == evaluator.hits(logits, "test").double().mean().item()
    assert cell(table, "1", "ensemble", 3)["models"] == 3
    assert cell(table, "1", "uniform", 3)["models"] == 1


@pytest.mark.slow
def test_the_mean_is_over_orders_and_its_difference_is_to_the_best_of_as_many(table):
    for column in ("test", SHIFT_MEAN):
        mean = cell(table, "mean", "uniform", 2, column)
        own = [cell(table, order, "uniform", 2, column)["accuracy"] for order in ("0", "1")]
        assert mean["accuracy"] == pytest.approx(sum(own) / 2)
        assert mean["difference"] == pytest.approx(
            mean["accuracy"] - cell(table, "mean", "best", 2, column)["accuracy"]
        )
        assert mean["low"] <= mean["difference"] <= mean["high"]


@pytest.mark.slow
def test_it_is_drawn_where_a_metric_has_no_intervals(finished, table):
    nan = float("nan")
    figure = draw_pool_size(finished[0], table.assign(low=nan, high=nan))
    assert [len(axes.lines) for axes in figure.axes] == [15, 15, 5, 5]


@pytest.mark.slow
def test_a_second_call_reads_no_weights_and_writes_the_same_numbers(finished, table):
    config, _ = finished
    for each in ingredients_of(config):
        (each.folder / "weights.safetensors").rename(each.folder / "away")
    try:
        pd.testing.assert_frame_equal(measure_pool_size(config), table)
        files = write_artefact("figureh1", [config])
    finally:
        for each in ingredients_of(config):
            (each.folder / "away").rename(each.folder / "weights.safetensors")
    assert [file.name for file in files] == ["figureh1.pdf", "figureh1.png", "figureh1.csv"]
    assert files[0].parent == RunFolder.of(config).analysis


@pytest.mark.slow
def test_a_mean_is_named_by_its_members_in_whatever_order(finished):
    one, two, three = ingredients_of(finished[0])[:3]
    assert mean_mixture([one, two]).key == mean_mixture([two, one]).key != mean_mixture([one, three]).key
