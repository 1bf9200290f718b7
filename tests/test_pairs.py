"""Figure 4: which pairs are drawn, and what their soups and ensembles answer."""

import pandas as pd
import pytest
import torch

from analysis.artefacts import write_artefact
from analysis.figures.pairs import random_pairs
from analysis.measure.methods import SHIFT_MEAN, difference_in, method_of_answers, over_orders
from analysis.measure.mixtures import Pair
from configs.errors import UserError
from configs.schema import load
from eval.forward import Evaluator, forward
from soups.experiment.pool import usable_pool
from soups.scorers.metrics import score
from tests.pools import moved_pool, recorded_pool, small_network

pytestmark = pytest.mark.usefixtures("in_process")

FEW = ["cluster.workers=1", "analysis.resamples=100"]


def rows_of(pairs):
    return [(pair.first.row, pair.second.row) for pair in pairs]


def drawn(runs, *settings):
    config = load("demo", f"paths.runs={runs}", *settings)
    return rows_of(random_pairs(config, usable_pool(config)))


def test_pairs_are_keyed_by_seed_and_rows_alone(tmp_path):
    recorded_pool(load("demo", f"paths.runs={tmp_path}"))
    few, more = (drawn(tmp_path, f"analysis.pairs.count={count}") for count in (10, 30))
    assert len(few) == 10
    assert set(few) < set(more)
    assert few == sorted(few)
    assert 0 not in {row for pair in more for row in pair}
    assert drawn(tmp_path, "analysis.pairs.count=10", "analysis.seed=1") != few
    everything = drawn(tmp_path)
    assert len(everything) == 12 * 11 // 2
    assert len({first for first, _ in few}) > 3  # of both rows, not of one
    recorded_pool(load("demo", f"paths.runs={tmp_path}"), diverged=[3])
    assert {pair for pair in few if 3 not in pair} < set(drawn(tmp_path, "analysis.pairs.count=10"))
    assert drawn(tmp_path) == [pair for pair in everything if 3 not in pair]


def test_one_model_makes_no_pair(tmp_path):
    config = load("demo", f"paths.runs={tmp_path}")
    recorded_pool(config, diverged=range(2, 13))
    with pytest.raises(UserError, match="two fine-tuned models"):
        random_pairs(config, usable_pool(config))


def test_a_pair_has_one_name_whichever_comes_first(tmp_path):
    config = load("demo_tiny", f"paths.runs={tmp_path}")
    recorded_pool(config)
    one, two, three = usable_pool(config)[1:]
    assert Pair(one, two).mean.key == Pair(two, one).mean.key != Pair(one, three).mean.key


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    words = ["task.classes=8", "analysis.pairs.count=2", *small_network(runs), *FEW]
    config = load("demo_tiny", f"paths.runs={runs}", *words)
    weights = moved_pool(config)
    return config, weights, write_artefact("figure4", [config])


def predicted(evaluator, weights, split):
    evaluator.model.load_state_dict(weights)
    return forward(evaluator.model, [evaluator.split(split).images])


@pytest.mark.slow
def test_soups_are_of_weights_and_ensembles_of_logits(measured):
    config, weights, files = measured
    assert [file.name for file in files] == ["figure4.pdf", "figure4.png", "figure4.csv"]
    tidy = pd.read_csv(files[-1])
    assert len(tidy) == 2 * 7  # six splits and the mean of shifts
    evaluator = Evaluator(config)
    for (first, second), pair in tidy.groupby(["first", "second"]):
        one, two = weights[first], weights[second]
        mean = {n: (one[n] + two[n]) / 2 if one[n].is_floating_point() else one[n] for n in one}
        cells = pair.set_index("column")
        soups, ensembles = [], []
        for split in config.task.reported:
            soups.append(evaluator.score(predicted(evaluator, mean, split), split))
            logits = [predicted(evaluator, each, split).double() for each in (one, two)]
            ensembles.append(evaluator.score((logits[0] + logits[1]) / 2, split))
            assert cells.loc[split, "soup"] == pytest.approx(soups[-1])
            assert cells.loc[split, "ensemble"] == pytest.approx(ensembles[-1])
        shifts = cells.loc[SHIFT_MEAN]
        assert shifts["soup"] == pytest.approx(sum(soups[1:]) / 5)
        assert shifts["difference"] == pytest.approx(sum(soups[1:]) / 5 - sum(ensembles[1:]) / 5)
        assert shifts["low"] <= shifts["difference"] <= shifts["high"]


@pytest.mark.parametrize("metric", ["top1", "macro_f1"])
def test_a_gain_is_over_the_mean_of_those_compared_with_in_any_metric(tmp_path, metric):
    config = load("demo_tiny", f"paths.runs={tmp_path}", f"+task.metrics.test={metric}", "task.shifts=[]", *FEW)
    evaluator = Evaluator(config)
    labels = evaluator.split("test").labels
    ours, one, two = labels.clone(), labels.clone(), labels.clone()
    ours[:4], one[:10], two[:20] = 39, 38, 37
    made = [method_of_answers("", 1, {"test": ids}.get, evaluator) for ids in (ours, one, two)]
    both = over_orders("both", made[1:])
    found = difference_in(evaluator, made[0], both, ("test",), redraw=True)
    ours, one, two = (score(metric, answers, labels) for answers in (ours, one, two))
    assert found.mean == pytest.approx(ours - (one + two) / 2)
    assert 0 < found.low < found.mean < found.high
    assert torch.unique(labels).numel() == 40
