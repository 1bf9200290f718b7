"""The doctor on planted pools, and geometry against the whole vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from soups import geometry as geometry_module
from soups.conformance import common_layout
from soups.doctor import examine, show
from soups.experiment.doctor import midpoint_barriers
from soups.files.opening import opened
from soups.files.reading import Reading
from soups.geometry import geometry
from tests.commands import here

ROOT = Path(__file__).resolve().parents[1]


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(40, 30, generator=generator),
        "h": torch.randn(30, generator=generator).bfloat16(),
        "bn.running_var": torch.rand(5, generator=generator) * 1e6,
        "n": torch.tensor(3),
    }


def tuned(seed, step=0.05):
    """The model of seed 0, moved in a direction of its own."""
    return {k: v + (step * state(seed)[k]).to(v.dtype) if v.is_floating_point() else v for k, v in state(0).items()}


@pytest.fixture
def pool(tmp_path):
    """Four models fine-tuned from one initialisation."""
    save_file(state(0), tmp_path / "init.safetensors")
    for i in range(1, 5):
        save_file(tuned(i), tmp_path / f"m{i}.safetensors")
    return tmp_path


def files(pool):
    return sorted(pool.glob("[!i]*.safetensors"))


@pytest.mark.parametrize("with_init", [True, False])
def test_a_healthy_pool_has_no_findings(pool, with_init):
    report = examine(files(pool), pool / "init.safetensors" if with_init else None)
    assert report.findings == ()
    assert len(report.sound) == 4


def test_a_model_in_another_kind_of_numbers_is_read_as_what_it_is(pool):
    before = examine(files(pool), pool / "init.safetensors").geometry
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tuned(2).items()}
    save_file(halves | {"bn.running_var": tuned(2)["bn.running_var"]}, pool / "m2.safetensors")
    after = examine(files(pool), pool / "init.safetensors").geometry
    np.testing.assert_allclose(after.distances, before.distances, rtol=1e-2)


def test_what_is_left_out_of_the_mean_is_left_out_of_the_doctors_distances(pool):
    before = examine(files(pool), pool / "init.safetensors")
    for i, path in enumerate(files(pool)):
        save_file(tuned(i + 1) | {"head": torch.full((i + 1,), 9.0)}, path)
    assert all("head" in model.problem for model in examine(files(pool)).models[1:])
    for reading in (Reading(exclude="head"), Reading(only_common=True)):
        found = examine(files(pool), pool / "init.safetensors", reading=reading)
        assert [model.problem for model in found.models] == [""] * 4
        np.testing.assert_allclose(found.geometry.distances, before.geometry.distances)


def test_distances_and_angles_are_those_of_the_whole_vectors(pool, monkeypatch):
    monkeypatch.setattr(geometry_module, "NUMBERS_AT_ONCE", 64)

    def vector(path):
        weights = load_file(path)
        return torch.cat([weights[k].double().reshape(-1) for k in ("h", "w")]).numpy()

    start, models = vector(pool / "init.safetensors"), [vector(path) for path in files(pool)]
    for reference, init in ((start, [pool / "init.safetensors"]), (np.mean(models, 0), [])):
        with opened([*files(pool), *init]) as found:
            g = geometry(found[:4], common_layout(found), found[4] if init else None)
        tasks = [model - reference for model in models]
        np.testing.assert_allclose(g.distances, [np.linalg.norm(t) for t in tasks], rtol=1e-12)
        np.testing.assert_allclose(g.relative, g.distances / np.linalg.norm(reference), rtol=1e-12)
        cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in tasks] for a in tasks]
        np.testing.assert_allclose(g.task_cosines, cosines, atol=1e-12)
        cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in models] for a in models]
        np.testing.assert_allclose(g.weight_cosines, cosines, atol=1e-12)
        ours = [m @ reference / np.linalg.norm(m) / np.linalg.norm(reference) for m in models]
        np.testing.assert_allclose(g.reference_cosines, ours, atol=1e-12)


def test_distances_of_models_that_hardly_moved_keep_their_digits(tmp_path):
    w = torch.full((1000,), 1000.0, dtype=torch.float64)
    for name, step in (("init", 0.0), ("a", 1e-9), ("b", 2e-9)):
        save_file({"w": w + step}, tmp_path / f"{name}.safetensors")
    found = examine([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "init.safetensors").geometry
    ratio = (1000 + 2e-9 - 1000) / (1000 + 1e-9 - 1000)  # of the steps as float64 can hold them
    assert found.distances[1] / found.distances[0] == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("with_init", [True, False])
@pytest.mark.parametrize(
    ("made", "sound", "words"),
    [
        (tuned(2), 5, "x.safetensors and m2.safetensors are the same model"),
        (tuned(7) | {"h": torch.full((30,), torch.nan).bfloat16()}, 4, "x.safetensors: tensor 'h' holds NaN or inf"),
        (tuned(7) | {"h": torch.zeros(31).bfloat16()}, 4, "x.safetensors: tensor 'h' is BF16 (31,), but BF16 (30,)"),
        (tuned(7) | {"extra": torch.zeros(1)}, 4, "x.safetensors: tensor 'extra' is not in "),
        (None, 4, "x.safetensors is truncated, damaged or not a safetensors file"),
        (state(99), 5, "x.safetensors: not fine-tuned from the same checkpoint; its weights have a cosine of "),
        (tuned(7, 0.4), 5, "x.safetensors went far: "),
    ],
    ids=["duplicate", "nan", "shape", "key", "damaged", "stranger", "far"],
)
def test_what_is_planted_is_found_and_nothing_else(pool, made, sound, words, with_init):
    if made is None:
        (pool / "x.safetensors").write_bytes(b"nothing")
    else:
        save_file(made, pool / "x.safetensors", metadata={"other": "metadata"})
    report = examine(files(pool), pool / "init.safetensors" if with_init else None)
    assert len(report.findings) == 1
    assert words in report.findings[0]
    assert len(report.sound) == sound


def test_two_models_of_different_origin_are_both_named(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(state(0), paths[0])
    save_file({k: v + (0.3 * state(0)[k]).to(v.dtype) for k, v in state(1).items()}, paths[1])  # a cosine of 0.3
    assert ["not fine-tuned from the same checkpoint" in line for line in examine(paths).findings] == [True, True]


def test_weak_models_and_models_that_are_all_the_same_explain_a_soup(pool):
    scores = {f"m{i}.safetensors": score for i, score in enumerate([0.8, 0.79, 0.7, 0.5], 1)}
    report = examine(files(pool), pool / "init.safetensors", scores)
    assert len(report.findings) == 1
    assert report.findings[0].startswith("2 of 4 models are more than 2 points below m1.safetensors (80.0 %): m3")
    for i in range(1, 5):
        both = {k: v + 0.01 * tuned(i)[k].to(v.dtype) if v.is_floating_point() else v for k, v in tuned(9).items()}
        save_file(both, pool / f"m{i}.safetensors")
    assert "nearly the same" in examine(files(pool), pool / "init.safetensors").findings[0]


def test_the_command_prints_a_table_and_writes_nothing(pool):
    save_file(state(99), pool / "x.safetensors")
    (pool / "scores.json").write_text(json.dumps({"m1.safetensors": 0.8123}))
    before = sorted(pool.iterdir())
    arguments = [*files(pool), "--init", pool / "init.safetensors", "--scores", pool / "scores.json", "--held-out", 600]
    answer = here(["-m", "soups", "doctor", *map(str, arguments)])
    assert answer.returncode == 0, answer.stderr
    for words in ("m3.safetensors", "81.23 %", "not fine-tuned from the same checkpoint", "a score of m2.safetensors"):
        assert words in answer.stdout
    assert sorted(pool.iterdir()) == before


def test_wrong_scores_and_an_empty_pool_are_refused(pool):
    with pytest.raises(UserError, match="no models"):
        examine([])
    for content, words in (
        ('{"m1.safetensors": 81.2}', r"m1.safetensors is 81.2, and the doctor needs accuracies in \[0, 1\]"),
        ('{"m1.safetensors": -0.1}', r"m1.safetensors is -0.1, and the doctor needs accuracies in \[0, 1\]"),
        ("[1]", r"need numbers by file name, as in \{\"a.pt\": 0.81\}"),
        ("{", "need numbers by file name"),
    ):
        (pool / "scores.json").write_text(content)
        with pytest.raises(UserError, match=rf"^[^\n]*scores\.json: [^\n]*{words}[^\n]*$"):
            examine(files(pool), None, pool / "scores.json")


def test_a_pool_without_a_sound_model_is_shown(pool):
    (pool / "x.safetensors").write_bytes(b"")
    console = Console(record=True, width=120)
    show(examine([pool / "x.safetensors"]), console)
    assert "x.safetensors is empty" in console.export_text()


def test_a_barrier_is_how_far_the_middle_is_below_the_mean_of_the_ends():
    # Accuracy is the distance to 0, up to 1: the middle 0 of -1 and 1 scores 0, the middle 0.75 of 0.5 and 1 lies on
    # the line between their scores, and the middle -0.25 of -1 and 0.5 scores 0.25.
    def accuracy(weights):
        return min(1.0, abs(weights["w"].item()))

    models = [lambda v=v: {"w": torch.tensor([v])} for v in (1.0, 0.5, -1.0)]
    assert midpoint_barriers(models, accuracy) == [(1.0, 0, 2), (0.5, 1, 2), (0.0, 0, 1)]


@pytest.fixture
def image_pool(tmp_path):
    """Twelve models with a convolution, fine-tuned from one initialisation, and their scores."""
    for i in range(12):
        generator = torch.Generator().manual_seed(i)
        save_file(
            tuned(i + 1) | {"conv": torch.ones(4, 3, 2, 2) + 0.01 * torch.randn(4, 3, 2, 2, generator=generator)},
            tmp_path / f"m{i}.safetensors",
        )
    return tmp_path


SCORES = {f"m{i}.safetensors": 0.6 - 0.005 * i for i in range(12)}


def likely(pool, scores=SCORES, held_out=600, which=slice(None)):
    return examine(files(pool)[which], None, scores, held_out=held_out).will_it_help


def test_of_a_pool_like_the_measured_ones_the_doctor_says_the_shares_of_the_table(image_pool):
    known = json.loads((ROOT / "soups/will_it_help.json").read_text())
    lines = likely(image_pool)
    assert not any("not calibrated" in line for line in lines)
    assert f"shares of {len(known['pools'])} pools of image classifiers" in lines[0]
    for line, each in zip(lines[1:5], known["soups"], strict=True):
        share, low, high = (round(100 * number) for number in each["better"])
        assert line.startswith(f"- {each['soup']} soup, {each['on']}: better {share} % [{low}, {high}], worse ")


@pytest.mark.parametrize(
    ("scores", "held_out", "words"),
    [
        (SCORES, 50_000, "held-out examples is 50000, there 77 to "),
        ({name: score + 0.3 for name, score in SCORES.items()}, 600, "best score is 0.9, there 0.423 to 0.648"),
        (dict.fromkeys(SCORES, 0.5), 600, "best minus median score is 0, there 0.016 to "),
    ],
)
def test_a_pool_outside_the_range_is_told_that_and_by_which_feature(image_pool, scores, held_out, words):
    first = likely(image_pool, scores, held_out)[0]
    assert first.startswith("not calibrated for pools like yours: ") and words in first


def test_models_that_read_no_images_are_not_calibrated(pool):
    first = likely(pool, {f"m{i}.safetensors": 0.6 for i in range(1, 5)})[0]
    assert first.startswith("not calibrated for pools like yours: no tensor is a convolution of images")
    assert "models is 4, there 12 to " in first


def test_models_of_another_origin_are_not_calibrated(image_pool):
    save_file(state(99) | {"conv": torch.randn(4, 3, 2, 2)}, image_pool / "m3.safetensors")
    assert "models are not fine-tuned from the same checkpoint" in likely(image_pool)[0]


def test_without_scores_or_their_number_no_probability_is_said_and_what_to_type_is(image_pool):
    missing = {name: score for name, score in SCORES.items() if name != "m7.safetensors"}
    for lines, words in (
        (likely(image_pool, {}, None), "type --scores scores.json"),
        (likely(image_pool, SCORES, None), "type --held-out N"),
        (likely(image_pool, missing), "a score of m7.safetensors in --scores"),
        (likely(image_pool, {"m0.safetensors": 0.6}, which=slice(1)), "two different models"),
    ):
        assert len(lines) == 1 and lines[0].startswith("not said: ") and words in lines[0] and "%" not in lines[0]
    for scores, held_out in (({}, 600), (SCORES, 0)):
        with pytest.raises(UserError, match="type the number of examples"):
            likely(image_pool, scores, held_out)


def test_a_model_that_stands_twice_counts_once(image_pool):
    save_file(load_file(image_pool / "m0.safetensors"), image_pool / "m11.safetensors")
    assert "models is 11, there 12 to " in likely(image_pool)[0]
