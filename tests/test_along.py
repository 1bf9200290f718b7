"""The last and the best checkpoints of one run by the command, weights along it, and what does not say its order."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soups.along import in_time_order
from soups.cli import main
from soups.errors import UserError

SCORES = {5: 0.7, 10: 0.9, 15: 0.8, 100: 0.9}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Checkpoints of a Trainer whose one number is their step, and scores of them in a file and in their logs."""
    history = []
    for step, score in SCORES.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.tensor([float(step)])}, folder / "model.safetensors")
        history += [{"step": step, "loss": 0.1}, {"step": step, "eval_loss": 1 - score, "eval_twice": score}]
        history += [{"step": step, "eval_twice": 2.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    (tmp_path / "metrics.json").write_text(json.dumps({f"checkpoint-{step}": score for step, score in SCORES.items()}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mean(*words):
    """The number of the soup that a command makes of the run."""
    main([words[0], "checkpoint-*", *words[1:], "--out", "soup.safetensors", "--force", "--allow-unrelated"])
    return load_file("soup.safetensors")["w"].item()


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--last", "2"], (15, 100)),  # not checkpoint-5, the last of names
        (["--top", "2", "--by", "metrics.json", "--goal", "max"], (10, 100)),
        (["--top", "1", "--by", "metrics.json", "--goal", "max"], (100,)),  # of equal ones the later
        (["--top", "2", "--by", "metrics.json", "--goal", "min"], (5, 15)),
        (["--top", "3", "--by", "eval_loss", "--goal", "min"], (10, 15, 100)),
        ([], tuple(SCORES)),
    ],
)
def test_the_last_or_the_best_checkpoints_are_averaged(words, steps, run):
    assert mean("uniform", *words) == pytest.approx(sum(steps) / len(steps))


def test_weights_go_along_the_run(run):
    weights = [1.0, 2**0.5 - 1, 3**0.5 - 2**0.5]
    wanted = sum(w * step for w, step in zip(weights, (10, 15, 100), strict=True)) / 3**0.5
    assert mean("weighted", "--weights", "1-sqrt", "--last", "3") == pytest.approx(wanted)
    assert mean("weighted", "--weights", "ema:0.5") == pytest.approx(5 / 8 + 10 / 8 + 15 / 4 + 100 / 2)
    assert mean("weighted", "--weights", "1,3", "--last", "2") == pytest.approx((15 + 300) / 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--last", "5"], "--last 5: there are 4 files"),
        (["--last", "0"], "--last 0: there are 4 files"),
        (["--last", "1", "--top", "1"], "type --last N; or --top N --by FILE-OR-METRIC and --goal max or min"),
        (["--top", "1", "--by", "metrics.json"], "and --goal max or min, all three"),
        (["--by", "eval_loss"], "all three"),
        (["--last", "1", "--goal", "max"], "all three"),
        (["--top", "1", "--by", "eval_f1", "--goal", "max"], "as 'eval_f1' at step 5, where eval_loss, eval_twice"),
        (["--top", "1", "--by", "eval_twice", "--goal", "max"], "not one number is logged as 'eval_twice'"),
        (["--top", "1", "--by", "few.json", "--goal", "max"], "few.json has no score of checkpoint-10"),
        (["--top", "1", "--by", "none.json", "--goal", "max"], "none.json does not exist"),
    ],
)
def test_half_a_choice_and_scores_that_are_missing_are_refused(words, message, run, capsys):
    Path("few.json").write_text('{"checkpoint-5": 1}')
    with pytest.raises(SystemExit):
        mean("uniform", *words)
    assert message in capsys.readouterr().err
    assert not Path("soup.safetensors").exists()


@pytest.mark.parametrize(
    "names",
    [
        ["epoch=1-step=10.ckpt", "last.ckpt"],
        ["a/checkpoint-5", "b/checkpoint-10"],
        ["run1/step20", "run2/step10"],
        ["loss=0.5.ckpt", "loss=0.7.ckpt"],
        ["best.pt", "final.pt"],
    ],
)
def test_names_that_do_not_say_which_is_earlier_are_refused(names):
    with pytest.raises(UserError, match="do not say which is the earlier"):
        in_time_order([Path(name) for name in names])
