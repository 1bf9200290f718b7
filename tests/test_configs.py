"""Every experiment file composes; wrong settings die with the field's name."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import dump, load, parse_values, replicate

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_parses(name):
    config = load(name)
    assert config.name == name
    assert parse_values(dump(config)) == config


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_file_is_global_and_carries_its_command(name):
    first, *rest = (ROOT / f"configs/experiment/{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"  # Hydra ignores a file without it silently
    assert any("Run:" in line for line in rest if line.startswith("#"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+optim.learning_rate=1", "optim.learning_rate: unknown key"),
        ("optim.clip_norm=-1", "optim.clip_norm: Input should be greater than 0"),
        ("optim.batch_size=63", "optim.batch_size: Input should be a multiple of 2"),
        ("task.held_out=test", "each split has one role"),
        ("task.train=held_out", "each split has one role"),
        ("sweep.index=99", "past the last row"),
        ("recipes=[greedy]", "must contain best"),
        ("recipe=stew", "recipe: Input should be 'best'"),
        ("name='../elsewhere'", "name: String should match"),
        ("optim.lr=0.001", "optim.lr is varied by the sweep"),
    ],
)
def test_a_wrong_setting_is_named(override, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")) as error:
        load("demo", override)
    assert "\n" not in str(error.value)


def test_a_drawn_field_can_be_fixed_by_taking_it_out_of_the_draw():
    config = load("demo", "optim.lr=0.001", "~sweep.draw.optim.lr")
    assert config.optim.lr == 0.001
    assert "optim.lr" not in config.sweep.varied


def test_a_config_cannot_be_changed_after_it_was_parsed():
    with pytest.raises(AttributeError):
        load("demo").optim.lr = 1.0


def test_a_replicate_differs_in_its_seed_and_its_folder_only():
    config = load("demo_seeds")
    one = replicate(config, 1)
    assert (one.name, one.sweep.seed, one.replicates) == ("demo_seeds/seed1", 1, ())
    assert one.optim == config.optim


def test_an_entry_point_answers_a_wrong_setting_in_one_line(tmp_path):
    command = [
        sys.executable,
        "reproduce.py",
        "experiment=demo_tiny",
        "task.held_out=test",
        f"paths.runs={tmp_path}/runs",
    ]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: bad config: task: Value error, each split has one role")
    assert len(answer.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_stage_without_an_experiment_says_how_to_name_one():
    answer = subprocess.run([sys.executable, "-m", "finetune"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: bad config: Missing mandatory value: name; an experiment sets it")
    assert len(answer.stderr.splitlines()) == 1
