"""Soups of backbones along random orders: which sets are evaluated, and what a data set's model changes."""

from dataclasses import replace

import pandas as pd
import pytest

import reproduce
from analysis import pipeline
from analysis.artefacts import write_artefact
from analysis.figures.curves import (
    changes_of,
    draw_backbones,
    measure_backbones,
    orders_of,
    sets_along,
    towers_of,
    zero_shot_model,
)
from analysis.measure.mixtures import axis_labels
from configs.errors import UserError
from configs.schema import load
from soups.average import Average
from soups.files.atomic import read_json, write_json
from soups.files.weights import load_weights
from store.runs import RunFolder
from tests.pools import finished_pool

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = ("cooking.orders=2", "cluster.workers=1", "task.shifts=[v2]")
    runs = tmp_path_factory.mktemp("runs")
    config, evaluator = finished_pool(runs, *settings, experiment="demo_cross_dataset", classes=12, small=False)
    for row in range(1, 6):
        folder = RunFolder.of(config).ingredient(row)
        task = (
            {"kind": "emoji", "folder": "x", "parts": 6, "part": row - 1}
            if row < 5
            else {"kind": "dtd", "folder": "x", "title": "DTD"}
        )
        write_json(folder / "config.json", {"task": task})
    return config, evaluator


@pytest.fixture(scope="module")
def table(finished):
    return measure_backbones(finished[0])


@pytest.mark.slow
def test_towers_are_named_by_their_data_set_and_apart_where_it_is_the_same(finished):
    config, _ = finished
    assert [tower.name for tower in towers_of(config)] == ["part 1", "part 2", "part 3", "part 4", "DTD"]
    folder = RunFolder.of(config).ingredient(2)
    write_json(folder / "config.json", {"task": {"kind": "dtd", "folder": "x", "title": "DTD"}})
    try:
        names = [tower.name for tower in towers_of(config)]
    finally:
        write_json(folder / "config.json", {"task": {"kind": "emoji", "folder": "x", "parts": 6, "part": 1}})
    assert names == ["part 1", "DTD, demo_cross_dataset 2", "part 3", "part 4", "DTD, demo_cross_dataset 5"]


def test_each_set_is_evaluated_once_however_many_orders_reach_it():
    assert sets_along([[0, 1, 2], [1, 0, 2]]) == [(), (0,), (0, 1), (0, 1, 2), (1,)]


@pytest.mark.slow
def test_a_soup_is_the_mean_of_the_zero_shot_model_and_the_towers_under_its_head(finished, table):
    config, evaluator = finished
    order = orders_of(config, 5)[1]
    start = zero_shot_model(config)
    average = Average().plus(start)
    for i in order[:2]:
        tower = load_weights(RunFolder.of(config).ingredient(i + 1) / "weights.safetensors")
        average = average.plus(tower | {name: start[name] for name in ("head.weight", "head.bias")})
    logits = evaluator.fresh_logits(average.weights(), "test")
    row = table[(table["order"] == 1) & (table["added"] == 2) & (table["column"] == "test")].iloc[0]
    assert row["accuracy"] == evaluator.hits(logits, "test").double().mean().item()
    assert row["last"] == towers_of(config)[order[1]].name


@pytest.mark.slow
def test_orders_begin_at_zero_shot_and_end_at_the_soup_of_all(table):
    for added in (0, 5):
        assert table[table["added"] == added].groupby("column")["accuracy"].nunique().eq(1).all()
    assert table[table["added"] == 0]["difference"].eq(0).all()


def test_a_change_is_to_one_backbone_less_and_is_averaged_over_orders():
    rows = []
    for order, lasts, accuracies in ((0, ("", "a", "b"), (0.5, 0.6, 0.9)), (1, ("", "b", "a"), (0.5, 0.7, 0.9))):
        for added, (last, accuracy) in enumerate(zip(lasts, accuracies, strict=True)):
            before = accuracies[added - 1] if added else None
            change = accuracy - before if added else float("nan")
            rows.append({"order": order, "added": added, "last": last, "column": "test", "accuracy": accuracy})
            rows[-1] |= {"change": change, "difference": accuracy - 0.5, "low": 0.0, "high": 1.0}
    changes = changes_of(pd.DataFrame(rows), "test")
    assert changes.loc["a", "mean"] == pytest.approx((0.1 + 0.2) / 2)
    assert changes.loc["b", "mean"] == pytest.approx((0.3 + 0.2) / 2)
    assert list(changes.index) == ["a", "b"]
    figure = draw_backbones(load("demo_cross_dataset", "task.shifts=[]"), pd.DataFrame(rows))
    left, right = figure.axes
    mean = next(line for line in left.lines if line.get_marker() == "o")
    assert list(mean.get_ydata()) == pytest.approx([50, 65, 90])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([15, 25])
    assert [label.get_text() for label in right.get_yticklabels()] == ["a", "b"]
    assert (left.get_ylabel(), right.get_xlabel()) == ("Emoji test,\ntop-1 accuracy (%)", "Change when added (points)")


@pytest.mark.slow
def test_the_changes_of_an_order_sum_to_what_all_of_it_gains(table):
    for _, order in table[table["column"] == "test"].groupby("order"):
        assert order["change"].sum() == pytest.approx(order["difference"].iloc[-1])


@pytest.mark.slow
def test_what_is_no_pool_of_backbones_is_refused_and_files_are_written(finished, tmp_path, capsys, monkeypatch):
    config, _ = finished
    assert [file.name for file in write_artefact("figuree1", [config])] == [
        "figuree1.pdf",
        "figuree1.png",
        "figuree1.csv",
    ]
    assert list(axis_labels(config)) == ["test", "shift_mean"]
    done = RunFolder.of(config).ingredient(1) / "done.json"
    assert read_json(done)["status"] == "done"
    rows = [RunFolder.of(config).ingredient(row) for row in range(1, 6)]
    monkeypatch.setattr(pipeline, "_run_one", None)  # nothing is trained: the figure alone is drawn
    reproduce.run(replace(config, towers=tuple(rows)))
    written = [str(RunFolder.of(config).analysis / f"figuree1{end}") for end in (".pdf", ".png", ".csv")]
    assert capsys.readouterr().out.split()[-4:-1] == written
    probed, _ = finished_pool(tmp_path, "sweep.rows=1")
    with pytest.raises(UserError, match="heads from class names"):
        write_artefact("figuree1", [probed])
