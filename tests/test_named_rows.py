"""A table of rows says of each model, soup and ensemble what its logits say."""

import pandas as pd
import pytest
import torch

from analysis.measure.methods import SHIFT_MEAN
from analysis.tables.named_rows import (
    draw_rows,
    measure_named_rows,
    named_rows_table,
    tidy_named_rows,
    variants,
    write_named_rows,
)
from configs.schema import load
from eval.forward import Evaluator, forward
from eval.metrics import correct
from soups.files.atomic import write_json
from soups.files.weights import save_weights
from store.rows import identity
from store.runs import RunFolder
from tests.pools import record

LABELS = "analysis.labels=[minimal,medium,strong]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two finished rows with an EMA each and a third that diverged; each weight moved a little, by row and kind."""
    runs = tmp_path_factory.mktemp("runs")
    sets = ("+analysis.sets.both=[1,2]", "+analysis.sets.gone=[1,3]")
    config = load("demo_tiny", f"paths.runs={runs}", "task.classes=8", "analysis.resamples=100", LABELS, *sets)
    evaluator = Evaluator(config)
    start = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}
    kept = {}
    record(config, 0, "0")
    for row in (1, 2, 3):
        folder = RunFolder.of(config).ingredient(row)
        folder.mkdir(parents=True)
        scores = {"held_out": {"split": "held_out", "correct": 10 * row, "n": 40}}
        done = {"status": "diverged" if row == 3 else "done", "ingredient": "raw", "variants": {}} | scores
        done |= {"drawn": {}, "seconds": 1.0, "identity": identity(config, row)}
        for kind, file in (("raw", "weights"), ("ema_0.9", "ema_0.9")):
            generator = torch.Generator().manual_seed(10 * row + len(kind))
            noise = {
                n: torch.randn(t.shape, generator=generator) for n, t in start.items() if t.ndim and "running" not in n
            }
            moved = start | {n: start[n] + 0.02 * start[n].std() * values for n, values in noise.items()}
            kept[row, kind] = moved
            made = {"digest": save_weights(folder / f"{file}.safetensors", moved)} | scores
            if kind == "raw":
                done |= made
            else:
                done["variants"][kind] = made
        write_json(folder / "done.json", done)
    return config, evaluator, kept


@pytest.fixture(scope="module")
def measured(finished):
    return measure_named_rows(finished[1])


def hits(evaluator, weights, split):
    evaluator.model.load_state_dict(weights)
    return correct(forward(evaluator.model, evaluator.split(split).images), evaluator.split(split).labels)


@pytest.mark.slow
def test_every_kind_of_weights_of_every_row_that_did_not_diverge_is_there(finished):
    config, _, _ = finished
    assert [(v.row, v.kind) for v in variants(config)] == [(1, "raw"), (1, "ema_0.9"), (2, "raw"), (2, "ema_0.9")]


@pytest.mark.slow
def test_soups_average_weights_and_ensembles_logits_within_a_kind(finished, measured):
    _, evaluator, kept = finished
    methods = {method.name: method for method in measured[0]}
    assert list(methods) == [
        f"{name} ({kind})"
        for kind in ("last weights", "EMA 0.9")
        for name in ("minimal", "medium", "Soup of both", "Ensemble of both")
    ]
    for kind, title in (("raw", "last weights"), ("ema_0.9", "EMA 0.9")):
        one, two = kept[1, kind], kept[2, kind]
        mean = {name: ((one[name].double() + two[name].double()) / 2).to(one[name].dtype) for name in one}
        assert torch.equal(methods[f"Soup of both ({title})"].hits["test"], hits(evaluator, mean, "test"))
        assert torch.equal(methods[f"medium ({title})"].hits["test"], hits(evaluator, two, "test"))
        logits = []
        for weights in (one, two):
            evaluator.model.load_state_dict(weights)
            logits.append(forward(evaluator.model, evaluator.split("test").images))
        together = correct(sum(logits), evaluator.split("test").labels)
        assert torch.equal(methods[f"Ensemble of both ({title})"].hits["test"], together)
        assert methods[f"Ensemble of both ({title})"].models == 2


@pytest.mark.slow
def test_differences_are_to_the_first_row_and_the_table_leaves_its_own_empty(finished, measured):
    config, evaluator, _ = finished
    methods, _ = measured
    tidy = tidy_named_rows(evaluator)
    first = tidy[tidy["method"] == methods[0].name].set_index("column")
    soup = tidy[tidy["method"] == "Soup of both (last weights)"].set_index("column")
    for column in ("test", SHIFT_MEAN):
        gap = soup.loc[column, "accuracy"] - first.loc[column, "accuracy"]
        assert soup.loc[column, "difference"] == pytest.approx(gap)
    table = named_rows_table(tidy, config.task).set_index("Method")
    assert table.loc["minimal (last weights)", "Test − first"] == ""
    assert table.loc["Soup of both (last weights)", "Test"] == f"{100 * soup.loc['test', 'accuracy']:.1f}"


def test_a_model_far_below_all_others_is_named_and_does_not_press_them_together():
    places = {"a": (0.5, 0.4), "b": (0.51, 0.41), "c": (0.52, 0.405), "lost": (0.1, 0.02)}
    rows = [(name, "raw", "individual", "test", x) for name, (x, _) in places.items()]
    rows += [(name, "raw", "individual", SHIFT_MEAN, y) for name, (_, y) in places.items()]
    (axes,) = draw_rows(load("demo"), pd.DataFrame(rows, columns=["method", "kind", "what", "column", "accuracy"])).axes
    assert [text.get_text() for text in axes.texts] == ["not shown: (10.0, 2.0)"]
    assert 49 < axes.get_xlim()[0] < 50 and 52 < axes.get_xlim()[1] < 53


@pytest.mark.slow
def test_the_report_writes_all_files_and_names_its_baseline(finished, tmp_path):
    _, evaluator, _ = finished
    files = write_named_rows(evaluator, tmp_path, "A proxy.")
    assert {file.name for file in files} == {f"rows.{kind}" for kind in ("md", "tex", "csv", "pdf", "png")}
    assert "points to the first row" in (tmp_path / "rows.md").read_text()
