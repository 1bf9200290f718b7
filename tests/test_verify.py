"""Whether a soup is what its metadata says."""

import json

import pytest
import torch
from safetensors.torch import save_file

import soups
from soups.cli import main
from soups.errors import UserError
from soups.verify import verify
from tests.saved import record_in


@pytest.fixture
def pool(tmp_path):
    """Three models of one number and one of a batch norm's."""
    for i, value in enumerate([1.0, 2.0, 6.0]):
        save_file(
            {"w": torch.tensor([value]), "bn.running_mean": torch.tensor([value])}, tmp_path / f"m{i}.safetensors"
        )
    return tmp_path


def make_soup(pool):
    return soups.uniform(str(pool / "m*.safetensors")).save(pool / "soup.safetensors")


def test_the_metadata_carries_names_digests_weights_and_no_clock_or_path(pool):
    soups.weighted(str(pool / "m*.safetensors"), [1, 1, 2]).save(pool / "soup.safetensors")
    record = record_in(pool / "soup.safetensors")
    assert sorted((i["file"], i["weight"]) for i in record["ingredients"]) == [
        ("m0.safetensors", 0.25),
        ("m1.safetensors", 0.25),
        ("m2.safetensors", 0.5),
    ]
    assert len({i["digest"] for i in record["ingredients"]}) == 3
    assert record["note"]["recipe"] == "weighted"
    assert str(pool) not in json.dumps(record)


def test_a_soup_is_the_same_however_the_paths_of_its_models_are_typed(pool, monkeypatch):
    (pool / "a").mkdir()
    (pool / "b").mkdir()
    (pool / "m1.safetensors").rename(pool / "a/m0.safetensors")
    (pool / "m2.safetensors").rename(pool / "b/m0.safetensors")
    monkeypatch.chdir(pool)
    ways = [
        ("m0.safetensors", "a/m0.safetensors", "b/m0.safetensors"),
        (str(pool / "m0.safetensors"), "./a/m0.safetensors", "a/../b/m0.safetensors"),
        ("a/../m0.safetensors", str(pool / "a/m0.safetensors"), str(pool / "b/m0.safetensors")),
    ]
    made = []
    for first, second, start in ways:
        soups.wise_ft(start, [first, second], 0.25).save("soup.safetensors")
        main(
            ["uniform", second, first, start, "--keep", "^w$", "--from", start, "--out", "kept.safetensors", "--force"]
        )
        soups.weighted([first, second], [1, 1], init=start, batch_norm="keep").save("norm.safetensors")
        made.append([(pool / f"{name}.safetensors").read_bytes() for name in ("soup", "kept", "norm")])
        assert [verify(pool / f"{name}.safetensors") for name in ("soup", "kept", "norm")] == ["", "", ""]
    assert made[1] == made[0] and made[2] == made[0]


def test_ingredients_are_found_by_content_wherever_they_are_and_however_they_are_called(pool):
    make_soup(pool)
    other = pool / "elsewhere"
    other.mkdir()
    for i in range(3):
        (pool / f"m{i}.safetensors").rename(other / f"renamed{i}.safetensors")
    problem = verify(pool / "soup.safetensors")
    assert "m0.safetensors is missing" in problem and problem.endswith("; --folder DIR says where they are")
    assert verify(pool / "soup.safetensors", other) == ""
    with pytest.raises(UserError, match="is not a folder"):
        verify(pool / "soup.safetensors", pool / "nowhere")


def test_a_missing_and_a_changed_ingredient_are_named(pool):
    make_soup(pool)
    (pool / "m0.safetensors").unlink()
    save_file({"w": torch.tensor([2.5]), "bn.running_mean": torch.zeros(1)}, pool / "m1.safetensors")
    problem = verify(pool / "soup.safetensors")
    assert "m0.safetensors is missing" in problem
    assert "m1.safetensors was changed" in problem
    assert "\n" not in problem


def test_every_flipped_byte_of_a_soup_is_noticed(pool):
    make_soup(pool)
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


def test_verify_answers_what_it_cannot_make_in_one_line_and_status_1(pool, capsys):
    whole = make_soup(pool).read_bytes()
    (pool / "flipped.safetensors").write_bytes(whole[:-1] + b"\x7f")
    for name in ("flipped", "nothing", "m0"):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(pool / f"{name}.safetensors")])
        printed = capsys.readouterr()
        assert (ended.value.code, printed.err, len(printed.out.splitlines())) == (1, "", 1)
