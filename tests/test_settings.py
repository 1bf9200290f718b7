"""Every setting of every recipe is used or refused: none is accepted and ignored."""

import argparse

import pytest
import torch
from safetensors.torch import load_file

from soups.cli import RUN, _parser, main
from tests.kinds import model

SCORE = ["--score", "my_score:score", "--goal", "max"]
RECIPES = {  # name -> what it needs beside the files
    "uniform": [],
    "weighted": ["--weights", "1,2"],
    "wise-ft": ["--init", "start.pt"],
    "model-stock": ["--init", "start.pt"],
    "arithmetic": ["--init", "start.pt", "--scales", "0.5,-0.2"],
    "ties": ["--init", "start.pt"],
    "dare": ["--init", "start.pt"],
    "slerp": [],
    "greedy": SCORE,
    "random-order": SCORE,
    "with-replacement": SCORE,
    "learned": ["--loss", "my_score:parts", "--epochs", "2"],
}
TENSORS, BYTES, NOTHING = "other tensors", "another record", "the same file"
EFFECTS = {  # another value of a setting, and what it changes; or the words with which it is refused
    "--key": ("ema", TENSORS),
    "--exclude": ("^fc", TENSORS),
    "--keep": ("^fc", TENSORS),
    "--dtype": ("F16", TENSORS),
    "--threads": ("1", NOTHING),
    "--batch-norm": ("keep", TENSORS),
    "--alpha": ("0.25", TENSORS),
    "--weights": ("3,1", TENSORS),
    "--scales": ("0.1,0.1", TENSORS),
    "--density": ("0.7", TENSORS),
    "--scale": ("2", TENSORS),
    "--seed": ("1", BYTES),
    "--rescale": ("l1", TENSORS),
    "--normalize": (None, NOTHING),
    "--no-normalize": (None, TENSORS),
    "--t": ("0.2", TENSORS),
    "--goal": ("min", TENSORS),
    "--ties": ("drop", BYTES),
    "--scores": ("scores.json", BYTES),
    "--rounds": ("1", TENSORS),
    "--per": ("tensor", TENSORS),
    "--lr": ("0.3", TENSORS),
    "--epochs": ("1", TENSORS),
    "--weight-decay": ("0.5", TENSORS),
    "--place": ("host", NOTHING),
    "--score": ("my_score:other", TENSORS),
    "--loss": ("my_score:other_parts", TENSORS),
    "--images": ("held_out", ("is for --batch-norm recompute", "not allowed with argument")),
    "--texts": ("held_out", ("not allowed with argument",)),
    "--perplexity": ("held_out", ("not allowed with argument",)),
    "--choices": ("held_out", ("not allowed with argument",)),
    "--base": ("start.pt", ("--base is for folders of LoRA adapters, and m0.pt is none",)),  # tests/test_lora_peft.py
}
# Settings of held-out examples, which none of these pools has.
OF_EXAMPLES = {"--network": "timm:x", "--batch-size": "2", "--image-size": "8", "--workers": "1", "--templates": "name"}
OF_EXAMPLES |= {"--columns": "text", "--label": "label", "--max-length": "8", "--metric": "top1", "--per-token": None}
ELSEWHERE = {"-h", "--help", "--out", "--force", "--init", "--only-common", "--allow-unrelated", "--journal"}  # below
ELSEWHERE |= {"--last", "--top", "--by"}  # tests/test_along.py
ELSEWHERE |= {"--min-sigma", "--report"}  # tests/test_results.py
ELSEWHERE |= {"--from"}  # tests/test_aligned.py


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Two models with an average of each beside it, their start, and scores and losses of them."""
    folder = tmp_path_factory.mktemp("pool")
    for i in range(2):
        state, start = model(i + 1), model(7 * i)
        state["bn.running_var"] = state["bn.running_var"] + i
        ema = {n: t + 0.001 if t.ndim > 1 else t for n, t in state.items()}
        torch.save({"state_dict": state, "ema": ema}, folder / f"m{i}.pt")
        torch.save({"state_dict": start, "ema": start}, folder / ("other_start.pt" if i else "start.pt"))
    (folder / "scores.json").write_text('{"m0.pt": -0.9, "m1.pt": -0.8}')
    (folder / "my_score.py").write_text(
        "import torch\n"
        "from tests.kinds import network\n"
        "def score(weights):\n    return -abs(weights['bn.running_var'].double().mean().item() - 1.4)\n"
        "def other(weights):\n    return -abs(weights['bn.running_var'].double().mean().item() - 1)\n"
        "def parts(seed=0):\n"
        "    drawn = torch.Generator().manual_seed(seed)\n"
        "    images = torch.randn(6, 3, 9, 9, generator=drawn)\n"
        "    return network(), [(images, torch.tensor([0, 1, 2, 0, 1, 2]))] * 2\n"
        "def other_parts():\n    return parts(1)\n"
    )
    return folder


def flags_of(recipe):
    """The settings of a recipe's parser."""
    (kinds,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {flag for action in kinds.choices[recipe]._actions for flag in action.option_strings}


def made(recipe, words, pool, monkeypatch, capsys, *, files=("m0.pt", "m1.pt")):
    """The tensors and the bytes of a soup, or the line with which it was refused."""
    monkeypatch.chdir(pool)
    monkeypatch.syspath_prepend(str(pool))
    (pool / "soup.safetensors").unlink(missing_ok=True)
    typed = [recipe, *files, "--out", "soup.safetensors", *words]
    if files == ("m0.pt", "m1.pt") and "--key" not in words and "--key" in flags_of(recipe):
        typed += ["--key", "state_dict"]
    try:
        main(typed)
    except SystemExit as ended:
        assert ended.code == 2
        return capsys.readouterr().err
    capsys.readouterr()
    return load_file(pool / "soup.safetensors"), (pool / "soup.safetensors").read_bytes()


def without(words, flag):
    """The words without a flag and its value."""
    if flag not in words:
        return words
    i = words.index(flag)
    return words[:i] + words[i + 2 :]


def differs(one, other):
    """What of two soups differs."""
    if any(one[0][n].dtype != other[0][n].dtype or not torch.equal(one[0][n], other[0][n]) for n in one[0]):
        return TENSORS
    return NOTHING if one[1] == other[1] else BYTES


def test_every_recipe_and_every_setting_has_a_case_here():
    others = {"lora", "doctor", "make", "verify", "export"}  # no recipes of whole models
    assert RECIPES.keys() == RUN.keys() - others
    assert set().union(*map(flags_of, RECIPES)) == EFFECTS.keys() | OF_EXAMPLES.keys() | ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_that_a_recipe_has_changes_its_soup_or_is_refused(recipe, pool, monkeypatch, capsys):
    needed = RECIPES[recipe]
    before = made(recipe, needed, pool, monkeypatch, capsys)
    assert isinstance(before, tuple), before
    of_by = {"--goal"} if "--by" in flags_of(recipe) else set()  # tests/test_along.py
    for flag in sorted((flags_of(recipe) & EFFECTS.keys()) - of_by):
        value, effect = EFFECTS[flag]
        words = [*without(needed, flag), flag, *([] if value is None else [value])]
        if flag == "--batch-norm" and "--init" not in words:
            words += ["--init", "start.pt"]
        after = made(recipe, words, pool, monkeypatch, capsys)
        if isinstance(effect, tuple):
            assert isinstance(after, str) and any(each in after for each in effect), (flag, after)
        else:
            assert isinstance(after, tuple), (flag, after)
            found = differs(before, after)
            assert found == effect or (recipe, flag, found) == ("dare", "--seed", TENSORS), (flag, found)
    for flag in sorted(flags_of(recipe) & OF_EXAMPLES.keys()):
        value = OF_EXAMPLES[flag]
        printed = made(recipe, [*needed, flag, *([] if value is None else [value])], pool, monkeypatch, capsys)
        assert isinstance(printed, str) and f"{flag} is for " in printed, (flag, printed)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_setting_that_a_recipe_has_not_is_refused(recipe, pool, monkeypatch, capsys):
    for flag in (EFFECTS.keys() | OF_EXAMPLES.keys() | ELSEWHERE) - flags_of(recipe):
        printed = made(recipe, [*RECIPES[recipe], flag, "1"], pool, monkeypatch, capsys)
        assert isinstance(printed, str) and flag in printed, flag


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_initialisation_is_used_or_refused(recipe, pool, monkeypatch, capsys):
    words = [*without(RECIPES[recipe], "--init"), "--init", "other_start.pt"]
    after = made(recipe, words, pool, monkeypatch, capsys)
    if "--init" in RECIPES[recipe]:
        assert differs(made(recipe, RECIPES[recipe], pool, monkeypatch, capsys), after) == TENSORS
    else:
        assert isinstance(after, str) and "belong together" in after


# A learned soup's network has the tensors that it has, and is of one origin with its weights.
@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {"learned"}))
def test_common_tensors_and_unrelated_models_are_averaged_where_that_was_asked_for(recipe, pool, monkeypatch, capsys):
    torch.save(torch.load(pool / "start.pt")["state_dict"], pool / "plain_start.pt")
    needed = [word.replace("start.pt", "plain_start.pt") for word in RECIPES[recipe]]
    torch.manual_seed(0)
    for i in range(2):
        state = model(i + 1)
        torch.save(state | ({"position_ids": torch.arange(3)} if i else {}), pool / f"common{i}.pt")
        torch.save({n: torch.randn_like(t) if t.ndim > 1 else t for n, t in state.items()}, pool / f"apart{i}.pt")
    for files, flag, words in (
        (("common0.pt", "common1.pt"), "--only-common", "'position_ids'"),
        (("apart0.pt", "apart1.pt"), "--allow-unrelated", "not fine-tuned from the same checkpoint"),
    ):
        printed = made(recipe, needed, pool, monkeypatch, capsys, files=files)
        assert isinstance(printed, str) and words in printed and flag in printed
        assert isinstance(made(recipe, [*needed, flag], pool, monkeypatch, capsys, files=files), tuple)


@pytest.mark.parametrize("recipe", ["greedy", "random-order", "with-replacement"])
def test_a_journal_is_written_where_it_was_asked_for(recipe, pool, monkeypatch, capsys, tmp_path):
    words = [*RECIPES[recipe], "--journal", str(tmp_path / "scores.jsonl")]
    assert isinstance(made(recipe, words, pool, monkeypatch, capsys), tuple)
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) >= 2


def test_adapters_have_settings_of_their_own():
    lora = {"-h", "--help", "--out", "--force", "--weights", "--rank", "--base"}  # test_lora.py
    assert flags_of("lora") == lora | {"--last", "--top", "--by", "--goal"}  # tests/test_along.py
    of_doctor = {"--init", "--scores", "--held-out", "--key", "--exclude", "--keep", "--only-common"}
    assert flags_of("doctor") == of_doctor | {"-h", "--help"}
    assert flags_of("make") == {"-h", "--help", "--out", "--folder", "--force"}  # tests/test_make.py
    assert flags_of("verify") == {"-h", "--help", "--folder"}
    assert flags_of("export") == {"-h", "--help", "--to", "--out", "--network", "--classes", "--license"}
