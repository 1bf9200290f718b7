"""Figure L.3 names every method of Table 3, L.1 and L.2 every kind of weights."""

import pandas as pd
import pytest

from analysis.artefacts import write_artefact
from analysis.figures.pool import (
    LOOKS,
    draw_scatter,
    draw_subgroups,
    measure_scatter,
    measure_subgroups,
)
from analysis.measure.methods import measure
from configs.errors import UserError
from configs.schema import load
from soups.experiment.soups import make_soup
from soups.scorers.metrics import score
from tasks.emoji.load import read_manifest
from tests.pools import finished_pool

pytestmark = pytest.mark.usefixtures("in_process")

ONE = ("sweep.rows=2", "recipes=[best,uniform]", "model.templates=null", "cluster.workers=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_pool(tmp_path_factory.mktemp("runs"), *ONE)


def test_every_method_has_a_name_and_a_look_of_its_own():
    assert set(load("demo").recipes) <= set(LOOKS)
    assert len({(colour, marker) for _, colour, marker, _ in LOOKS.values()}) == len(LOOKS)
    assert len({label for label, *_ in LOOKS.values()}) == len(LOOKS)


@pytest.mark.slow
def test_its_files_are_written_from_what_was_made(finished):
    config, evaluator = finished
    with pytest.raises(UserError, match="recipe=best first"):
        write_artefact("figurel3", [config])
    for recipe in config.recipes:
        make_soup(recipe, evaluator)
    files = write_artefact("figurel3", [config])
    assert [file.name for file in files] == ["figurel3.pdf", "figurel3.png", "figurel3.csv"]
    assert {"individual", "initialisation", "best", "uniform"} <= set(pd.read_csv(files[-1])["kind"])


@pytest.mark.slow
def test_figure_g2_is_of_one_shift_and_figure_g1_of_groups_and_classes(finished):
    config, evaluator = finished
    for recipe in config.recipes:
        make_soup(recipe, evaluator)
    pool, methods = measure(evaluator)
    one = measure_scatter(config, one_shift=True).set_index("name")
    assert one.loc["row 1", "shift_mean"] == pool[1].accuracy("v2")
    assert draw_scatter(config, one.reset_index(), one_shift=True).axes[0].get_ylabel() == "V2, top-1 accuracy (%)"

    points = measure_subgroups(config)
    found = points[points["kind"] == "best"].set_index("metric")
    best = next(method for method in methods if method.name == "best")
    classes = [row["group"] for row in read_manifest()["classes"]]
    groups = [classes[label] for label in evaluator.split("test").labels]
    by_group = pd.Series(best.hits["test"].double().numpy()).groupby(groups).mean()
    assert found.loc["worst_group", "test"] == pytest.approx(by_group.min())
    f1 = [score("macro_f1", best.predicted[s][0], evaluator.split(s).labels) for s in config.task.shifts]
    assert found.loc["macro_f1", "shift_mean"] == pytest.approx(sum(f1) / len(f1))
    labels = [axes.get_xlabel() for axes in draw_subgroups(config, points).axes]
    assert labels == ["Emoji test, accuracy of the worst group (%)", "Emoji test, macro F1 (%)"]


@pytest.mark.slow
def test_rows_need_names_for_figures_l1_and_l2(finished, tmp_path):
    with pytest.raises(UserError, match="name the rows in"):
        write_artefact("figurel1", [finished[0]])
    config, _ = finished_pool(tmp_path, *ONE, "analysis.labels=[ema,swa]", "+analysis.sets.both=[1,2]")
    files = write_artefact("figurel2", [config])
    assert [file.name for file in files] == ["figurel2.pdf", "figurel2.png", "figurel2.csv"]
    assert list(pd.read_csv(files[-1])["method"].unique()) == ["ema", "swa", "Soup of both", "Ensemble of both"]
