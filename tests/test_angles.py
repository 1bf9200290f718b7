"""Figure 3: angles worked out by hand, series told from settings, advantages by the slow way."""

from math import sqrt

import pytest
import torch
from safetensors.torch import save_file

from analysis.artefacts import write_artefact
from analysis.figures.pairs import (
    AUGMENTATION,
    LEARNING_RATE,
    SEED,
    SEVERAL,
    chosen_pairs,
    measured_part,
    pool_geometry,
    series_of,
)
from configs.errors import UserError
from configs.schema import load
from eval.forward import Evaluator, forward
from soups.conformance import Layout
from soups.files.checkpoints import Entry
from store.runs import RunFolder
from tests.pools import moved_pool, recorded_pool, small_network

pytestmark = pytest.mark.usefixtures("in_process")

BLOCK, GAIN, HEAD = "tower.blocks.0.fc.weight", "tower.blocks.0.norm.weight", "head.weight"
FEW = ["task.classes=8", "task.shifts=[v2, r]", "cluster.workers=1", "analysis.resamples=100"]


@pytest.mark.parametrize(
    ("weights", "kept"),
    [("repeated", {BLOCK}), ("blocks", {BLOCK, GAIN, "tower.blocks.0.relative_attention_bias.weight"}), ("all", None)],
)
def test_repeated_weights_are_the_matrices_of_the_blocks(weights, kept):
    shapes = {
        BLOCK: (4, 2),
        GAIN: (4,),
        "tower.blocks.0.relative_attention_bias.weight": (32, 4),
        "tower.patch_embed.weight": (4, 3),
        HEAD: (5, 4),
    }
    layout = Layout({name: Entry("F32", shape) for name, shape in shapes.items()}, {})
    assert set(measured_part(layout, weights).entries) == (kept or set(shapes))


def test_a_network_without_blocks_says_which_setting_helps():
    with pytest.raises(UserError, match=r"analysis\.angles\.weights=repeated"):
        measured_part(Layout({HEAD: Entry("F32", (5, 4))}, {}), "repeated")


def save_rows(config, *models):
    for row, model in enumerate(models):
        folder = RunFolder.of(config).ingredient(row)
        folder.mkdir(parents=True)
        save_file({name: torch.tensor(value) for name, value in model.items()}, folder / "weights.safetensors")


def test_the_angle_is_at_the_initialisation_and_over_the_chosen_weights(tmp_path):
    # From (1, 1) to (2, 1) and to (2, 2): 45 degrees, although the weights themselves and the heads say otherwise.
    rows = [
        {BLOCK: [[1.0, 1.0]], GAIN: [1.0], HEAD: [[0.0]]},
        {BLOCK: [[2.0, 1.0]], GAIN: [1.0], HEAD: [[9.0]]},
        {BLOCK: [[2.0, 2.0]], GAIN: [3.0], HEAD: [[-9.0]]},
    ]
    config = load("demo_tiny", f"paths.runs={tmp_path}")
    save_rows(config, *rows)
    found = pool_geometry(config, [1, 2])
    assert found.task_cosines[0, 1] == pytest.approx(1 / sqrt(2))
    assert found.distances == pytest.approx([1, sqrt(2)])
    with_gains = pool_geometry(load("demo_tiny", f"paths.runs={tmp_path}", "analysis.angles.weights=blocks"), [1, 2])
    assert with_gains.distances == pytest.approx([1, sqrt(6)])


@pytest.mark.parametrize(
    ("rows", "series"), [((1, 2), SEED), ((1, 3), LEARNING_RATE), ((1, 7), AUGMENTATION), ((1, 4), SEVERAL)]
)
def test_a_series_is_what_two_rows_differ_in(rows, series):
    assert series_of(load("demo_angles"), *rows) == series


def test_rows_without_settings_of_their_own_differ_in_the_seed():
    assert series_of(load("demo_seeds_only"), 1, 2) == SEED
    assert (
        series_of(load("demo_angles", "~sweep.grid.optim.seed", "+sweep.grid.optim.weight_decay=[0,1]"), 1, 2)
        == "weight decay"
    )


def test_pairs_differ_in_one_thing_and_leave_out_high_learning_rates(tmp_path):
    # Two augmentations x three rates x two seeds: 6 pairs of seeds, 2 x 2 x 3 of rates, 3 x 2 of augmentations.
    config = load("demo_angles", f"paths.runs={tmp_path}")
    recorded_pool(config)
    assert len(chosen_pairs(config)) == 6 + 12 + 6
    low = load("demo_angles", f"paths.runs={tmp_path}", "analysis.angles.below_lr=1.5e-3")
    chosen = chosen_pairs(low)
    assert len(chosen) == 4 + 4 + 4
    assert not {1, 2, 7, 8} & {row for pair, _ in chosen for row in (pair.first.row, pair.second.row)}
    everything = load("demo_angles", f"paths.runs={tmp_path}", "analysis.angles.several=true")
    assert len(chosen_pairs(everything)) == 12 * 11 // 2
    recorded_pool(config, diverged=range(2, 13))
    with pytest.raises(UserError, match=r"analysis\.angles\.several"):
        chosen_pairs(config)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Three rows of which any two differ in several things."""
    runs = tmp_path_factory.mktemp("runs")
    small = [*FEW, *small_network(tmp_path_factory.mktemp("network"))]
    config = load("demo_tiny", f"paths.runs={runs}", "analysis.angles.several=true", *small)
    weights = moved_pool(config)
    return config, weights, write_artefact("figure3", [config])


def accuracy(evaluator, weights):
    evaluator.model.load_state_dict(weights)
    splits = evaluator.config.task.reported
    return sum(
        evaluator.score(forward(evaluator.model, [evaluator.split(split).images]), split) for split in splits
    ) / len(splits)


@pytest.mark.slow
def test_the_advantage_is_the_accuracy_of_the_mean_minus_the_mean_of_accuracies(measured):
    import pandas as pd

    config, weights, files = measured
    assert [file.name for file in files] == ["figure3.pdf", "figure3.png", "figure3.csv"]
    tidy = pd.read_csv(files[-1])
    assert list(zip(tidy["first"], tidy["second"], strict=True)) == [(1, 2), (1, 3), (2, 3)]
    evaluator = Evaluator(config)
    for pair in tidy.itertuples():
        one, two = weights[pair.first], weights[pair.second]
        mean = {n: (one[n] + two[n]) / 2 if one[n].is_floating_point() else one[n] for n in one}
        accuracies = [accuracy(evaluator, each) for each in (one, two, mean)]
        assert [pair.accuracy_first, pair.accuracy_second, pair.accuracy_mean] == pytest.approx(accuracies)
        assert pair.advantage == pytest.approx(accuracies[2] - (accuracies[0] + accuracies[1]) / 2)
        assert pair.low <= pair.advantage <= pair.high
