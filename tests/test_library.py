"""The library: sources, recipes, scores, journals and what a soup says, on models of a few numbers."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import soups
from soups.errors import UserError
from soups.record import metadata_of, read_yaml
from soups.scores import reduced
from soups.scoring import Gain, Scored, Scorer, gain_of, mean_of_answers, scored
from soups.sources import in_natural_order
from soups.verify import verify
from tests.saved import record_in

VALUES = {"run1": 1.0, "run2": 2.0, "run10": 6.0}


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Three models of one number, and the initialisation, 0."""
    for name, value in VALUES.items():
        save_file(model(value), tmp_path / f"{name}.safetensors")
    save_file({"w": torch.zeros(1), "bn.running_mean": torch.tensor([7.0])}, tmp_path / "init.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(value):
    return {"w": torch.tensor([value]), "bn.running_mean": torch.tensor([value])}


def distance(weights):
    """From 1.4, to which run1 is nearest and the mean of run1 and run2 nearer."""
    return abs(weights["w"].item() - 1.4)


def greedy(pool, **settings):
    return soups.greedy("run*.safetensors", distance, "min", quiet=True, **settings)


def test_a_pattern_is_sorted_as_people_count(pool):
    assert soups.uniform("run*.safetensors").names == ["run1.safetensors", "run2.safetensors", "run10.safetensors"]
    assert in_natural_order([Path("a/run10"), Path("a/run9")])[0] == Path("a/run9")


def test_sources_are_paths_patterns_dicts_modules_and_loaders_in_any_mixture(pool):
    module = nn.Linear(1, 1, bias=False)
    module.load_state_dict({"weight": torch.tensor([[4.0]])})
    sources = [pool / "run1.safetensors", "run2.*", {"w": torch.tensor([6.0])}, lambda: {"w": torch.tensor([3.0])}]
    for path in ("run1", "run2"):
        save_file({"w": torch.tensor([VALUES[path]])}, pool / f"{path}.safetensors")
    soup = soups.uniform(sources)
    assert soup.weights["w"].item() == 3.0
    assert soup.names == ["run1.safetensors", "run2.safetensors", "model 2", "model 3"]
    assert soups.uniform([module, {"weight": torch.tensor([[2.0]])}]).weights["weight"].item() == 3.0


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: soups.uniform("run*.safetensors"), 3.0),
        (lambda: soups.weighted("run*.safetensors", [2, 2, 0]), 1.5),
        (lambda: soups.wise_ft("init.safetensors", "run*.safetensors", 0.25), 0.75),
        (lambda: soups.greedy("run*.safetensors", distance, "min", quiet=True), 1.5),
        (lambda: soups.with_replacement("run*.safetensors", distance, "min", quiet=True, rounds=4), 4 / 3),
        (lambda: soups.random_order("run*.safetensors", lambda w: -distance(w), "max", quiet=True, seed=3), None),
        (lambda: soups.model_stock("init.safetensors", "run*.safetensors"), 3.0),
    ],
    ids=["uniform", "weighted", "wise_ft", "greedy", "with_replacement", "random_order", "model_stock"],
)
def test_each_recipe_is_what_it_says_and_its_file_can_be_verified(pool, make, expected):
    soup = make()
    path = soup.save(pool / "soup.safetensors")
    found = load_file(path)["w"].item()
    assert found == pytest.approx(soup.weights["w"].item())
    assert expected is None or found == pytest.approx(expected)
    assert verify(path) == ""
    assert record_in(path)["note"]["recipe"] == soup.recipe


def test_batch_norms_of_the_initialisation_are_kept_by_every_recipe_that_is_told_to(pool):
    settings = {"batch_norm": "keep", "init": "init.safetensors"}
    for soup in (soups.uniform("run*.safetensors", **settings), greedy(pool, **settings)):
        assert soup.weights["bn.running_mean"].item() == 7.0
    with pytest.raises(UserError, match="belong together"):
        soups.uniform("run*.safetensors", init="init.safetensors")
    with pytest.raises(TypeError, match="alpha"):
        soups.uniform("run*.safetensors", alpha=0.5)


def test_a_greedy_soup_prints_its_decisions_and_what_it_gains(pool):
    text = str(greedy(pool))
    lines = [line.split() for line in text.splitlines()]
    assert lines[:4] == [
        ["file", "weight", "alone", "with", "it"],
        ["run1.safetensors", "0.5", "0.4000", "0.4000", "kept"],
        ["run2.safetensors", "0.5", "0.6000", "0.1000", "kept"],
        ["run10.safetensors", "4.6000", "1.6000", "left", "out"],
    ]
    assert "greedy: 2 of 3 models, score 0.1000 (lower is better)" in text
    assert "best single model: run1.safetensors, 0.4000; the soup gains +0.3000 (no interval" in text


def test_scores_have_the_decimals_that_tell_them_apart(pool):
    small = soups.greedy("run*.safetensors", lambda weights: distance(weights) / 1e5, "min", quiet=True)
    lines = [line.split() for line in str(small).splitlines()]
    assert [line[-3:-1] for line in lines[1:3]] == [["0.000004", "0.000004"], ["0.000006", "0.000001"]]
    assert lines[3][-4:-2] == ["0.000046", "0.000016"]
    assert "the soup gains +0.000003" in str(small)
    large = soups.greedy("run*.safetensors", lambda weights: 2000 + distance(weights) / 100, "min", quiet=True)
    assert "2000.006" in str(large) and "2000.004" in str(large)


def test_a_soup_that_answers_as_the_best_model_does_gains_nothing_in_words(pool):
    soup = soups.greedy("run*.safetensors", lambda weights: np.array([1.0, 0.0]), "max", quiet=True)
    assert len(soup.shares) == 3
    assert "the soup gains nothing: both answer every example equally well" in str(soup)
    assert "0.0000," not in str(soup)


def test_greedy_that_kept_only_the_best_model_says_so_and_why(pool):
    soup = soups.greedy("run*.safetensors", lambda w: abs(w["w"].item() - 1), "min", quiet=True)
    assert soup.save("soup.safetensors").exists()
    assert "greedy kept only the best single model, run1.safetensors: each of the other 2 made the score worse" in str(
        soup
    )
    assert "the nearest, run2.safetensors, by 0.5000" in str(soup)


def test_one_number_for_each_example_gives_a_paired_interval():
    hits = {"a": [1, 1, 0, 0], "b": [1, 1, 1, 0]}
    scorer = Scorer(lambda candidate: Scored(0.0), "max", "top1", "", mean_of_answers)
    one, other = (scored(np.array(each), "x") for each in hits.values())
    gain = gain_of(scorer, other, one)
    assert gain.mean == 0.25
    assert gain.low == 0.0 < gain.high == 0.75  # of four images one differs: it is drawn 0 to 3 times in 95 %
    assert gain_of(scorer, other, Scored(0.5)) == Gain(0.25)
    single = gain_of(scorer, Scored(1.0, np.array([1.0])), Scored(0.0, np.array([0.0])))
    assert single == Gain(1.0)  # of one example nothing can be resampled
    assert gain_of(Scorer(scorer.measure, "min", "x", ""), Scored(1.0), Scored(3.0)).mean == 2.0


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_numbers_of_numpy_and_torch_are_scores(value):
    assert scored(value, "x") == Scored(0.5)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "of run1 is NaN"),
        (torch.tensor([1.0, float("nan")]), "is NaN"),
        ("0.5 %", "is a str"),
        (None, "NoneT"),
    ],
)
def test_what_is_no_score_is_refused_by_the_name_of_the_model(value, words):
    with pytest.raises(UserError, match=words):
        scored(value, "run1")


def test_scores_that_are_given_are_not_computed_again_and_others_are(pool):
    asked = []

    def score(weights):
        asked.append(weights["w"].item())
        return distance(weights)

    given = {"run1.safetensors": 0.4, str(pool / "run2.safetensors"): 0.6}
    soup = soups.greedy("run*.safetensors", score, "min", scores=given, quiet=True)
    assert asked == [6.0, 1.5, 3.0]
    assert soup.alone == {"run1.safetensors": 0.4, "run2.safetensors": 0.6, "run10.safetensors": pytest.approx(4.6)}
    with (pool / "scores.csv").open("w") as file:
        csv.writer(file).writerows([["file", "score"], *given.items()])
    (pool / "scores.jsonl").write_text("\n".join(json.dumps({"file": k, "score": v}) for k, v in given.items()))
    (pool / "scores.json").write_text(json.dumps(given))
    for kind in ("csv", "jsonl", "json"):
        assert soups.greedy("run*.safetensors", score, "min", scores=f"scores.{kind}", quiet=True).alone == soup.alone


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"run3.safetensors": 0.4}, "'run3.safetensors' is none of the models, which are run1.safetensors"),
        ({"run1.safetensors": float("nan")}, "the score of run1.safetensors is NaN"),
        ({"run1.safetensors": "good"}, "is 'good', not a number"),
        ({"run1.safetensors": 0.4, "./run1.safetensors": 0.5}, "run1.safetensors has the scores 0.4 and 0.5"),
        ("nothing.csv", "nothing.csv does not exist"),
    ],
)
def test_given_scores_that_are_wrong_are_refused(pool, given, words):
    with pytest.raises(UserError, match=words):
        greedy(pool, scores=given)


def test_a_journal_spares_a_second_run_every_score_and_a_changed_model_is_scored_anew(pool):
    asked = []

    def score(weights):
        asked.append(weights["w"].item())
        return distance(weights)

    def run():
        return soups.greedy("run*.safetensors", score, "min", journal="scores.jsonl", quiet=True)

    first = run()
    assert len(asked) == 5
    again = run()
    assert len(asked) == 5
    assert again.decisions == first.decisions
    save_file(model(1.2), pool / "run2.safetensors")
    run()
    assert asked[5:] == pytest.approx([1.2, 1.1, 3.6])  # run2 is the best now


def test_the_key_of_a_score_knows_the_averaging_and_that_two_of_the_same_are_one(pool):
    asked = []

    def score(weights):
        asked.append(weights["w"].dtype)
        return distance(weights)

    for dtype in ("keep", "F64", "keep"):
        soups.greedy("run*.safetensors", score, "min", journal="scores.jsonl", dtype=dtype, quiet=True)
    assert asked == [torch.float32] * 5 + [torch.float64] * 5
    assert reduced((4, 4)) == reduced((4,)) == {4: 1}


def test_a_model_with_nan_is_one_line_before_anything_is_scored(pool):
    save_file(model(float("nan")), pool / "run2.safetensors")
    with pytest.raises(UserError, match=r"run2\.safetensors: tensor 'bn\.running_mean' holds NaN or infinity"):
        soups.greedy("run*.safetensors", lambda weights: pytest.fail("it was scored"), "min", quiet=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: soups.uniform("nothing*.pt"), r"no file matches 'nothing\*\.pt'"),
        (lambda: soups.uniform([]), "no models"),
        (lambda: soups.uniform(["run1.safetensors", "./run1.safetensors"]), "is named twice"),
        (lambda: soups.weighted("run*.safetensors", [1, 2]), "need one for each of 3 models, got 2"),
        (lambda: soups.weighted("run*.safetensors", [1, -1, 1]), "of at least 0"),
        (lambda: soups.wise_ft("init.safetensors", "run*.safetensors", 1.5), "alpha is in"),
        (lambda: soups.slerp("run1.safetensors"), "between two models, and these are 1"),
        (lambda: soups.slerp(["run1.safetensors", "run2.safetensors"], 1.5), r"t is in \[0, 1\]"),
        (lambda: soups.arithmetic("init.safetensors", "run*.safetensors", [1.0]), "one for each of 3 models, got 1"),
        (lambda: soups.arithmetic("init.safetensors", "run1.safetensors", [float("inf")]), "need finite numbers"),
        (lambda: soups.ties("init.safetensors", "run*.safetensors", density=0), r"a share in \(0, 1\], got 0"),
        (lambda: soups.wise_ft("run1.safetensors", "run*.safetensors"), "is the initialisation and one of the models"),
        (lambda: soups.model_stock("init.safetensors", "run1.safetensors"), "at least two"),
        (lambda: soups.greedy("run*.safetensors", distance), "--goal max or --goal min"),
        (lambda: soups.greedy("run*.safetensors", distance, "minimize"), "--goal max or --goal min .*; got 'minimize'"),
        (lambda: soups.greedy("run*.safetensors", distance, "min", ties="dropp"), "ties='dropp': write keep or drop"),
        (lambda: soups.uniform("run*.safetensors", dtype=torch.float16), "torch.float16: write keep, F64, F32, F16 or"),
        (lambda: soups.greedy("run*.safetensors", "python eval.py", "max"), "where the file to be scored stands"),
        (lambda: soups.greedy("run*.safetensors", "nothing_here:f", "max"), "No module named 'nothing_here'"),
        (
            lambda: soups.greedy("run*.safetensors", distance, "min", journal="."),
            "is no journal of scores: name another",
        ),
        (lambda: soups.uniform([3]), "is a int, not a path"),
        (lambda: soups.uniform("run*.safetensors").save("run1.safetensors"), "would be overwritten"),
        (lambda: soups.uniform("run*.safetensors").save("."), "would be overwritten"),
        (lambda: soups.uniform("run*.safetensors", batch_norm="recompute"), "type --images DIR --network NAME"),
    ],
)
def test_what_is_wrong_is_one_line(pool, make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_learned_soup_takes_a_loss_of_ones_own_and_goes_on_where_it_was_stopped(pool):
    for name, value in VALUES.items():
        save_file({"weight": torch.tensor([[value]])}, pool / f"{name}.safetensors")
    network, batches = nn.Linear(1, 1, bias=False), [torch.ones(4, 1)] * 5

    def loss(module, batch):
        return (module(batch) - 1.5).square().mean()

    how = {"lr": 0.3, "epochs": 6, "state": "state.pt"}
    soup = soups.learned("run*.safetensors", soups.user_loss(network, batches, loss), **how)
    assert soup.weights["weight"].item() == pytest.approx(1.5, abs=0.2)
    assert soup.record["last_loss"] < soup.record["first_loss"] / 10
    again = soups.learned("run*.safetensors", soups.user_loss(network, [], loss), **how)
    assert again.shares == soup.shares
    with pytest.raises(UserError, match="not of this network: 'bias' is in the network alone"):
        soups.learned("run*.safetensors", soups.user_loss(nn.Linear(1, 1), batches, loss))


def test_heads_that_differ_are_the_first_models_and_keys_say_which_weights(pool):
    for i, size in enumerate((2, 3)):
        state = {"w": torch.tensor([float(i)]), "head": torch.full((size,), float(i))}
        torch.save({"state_dict": state, "ema": {"w": torch.tensor([i + 5.0])}}, pool / f"m{i}.pt")
    assert soups.uniform("m*.pt", key="ema").weights["w"].item() == 5.5
    soup = soups.uniform(["m1.pt", "m0.pt"], key="state_dict", exclude="head").weights
    assert (soup["w"].item(), soup["head"].tolist()) == (0.5, [1.0, 1.0, 1.0])
    found = soups.greedy(["m1.pt", "m0.pt"], distance, "min", key="ema", quiet=True).save("best.pt")
    assert torch.load(found) == {"ema": {"w": torch.tensor([5.0])}}


def test_what_all_models_have_is_decided_over_the_whole_pool(pool):
    for i, value in enumerate((1.0, 2.0, 6.0)):
        state = {"w": torch.tensor([value]), "head": torch.tensor([value])}
        save_file(state if i else {"w": state["w"]}, pool / f"m{i}.safetensors")
    with pytest.raises(UserError, match="--only-common"):
        soups.greedy("m?.safetensors", distance, "min", quiet=True)
    # The two models that have a head are the soup, and yet the third, without one, keeps it from being averaged.
    seen = []

    def score(weights):
        seen.append((weights["w"].item(), weights["head"].item() if "head" in weights else None))
        return abs(weights["w"].item() - 4)

    soup = soups.greedy("m?.safetensors", score, "min", only_common=True, quiet=True)
    assert (4.0, 2.0) in seen
    path = soup.save("soup.safetensors")
    assert load_file(path)["head"].item() == 2.0
    assert "head is not averaged: it is the first model's" in soup.remarks
    assert verify(path) == ""
    whole = soups.uniform("m?.safetensors", only_common=True)
    assert load_file(whole.save("whole.safetensors")).keys() == {"w"}
    assert "head is dropped: the first model does not have it" in whole.remarks


@pytest.mark.parametrize("name", ["soup.pt", "soup.ckpt"])
def test_a_soup_of_torch_save_loads_as_its_models_do_and_can_be_verified_by_the_record_beside_it(pool, name):
    for i in range(2):
        tied = torch.tensor([[i + 1.0, 2.0]])
        torch.save({"net": {"module.a": tied, "module.b": tied, "module.n": 3}, "epoch": i}, pool / f"m{i}.pt")
    soup = soups.weighted("m?.pt", [3, 1])
    path = soup.save(name)
    written, state = path.read_bytes(), torch.load(path)
    assert verify(path) == ""
    assert state["net"]["module.a"].tolist() == [[1.25, 2.0]] and state["net"]["module.n"] == 3
    assert state["net"]["module.a"].data_ptr() == state["net"]["module.b"].data_ptr()
    soup.save(name)
    assert path.read_bytes() == written
    state["net"]["module.a"] += 1
    torch.save(state, path)
    assert "it differs" in verify(path)
    path.write_bytes(written)
    recipe = pool / f"{name}.recipe.yaml"
    before = pool / f"{name}.soup.json"  # as it lay there once
    before.write_text(json.dumps(metadata_of(read_yaml(recipe))))
    recipe.unlink()
    assert verify(path) == ""
    before.unlink()
    with pytest.raises(UserError, match="no whole record"):
        verify(path)
    plain = soups.uniform("run*.safetensors").save("plain.pth")  # of files that have no key
    assert torch.load(plain)["w"].item() == 3.0


@pytest.mark.parametrize("init", ["init.safetensors", {"w": torch.zeros(1), "bn.running_mean": torch.tensor([7.0])}])
def test_an_initialisation_that_is_no_file_keeps_its_batch_norms_too(pool, init):
    for recipe in (soups.wise_ft, soups.model_stock, soups.ties):
        assert recipe(init, "run*.safetensors", batch_norm="keep").weights["bn.running_mean"].item() == 7.0


def test_an_initialisation_called_as_a_model_is_told_from_it(pool):
    (pool / "start").mkdir()
    save_file(model(0.0), pool / "start/run1.safetensors")
    soup = soups.wise_ft("start/run1.safetensors", "run*.safetensors", 0.5)
    assert soup.shares["start/run1.safetensors"] == 0.5
    assert sum(soup.shares.values()) == pytest.approx(1)
