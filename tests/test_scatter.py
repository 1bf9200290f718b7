"""Figure L.3 names every method of Table 3, L.1 and L.2 every kind of weights."""

import pandas as pd
import pytest

from analysis.figures.scatter import figurel1, figurel2, figurel3, methods_figure, styles
from configs.errors import UserError
from configs.schema import load
from soups.experiment.cook import cook
from tests.pools import finished_pool

ONE = ("sweep.rows=2", "recipes=[best,uniform]", "model.templates=null", "cluster.workers=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_pool(tmp_path_factory.mktemp("runs"), *ONE)


def test_every_method_has_a_name_and_a_look_of_its_own():
    found = styles()
    assert set(load("demo").recipes) <= set(found)
    assert len({(colour, marker) for _, colour, marker, _ in found.values()}) == len(found)
    assert len({label for label, *_ in found.values()}) == len(found)


def test_the_figure_has_each_method_at_its_place_in_percent():
    points = pd.DataFrame(
        [
            {"name": "row 1", "kind": "individual", "test": 0.5, "shift_mean": 0.4},
            {"name": "learned", "kind": "learned", "test": 0.547, "shift_mean": 0.321},
            {"name": "zero-shot", "kind": "zero-shot", "test": 0.07, "shift_mean": 0.06},
        ]
    )
    axes = methods_figure(points, ("x (%)", "y (%)")).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Individual models", "Learned soup"]
    assert tuple(axes.collections[1].get_offsets()[0]) == pytest.approx((54.7, 32.1))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x (%)", "y (%)")


def test_its_files_are_written_from_what_was_cooked(finished):
    config, evaluator = finished
    with pytest.raises(UserError, match="recipe=best first"):
        figurel3(config)
    for recipe in config.recipes:
        cook(recipe, evaluator)
    files = figurel3(config)
    assert [file.name for file in files] == ["figurel3.pdf", "figurel3.png", "figurel3.csv"]
    assert {"individual", "initialisation", "best", "uniform"} <= set(pd.read_csv(files[-1])["kind"])


def test_rows_need_names_for_figures_l1_and_l2(finished, tmp_path):
    with pytest.raises(UserError, match="name the rows in"):
        figurel1(finished[0])
    config, _ = finished_pool(tmp_path, *ONE, "analysis.labels=[ema,swa]", "+analysis.sets.both=[1,2]")
    files = figurel2(config)
    assert [file.name for file in files] == ["figurel2.pdf", "figurel2.png", "figurel2.csv"]
    assert list(pd.read_csv(files[-1])["method"].unique()) == ["ema", "swa", "Soup of both", "Ensemble of both"]
