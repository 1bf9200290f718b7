"""From a pool on disk to soups: only the held-out split chooses, and a stop in between costs nothing."""

import json
import shutil
from dataclasses import replace
from typing import get_args

import pandas as pd
import pytest
import torch
from rich.console import Console

from analysis.measure.methods import measure
from configs.errors import UserError
from configs.schema import Recipe, load
from eval.forward import Evaluator
from soups.experiment.doctor import examine_experiment
from soups.experiment.pool import RECIPES, mix, usable_pool
from soups.experiment.soups import ENSEMBLES, logits_of, make_soup, outputs_of
from soups.files.atomic import read_json, write_json
from soups.files.weights import load_weights
from soups.scores import Journal
from store.runs import RunFolder
from tests.commands import in_two
from tests.pools import finished_pool, moved_pool, small_network

ROWS = 4
ORDER = [2, 4, 0, 1, 3]  # best first on held-out, as planted below


@pytest.fixture(scope="module")
def pool_config(tmp_path_factory):
    """A pool of the initialisation and four that were moved away from it, with planted held-out scores."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    config = load("demo_tiny", "task.classes=20", f"sweep.rows={ROWS}", f"paths.runs={folder}", *small_network(folder))
    moved_pool(config)
    for place, row in enumerate(ORDER):
        path = RunFolder.of(config).ingredient(row) / "done.json"
        write_json(path, read_json(path) | {"held_out": {"split": "held_out", "correct": 30 - place, "n": 40}})
    return config


class Watched(Evaluator):
    """An evaluator that remembers which splits were asked for."""

    def __init__(self, config):
        super().__init__(config)
        self.asked = set()

    def split(self, name):
        self.asked.add(name)
        return super().split(name)


@pytest.fixture
def config(pool_config):
    """The pool, with no soup made yet."""
    shutil.rmtree(RunFolder.of(pool_config).root / "soups", ignore_errors=True)
    return pool_config


@pytest.mark.slow
def test_no_recipe_looks_at_any_split_but_held_out_and_a_table_of_all_is_measured_once_and_refuses_a_leak(config):
    config = replace(config, cooking=replace(config.cooking, rows=(1, 3)))
    evaluator = Watched(config)
    usual = [name for recipe in config.recipes for name in outputs_of(config, recipe)]
    names = [*usual, *(set(RECIPES) - set(config.recipes))]
    assert "wise_ft" in names
    for name in names:
        evaluator.asked.clear()
        make_soup(name, evaluator)
        assert evaluator.asked == {"held_out"}, name
    first, _ = measure(evaluator)

    class Refusing(Evaluator):
        def fresh_logits(self, weights, split, rows=None):
            raise AssertionError(f"a forward pass on {split}")

    second, _ = measure(Refusing(config))
    assert [m.accuracy("test") for m in first] == [m.accuracy("test") for m in second]
    path = RunFolder.of(config).soup("best") / "soup.json"
    write_json(path, read_json(path) | {"selected_on": {"split": "test", "digest": "0"}})
    with pytest.raises(UserError, match="recipe best selected on 'test', not on the held-out split"):
        measure(evaluator)


def test_every_recipe_of_the_schema_can_be_made():
    assert set(RECIPES) == set(get_args(Recipe))


def test_the_best_individual_is_the_best_on_held_out(config):
    evaluator = Evaluator(config)
    soup = make_soup("best", evaluator)
    assert [member["row"] for member in soup["ingredients"]] == [ORDER[0]]
    pool = {ingredient.row: ingredient for ingredient in usable_pool(config)}
    expected = evaluator.logits(pool[2].digest, pool[2].load, "test")
    assert torch.equal(logits_of(soup, "test", evaluator), expected)


def test_greedy_tries_the_pool_best_first_and_keeps_what_does_not_lower_held_out(config):
    evaluator = Evaluator(config)
    soup = make_soup("greedy", evaluator)
    assert [trial["row"] for trial in soup["trials"]] == ORDER
    best = soup["trials"][0]["score"]
    for trial in soup["trials"][1:]:
        assert trial["accepted"] == (trial["score"] >= best)
        best = max(best, trial["score"]) if trial["accepted"] else best
    kept = [trial["row"] for trial in soup["trials"] if trial["accepted"]]
    assert kept == [member["row"] for member in soup["ingredients"]]


def test_the_uniform_soup_on_disk_is_the_mean_of_all_models(config):
    make_soup("uniform", Evaluator(config))
    soup = load_weights(RunFolder.of(config).soup("uniform") / "weights.safetensors")
    heads = torch.stack([ingredient.load()["head.weight"].double() for ingredient in usable_pool(config)])
    torch.testing.assert_close(soup["head.weight"], heads.mean(dim=0).float(), rtol=0, atol=1e-6)


def test_an_ensemble_has_the_mean_of_its_members_logits_on_every_split(config):
    evaluator = Evaluator(config)
    for recipe in ("ensemble", "greedy_ensemble"):
        assert recipe in ENSEMBLES
        soup = make_soup(recipe, evaluator)
        rows = {member["row"] for member in soup["ingredients"]}
        members = [ingredient for ingredient in usable_pool(config) if ingredient.row in rows]
        logits = [evaluator.logits(i.digest, i.load, "v2").double() for i in members]
        torch.testing.assert_close(
            logits_of(soup, "v2", evaluator), torch.stack(logits).mean(dim=0).float(), rtol=1e-6, atol=1e-6
        )


def test_a_soup_made_before_is_not_made_again_until_the_pool_changes(config):
    evaluator = Evaluator(config)
    first = make_soup("greedy", evaluator)
    file = RunFolder.of(config).soup("greedy") / "weights.safetensors"
    stamp = file.stat().st_mtime_ns
    assert make_soup("greedy", evaluator) == first
    assert file.stat().st_mtime_ns == stamp
    fewer = replace(config, sweep=replace(config.sweep, rows=ROWS - 1))
    assert [trial["row"] for trial in make_soup("greedy", Evaluator(fewer))["trials"]] == [2, 0, 1, 3]


def test_a_killed_greedy_run_pays_for_no_candidate_twice(config):
    counted = []

    class Counting(Evaluator):
        def fresh_logits(self, weights, split, rows=None):
            counted.append(split)
            if len(counted) == 3:
                raise KeyboardInterrupt
            return super().fresh_logits(weights, split, rows)

    evaluator = Counting(config)
    with pytest.raises(KeyboardInterrupt):
        make_soup("greedy", evaluator)
    assert len(Journal(RunFolder.of(config).soup("greedy") / "journal.jsonl").known) == 2
    resumed = make_soup("greedy", evaluator)
    # 4 candidates: 2 before the stop, the one it fell in, and then 2 more and the finished soup's own logits.
    assert len(counted) in (5, 6)
    RunFolder.of(config).soup("greedy").joinpath("soup.json").unlink()
    RunFolder.of(config).soup("greedy").joinpath("journal.jsonl").unlink()
    undisturbed = make_soup("greedy", Evaluator(config))
    assert resumed == undisturbed


def test_a_diverged_row_is_left_out(config):
    path = RunFolder.of(config).ingredient(4) / "done.json"
    record = read_json(path)
    write_json(path, record | {"status": "diverged", "digest": None})
    try:
        assert [ingredient.row for ingredient in usable_pool(config)] == [0, 1, 2, 3]
    finally:
        write_json(path, record)


def test_an_unfinished_pool_is_refused_with_its_missing_rows(config):
    more = replace(config, sweep=replace(config.sweep, rows=ROWS + 2))
    with pytest.raises(UserError, match=r"rows 5, 6 of .* are not finished: run python -m finetune"):
        make_soup("uniform", Evaluator(more))


def test_a_damaged_ingredient_is_named(config):
    path = RunFolder.of(config).ingredient(1) / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(UserError, match=r"ingredients/001/weights.safetensors.*damaged.*delete its folder"):
            make_soup("uniform", Evaluator(config))
    finally:
        path.write_bytes(whole)
    assert not (RunFolder.of(config).soup("uniform") / "soup.json").exists()


def with_cooking(config, **changes):
    return replace(config, cooking=replace(config.cooking, **changes))


@pytest.fixture
def honest(config):
    """The same pool with the held-out scores that its models really have."""
    evaluator, run = Evaluator(config), RunFolder.of(config)
    planted = {row: read_json(run.ingredient(row) / "done.json") for row in range(ROWS + 1)}
    for ingredient in usable_pool(config):
        right, n = evaluator.count(evaluator.logits(ingredient.digest, ingredient.load, "held_out"), "held_out")
        score = {"split": "held_out", "correct": right, "n": n}
        write_json(ingredient.folder / "done.json", planted[ingredient.row] | {"held_out": score})
    yield config
    for row, record in planted.items():
        write_json(run.ingredient(row) / "done.json", record)


@pytest.mark.parametrize("shortcut", ["hard_first", "speculative"])
def test_a_shortcut_takes_the_decisions_of_plain_greedy_on_real_forward_passes(honest, shortcut):
    config = honest
    plain = make_soup("greedy", Evaluator(config))
    short = with_cooking(config, shortcut=shortcut, ahead=2, chunk=4)
    soup = make_soup("greedy", Evaluator(short))
    decisions = [(trial["row"], trial["accepted"]) for trial in plain["trials"]]
    assert [(trial["row"], trial["accepted"]) for trial in soup["trials"]] == decisions
    assert soup["digest"] == plain["digest"]
    assert soup["spent"]["evaluations"] >= ROWS
    for ours, theirs in zip(soup["trials"], plain["trials"], strict=True):
        assert ours["score"] >= theirs["score"] - 1e-9
        assert not ours["exact"] or ours["correct"] == theirs["correct"]


def test_the_random_orders_of_greedy_are_soups_of_their_own(config):
    names = outputs_of(config, "greedy_random_order")
    assert len(names) == 3
    orders = [[trial["row"] for trial in make_soup(name, Evaluator(config))["trials"]] for name in names]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_learned_soup_lowers_held_out_loss_and_records_coefficients_that_sum_to_one(config):
    config = with_cooking(config, learned=replace(config.cooking.learned, epochs=8, batch_size=64))
    soup = make_soup("learned_by_layer", Evaluator(config))
    assert soup["last_loss"] < soup["first_loss"]
    assert sum(member["weight"] for member in soup["ingredients"]) == pytest.approx(1)
    shares = pd.read_csv(RunFolder.of(config).soup("learned_by_layer") / "coefficients.csv").set_index("group")
    assert shares.shape[1] == ROWS + 1
    assert len(shares) > 5
    assert shares.sum(axis=1).to_numpy() == pytest.approx(1)


def test_wise_ft_lies_between_the_initialisation_and_the_soup(config):
    evaluator = Evaluator(config)
    with pytest.raises(UserError, match=r"greedy/weights.safetensors is missing: run python -m soups recipe=greedy"):
        make_soup("wise_ft", evaluator)
    make_soup("greedy", evaluator)
    half = with_cooking(config, alpha=0.25)
    make_soup("wise_ft", Evaluator(half))
    run = RunFolder.of(config)
    start, end, between = (
        load_weights(folder / "weights.safetensors")["head.weight"].double()
        for folder in (run.ingredient(0), run.soup("greedy"), run.soup("wise_ft"))
    )
    torch.testing.assert_close(between, 0.75 * start + 0.25 * end, rtol=1e-6, atol=1e-6)


def test_a_subset_names_its_rows(config):
    with pytest.raises(UserError, match=r"needs cooking.rows=\[...\] of rows \[0, 1, 2, 3, 4\]; got \[7\]"):
        make_soup("subset", Evaluator(with_cooking(config, rows=(7,))))
    chosen = with_cooking(config, rows=(3, 1))
    soup = make_soup("subset", Evaluator(chosen))
    assert [member["row"] for member in soup["ingredients"]] == [1, 3]


def test_a_changed_setting_of_a_recipe_makes_it_again_and_only_it(config):
    evaluator = Evaluator(config)
    before = {name: make_soup(name, evaluator)["identity"] for name in ("greedy", "uniform")}
    changed = with_cooking(config, ties="drop")
    after = {name: make_soup(name, Evaluator(changed))["identity"] for name in ("greedy", "uniform")}
    assert after["greedy"] != before["greedy"]
    assert after["uniform"] == before["uniform"]


def test_a_calibrated_ensemble_scales_each_member_by_its_own_temperature(config, tmp_path):
    evaluator = Evaluator(config)
    soup = make_soup("calibrated_ensemble", evaluator)
    pool = {ingredient.row: ingredient for ingredient in usable_pool(config)}
    expected = sum(
        beta * evaluator.logits(pool[m["row"]].digest, pool[m["row"]].load, "test").double() / (ROWS + 1)
        for m, beta in zip(soup["ingredients"], soup["betas"], strict=True)
    )
    torch.testing.assert_close(logits_of(soup, "test", evaluator), expected.float(), rtol=1e-5, atol=1e-5)
    assert len(set(soup["betas"])) > 1
    on_held_out = logits_of(soup, config.task.held_out, evaluator)
    mixed = mix("calibrated_ensemble", usable_pool(config), evaluator, tmp_path, "", split=config.task.held_out)
    torch.testing.assert_close(mixed.soup.weights["logits"], on_held_out, rtol=1e-5, atol=1e-5)


def test_the_doctor_examines_an_experiment_and_its_midpoints(config, capsys, monkeypatch):
    typed, three = [], replace(config, sweep=replace(config.sweep, rows=3))
    monkeypatch.setattr("soups.experiment.doctor.load", lambda *words: typed.append(words) or three)
    console = Console(width=200)
    examine_experiment("demo_tiny", config.paths.runs, barriers=True, console=console)
    output = capsys.readouterr().out
    assert typed == [("demo_tiny", f"paths.runs={config.paths.runs}")]
    assert "distances and angles to weights.safetensors" in output
    assert all(f"{row:03d}" in output for row in (1, 2, 3))
    assert "not calibrated for pools like yours" in output and "models is 3, there 12 to " in output
    assert "6 evaluations on held_out" in output
    assert output.count("the midpoint is") == 3


@pytest.mark.slow
def test_two_processes_share_the_candidates_of_greedy_and_make_the_soup_of_one(tmp_path):
    finished_pool(tmp_path / "one")
    words = ["experiment=demo_tiny", "task.classes=10", "analysis.resamples=200", *small_network(tmp_path / "one")]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    plain = make_soup("greedy", Evaluator(load("demo_tiny", f"paths.runs={tmp_path / 'one'}", *words[1:])))
    words += [f"paths.runs={tmp_path / 'two'}", "recipe=greedy", "cooking.shortcut=speculative", "cooking.ahead=1"]
    ended = in_two(["-m", "soups", *words, "cluster.threads=1"])
    assert [status for status, _, _ in ended] == [0, 0], ended
    folder = tmp_path / "two/demo_tiny/soups/greedy"
    made = json.loads((folder / "soup.json").read_text())
    assert [made[key] for key in ("digest", "ingredients", "trials")] == [
        plain[key] for key in ("digest", "ingredients", "trials")
    ]
    assert made["spent"]["rounds"] < made["spent"]["evaluations"]
    assert (folder / "journal.1.jsonl").exists()
