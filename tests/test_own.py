"""The commands for files of one's own: python -m soups ingredients=[...] and python -m soups.verify."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.schema import OwnPool
from soups.own import cook_files, describe, expand
from soups.verify import verify
from store.pickled import tied_names
from store.weights import load_weights, save_weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pool(tmp_path):
    """Three models of one number and a counter, and the initialisation, 0."""
    for i, value in enumerate([1.0, 2.0, 6.0]):
        save_file(
            {"w": torch.tensor([value]), "bn.running_mean": torch.tensor([value])}, tmp_path / f"m{i}.safetensors"
        )
    save_file({"w": torch.zeros(1), "bn.running_mean": torch.tensor([7.0])}, tmp_path / "init.safetensors")
    return tmp_path


def own(pool, **settings):
    settings = {"recipe": "uniform", "ingredients": (str(pool / "m*.safetensors"),)} | settings
    return OwnPool(**{"out": pool / "soup.safetensors", **settings})


def values(pool):
    return {name: tensor.item() for name, tensor in load_file(pool / "soup.safetensors").items()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"w": 3.0, "bn.running_mean": 3.0}),
        ({"recipe": "weighted", "weights": (2, 2, 0)}, {"w": 1.5, "bn.running_mean": 1.5}),
        ({"recipe": "wise_ft", "init": "init", "alpha": 0.25}, {"w": 0.75, "bn.running_mean": 0.75 * 7 + 0.25 * 3}),
        ({"recipe": "wise_ft", "init": "init", "batch_norm": "keep"}, {"w": 1.5, "bn.running_mean": 7.0}),
        ({"init": "init", "batch_norm": "keep"}, {"w": 3.0, "bn.running_mean": 7.0}),
    ],
)
def test_each_recipe_is_what_it_says_and_can_be_verified(pool, settings, expected):
    if "init" in settings:
        settings = settings | {"init": pool / "init.safetensors"}
    soup = cook_files(own(pool, **settings))
    assert values(pool) == pytest.approx(expected)
    assert f"{2 if 'weights' in settings else 4 if settings.get('recipe') == 'wise_ft' else 3} models" in describe(soup)
    assert verify(pool / "soup.safetensors") == ""


def test_the_metadata_carries_names_digests_weights_and_no_clock_or_path(pool):
    cook_files(own(pool, recipe="weighted", weights=(1, 1, 2)))
    with safe_open(pool / "soup.safetensors", "pt") as file:
        record = json.loads(file.metadata()["soup"])
    assert sorted((i["file"], i["weight"]) for i in record["ingredients"]) == [
        ("m0.safetensors", 0.25),
        ("m1.safetensors", 0.25),
        ("m2.safetensors", 0.5),
    ]
    assert len({i["digest"] for i in record["ingredients"]}) == 3
    assert record["note"]["recipe"] == "weighted"
    assert str(pool) not in json.dumps(record)


def test_the_same_command_twice_gives_the_same_bytes(pool):
    cook_files(own(pool))
    first = (pool / "soup.safetensors").read_bytes()
    backwards = tuple(str(pool / f"m{i}.safetensors") for i in (2, 0, 1))
    cook_files(own(pool, ingredients=backwards, out=pool / "other/soup.safetensors", threads=1))
    assert (pool / "other/soup.safetensors").read_bytes() == first


def command(module, *arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", module, *arguments]
    return subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_command_takes_patterns_cooks_and_says_what_it_did(pool):
    torch.save({"state_dict": load_file(pool / "m0.safetensors"), "epoch": 1}, pool / "m9.pt")
    answer = command("soups", "recipe=uniform", "ingredients=[m*.safetensors,m9.pt]", "out=soup.safetensors", cwd=pool)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.splitlines()[0] == "reads the 'state_dict' inside m9.pt"
    assert "are the same model, which counts twice" in answer.stdout.splitlines()[1]
    assert answer.stdout.splitlines()[2] == "soup.safetensors: 4 models of 2 parameters"
    assert values(pool)["w"] == 2.5
    answer = command("soups.verify", "soup.safetensors", cwd=pool)
    assert (answer.returncode, answer.stderr, len(answer.stdout.splitlines())) == (0, "", 1)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["recipe=greedy"], "recipe_has_what_it_needs|recipe=greedy needs held-out images and a network"),
        (["recipe=learned"], "recipe: Input should be 'uniform'"),
        (["recipe=weighted"], "weights=[...] and recipe=weighted belong together"),
        (["recipe=wise_ft"], "need the initialisation, init=FILE"),
        (["init=init.safetensors"], "would be ignored"),
        (["recipe=weighted", "weights=[1,2]"], "weights: need one per ingredient, got 2 for 3"),
        (["ingredients=[nothing*.pt]"], "no file matches 'nothing*.pt'"),
        (["ingredients=[nothing.pt]"], "nothing.pt does not exist"),
        (["ingredients=[m0.safetensors,m*.safetensors]"], "m0.safetensors is named twice"),
        (["out=m0.safetensors"], "is one of the ingredients, and would be overwritten"),
        (["recipe=wise_ft", "init=m0.safetensors"], "init=m0.safetensors is one of the ingredients too"),
        (["threads=0"], "threads: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_one_line(pool, words, error, capsys, monkeypatch):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from configs.schema import CONFIGS, parse_own

    monkeypatch.chdir(pool)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"), pytest.raises(UserError) as found:
        cook_files(parse_own(compose("own", ["ingredients=[m*.safetensors]", "out=soup.safetensors", *words])))
    assert any(part in str(found.value) for part in error.split("|"))
    assert "\n" not in str(found.value)
    assert not (pool / "soup.safetensors").exists()


def test_the_command_answers_a_wrong_setting_without_a_traceback(pool):
    answer = command("soups", "recipe=greedy", "ingredients=[m*.safetensors]", "out=soup.safetensors", cwd=pool)
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1
    assert "recipe=greedy needs held-out images and a network" in answer.stderr
    answer = command("soups", "ingredients=[m*.safetensors]", cwd=pool)
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)
    assert "Missing mandatory value: out" in answer.stderr


def test_a_pattern_is_sorted_and_may_be_absolute(pool):
    assert [path.name for path in expand((str(pool / "m[12].*"), str(pool / "m0.safetensors")))] == [
        "m1.safetensors",
        "m2.safetensors",
        "m0.safetensors",
    ]


def test_ingredients_are_found_by_content_wherever_they_are_and_however_they_are_called(pool):
    cook_files(own(pool))
    other = pool / "elsewhere"
    other.mkdir()
    for i in range(3):
        (pool / f"m{i}.safetensors").rename(other / f"renamed{i}.safetensors")
    assert "m0.safetensors is missing" in verify(pool / "soup.safetensors")
    assert verify(pool / "soup.safetensors", other) == ""
    with pytest.raises(UserError, match="is not a folder"):
        verify(pool / "soup.safetensors", pool / "nowhere")


def test_a_missing_and_a_changed_ingredient_are_named(pool):
    cook_files(own(pool))
    (pool / "m0.safetensors").unlink()
    save_file({"w": torch.tensor([2.5]), "bn.running_mean": torch.zeros(1)}, pool / "m1.safetensors")
    answer = command("soups.verify", "soup.safetensors", cwd=pool)
    assert answer.returncode == 1
    assert "m0.safetensors is missing" in answer.stdout
    assert "m1.safetensors was changed" in answer.stdout
    assert len(answer.stdout.splitlines()) == 1


def test_every_flipped_byte_of_a_soup_is_noticed(pool):
    cook_files(own(pool))
    path = pool / "soup.safetensors"
    content = path.read_bytes()
    for place in [*range(0, len(content), 13), len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            problem = verify(path)
        except UserError as error:
            problem = str(error)
        assert problem, f"byte {place} of {len(content)}"
        assert "\n" not in problem


def test_a_record_that_names_other_files_is_noticed(pool):
    cook_files(own(pool))
    path = pool / "soup.safetensors"
    path.write_bytes(path.read_bytes().replace(b"m0.safetensors", b"n0.safetensors"))
    with pytest.raises(UserError, match="no whole record of how it was cooked"):
        verify(path)


@pytest.mark.parametrize("how", ["missing", "not a soup", "flipped"])
def test_verify_answers_what_it_cannot_cook_in_one_line_and_status_1(pool, how):
    cook_files(own(pool))
    path = pool / "soup.safetensors"
    match how:
        case "missing":
            path.unlink()
        case "not a soup":
            save_file({"w": torch.zeros(1)}, path)
        case "flipped":
            path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    answer = command("soups.verify", "soup.safetensors", cwd=pool)
    assert (answer.returncode, answer.stderr, len(answer.stdout.splitlines())) == (1, "", 1)


def test_a_full_disk_is_one_line_before_any_work(pool):
    small = Path("/dev/shm") / f"model-soups-own-{os.getpid()}"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True, check=False
    ).returncode
    try:
        if mounted != 0:
            pytest.skip("mounting a small file system needs root")
        bad = torch.full((100_000,), float("nan"))  # is found out in the first block, so the disk was asked before
        save_file({"w": bad}, pool / "big.safetensors")
        answer = command("soups", "ingredients=[big.safetensors]", f"out={small}/soup.safetensors", cwd=pool)
        assert answer.returncode == 2
        assert answer.stderr.startswith("error: no space left on the disk for ")
        assert len(answer.stderr.splitlines()) == 1
        assert not list(small.iterdir())
    finally:
        if mounted == 0:
            subprocess.run(["umount", small], check=True)
        small.rmdir()


def test_a_tied_soup_in_memory_can_be_saved(tmp_path):
    w = torch.ones(2)
    save_weights(tmp_path / "w.safetensors", {"a": w, "b": w})
    back = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(back["a"], back["b"])
    assert not tied_names(back)
