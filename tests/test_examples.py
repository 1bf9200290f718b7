"""The examples of soups inside other code run as they stand, offline, and end in soups that can be made again."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from soups.verify import verify

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name, needs, tmp_path, monkeypatch, capsys):
    """The lines that an example prints about its models, and what it writes to stderr."""
    pytest.importorskip(needs, reason=f"{needs} is not installed: make examples-setup")
    for variable, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "out")])
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    printed = capsys.readouterr()
    models = [line for line in printed.out.splitlines() if re.search("  (kept|left out)$", line)]
    assert "\ngreedy: " in printed.out and "\non --report, whose examples selected nothing" in printed.out
    assert verify(Path(printed.out.split()[-1])) == ""
    return models, printed.err


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_at_most_25_lines(path):
    assert len([line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]) <= 25


@pytest.mark.slow
def test_checkpoints_of_a_trainer_become_a_soup_that_transformers_loads(tmp_path, monkeypatch, capsys):
    models, _ = run("trainer", "accelerate", tmp_path, monkeypatch, capsys)
    assert {line.split()[0] for line in models} == {"run0", "run1", "run2"}
    from transformers import AutoModelForSequenceClassification

    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/soup").num_labels == 2


def test_trials_of_a_study_are_not_scored_again(tmp_path, monkeypatch, capsys):
    models, scored = run("optuna_study", "optuna", tmp_path, monkeypatch, capsys)
    best = models[0].split()[0]
    assert len(models) == 6
    # The best model alone is scored once, on what --report stands for.
    assert re.findall(r"^(trial\d\.pt): ", scored, re.MULTILINE) == [best]


@pytest.mark.slow
def test_runs_of_a_sweep_become_a_soup_and_a_run_with_its_gain(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    try:
        models, _ = run("wandb_sweep", "wandb", tmp_path, monkeypatch, capsys)
    finally:
        wandb.teardown()
    kept = {path.stem for path in (tmp_path / "out").glob("*.pt")}
    runs = {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert {line.split()[0].removesuffix(".pt") for line in models} == kept
    assert len(kept) == 5 and kept < runs and len(runs) == 6
