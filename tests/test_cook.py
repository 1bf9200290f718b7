"""From a pool on disk to soups: only the held-out split chooses, and a stop in between costs nothing."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from analysis.results import measure, refuse_leak
from configs.errors import UserError
from configs.schema import load
from eval.forward import Evaluator
from finetune.train import initialise
from soups.cook import ENSEMBLES, Journal, cook, logits_of, usable_pool
from store.atomic import read_json, write_json
from store.runs import RunFolder
from store.weights import load_weights, save_weights

ROWS = 4
ORDER = [2, 4, 0, 1, 3]  # best first on held-out, as planted below


@pytest.fixture(scope="module")
def pool_config(tmp_path_factory):
    """A pool of the initialisation and four noisy copies of it, with planted held-out scores."""
    torch.set_num_threads(1)
    config = load("demo_tiny", f"sweep.rows={ROWS}", f"paths.runs={tmp_path_factory.mktemp('runs')}")
    done = initialise(config)
    run = RunFolder.of(config)
    start = load_weights(run.ingredient(0) / "weights.safetensors")
    for row in range(1, ROWS + 1):
        generator = torch.Generator().manual_seed(row)
        head = start["head.weight"]
        noisy = start | {"head.weight": head + head.std() * torch.randn(head.shape, generator=generator)}
        digest = save_weights(run.ingredient(row) / "weights.safetensors", noisy)
        write_json(run.ingredient(row) / "done.json", done | {"row": row, "digest": digest})
    for place, row in enumerate(ORDER):
        path = run.ingredient(row) / "done.json"
        record = read_json(path)
        score = {"split": "held_out", "correct": 30 - place, "n": 40}
        write_json(path, record | {"held_out": score})
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
    """The pool, with no soup cooked yet."""
    run = RunFolder.of(pool_config)
    for recipe in pool_config.recipes:
        for file in run.soup(recipe).glob("*"):
            file.unlink()
    return pool_config


def test_no_recipe_looks_at_any_split_but_held_out(config):
    for recipe in config.recipes:
        evaluator = Watched(config)
        cook(config, recipe, evaluator)
        assert evaluator.asked == {"held_out"}, recipe


def test_the_best_individual_is_the_best_on_held_out(config):
    evaluator = Evaluator(config)
    cooked = cook(config, "best", evaluator)
    assert [member["row"] for member in cooked["ingredients"]] == [ORDER[0]]
    pool = {ingredient.row: ingredient for ingredient in usable_pool(config)}
    expected = evaluator.logits(pool[2].digest, pool[2].load, "test")
    assert torch.equal(logits_of(config, cooked, "test", evaluator), expected)


def test_greedy_tries_the_pool_best_first_and_keeps_what_does_not_lower_held_out(config):
    evaluator = Evaluator(config)
    cooked = cook(config, "greedy", evaluator)
    assert [trial["row"] for trial in cooked["trials"]] == ORDER
    best = cooked["trials"][0]["score"]
    for trial in cooked["trials"][1:]:
        assert trial["accepted"] == (trial["score"] >= best)
        best = max(best, trial["score"]) if trial["accepted"] else best
    kept = [trial["row"] for trial in cooked["trials"] if trial["accepted"]]
    assert kept == [member["row"] for member in cooked["ingredients"]]


def test_the_uniform_soup_on_disk_is_the_mean_of_all_models(config):
    cook(config, "uniform", Evaluator(config))
    soup = load_weights(RunFolder.of(config).soup("uniform") / "weights.safetensors")
    heads = torch.stack([ingredient.load()["head.weight"].double() for ingredient in usable_pool(config)])
    torch.testing.assert_close(soup["head.weight"], heads.mean(dim=0).float(), rtol=0, atol=1e-6)


def test_an_ensemble_has_the_mean_of_its_members_logits_on_every_split(config):
    evaluator = Evaluator(config)
    for recipe in ENSEMBLES:
        cooked = cook(config, recipe, evaluator)
        rows = {member["row"] for member in cooked["ingredients"]}
        members = [ingredient for ingredient in usable_pool(config) if ingredient.row in rows]
        logits = [evaluator.logits(i.digest, i.load, "v2").double() for i in members]
        torch.testing.assert_close(
            logits_of(config, cooked, "v2", evaluator), torch.stack(logits).mean(dim=0).float(), rtol=1e-6, atol=1e-6
        )


def test_a_recipe_cooked_before_is_not_cooked_again_until_the_pool_changes(config):
    evaluator = Evaluator(config)
    first = cook(config, "greedy", evaluator)
    file = RunFolder.of(config).soup("greedy") / "weights.safetensors"
    stamp = file.stat().st_mtime_ns
    assert cook(config, "greedy", evaluator) == first
    assert file.stat().st_mtime_ns == stamp
    fewer = replace(config, sweep=replace(config.sweep, rows=ROWS - 1))
    assert [trial["row"] for trial in cook(fewer, "greedy", evaluator)["trials"]] == [2, 0, 1, 3]


def test_a_killed_greedy_run_pays_for_no_candidate_twice(config):
    counted = []

    class Counting(Evaluator):
        def fresh_logits(self, weights, split):
            counted.append(split)
            if len(counted) == 3:
                raise KeyboardInterrupt
            return super().fresh_logits(weights, split)

    evaluator = Counting(config)
    with pytest.raises(KeyboardInterrupt):
        cook(config, "greedy", evaluator)
    assert len(Journal(RunFolder.of(config).soup("greedy") / "journal.jsonl").rows) == 2
    resumed = cook(config, "greedy", evaluator)
    # 4 candidates: 2 before the stop, the one it fell in, and then 2 more and the finished soup's own logits.
    assert len(counted) in (5, 6)
    RunFolder.of(config).soup("greedy").joinpath("soup.json").unlink()
    RunFolder.of(config).soup("greedy").joinpath("journal.jsonl").unlink()
    undisturbed = cook(config, "greedy", Evaluator(config))
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
    with pytest.raises(UserError, match=r"rows \[5, 6\] of .* are not finished: run python -m finetune"):
        cook(more, "uniform", Evaluator(more))


def test_a_damaged_ingredient_is_named(config):
    path = RunFolder.of(config).ingredient(1) / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(UserError, match=r"ingredients/001/weights.safetensors.*damaged.*delete its folder"):
            cook(config, "uniform", Evaluator(config))
    finally:
        path.write_bytes(whole)
    assert not (RunFolder.of(config).soup("uniform") / "soup.json").exists()


def test_a_table_refuses_a_recipe_that_selected_on_a_reporting_split(config):
    evaluator = Evaluator(config)
    for recipe in config.recipes:
        cook(config, recipe, evaluator)
    measure(config, evaluator)
    path = RunFolder.of(config).soup("best") / "soup.json"
    write_json(path, read_json(path) | {"selected_on": {"split": "test", "digest": "0"}})
    with pytest.raises(UserError, match="recipe best selected on 'test', not on the held-out split"):
        measure(config, evaluator)
    refuse_leak(config, {"recipe": "best", "selected_on": {"split": "held_out"}})


def test_a_second_look_does_no_forward_pass(config):
    evaluator = Evaluator(config)
    for recipe in config.recipes:
        cook(config, recipe, evaluator)
    first, _ = measure(config, evaluator)

    class Refusing(Evaluator):
        def fresh_logits(self, weights, split):
            raise AssertionError(f"a forward pass on {split}")

    second, _ = measure(config, Refusing(config))
    assert pd.Series([m.accuracy("test") for m in first]).equals(pd.Series([m.accuracy("test") for m in second]))
