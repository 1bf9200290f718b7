"""What is typed: --help of each command and group, the settings nearest to a mistyped one, and run=FOLDER."""

import shlex
import sys

import pytest

import eval.__main__ as evaluation
import finetune.__main__ as training
from configs.cli import COMMAND, helped, parts_as_typed, record_words, typed_right, with_run
from configs.errors import UserError
from configs.help import GROUPS, comments_of, nearest_setting, options_of, settings_of, summary_of, topic_help
from configs.schema import Experiment, load
from configs.training import Optim, Sweep
from soups.files.atomic import read_json, write_json
from tests.commands import here


def test_each_command_has_a_help_of_its_own_with_groups_and_an_experiment_a_line():
    assert {each.name.split(".")[0] for each in settings_of(Experiment) if "." in each.name} == set(GROUPS)
    assert all(topic_help(group, Experiment, {}) for group in GROUPS)
    helps = [helped(["--help"], module.__doc__) for module in (training, evaluation)]
    assert helps[0].startswith("Fine-tune a sweep:") and helps[1].startswith("Evaluate every finished model")
    for text in helps:
        lines = text.splitlines()
        assert all(len(line) <= 120 for line in lines)
        assert [line.split()[0] for line in lines if line.startswith("  demo ")] == ["demo"]
        assert all(any(line.startswith(f"  {group} ") for line in lines) for group in GROUPS)


def test_every_experiment_has_a_line_that_says_what_it_is():
    lines = helped(["--help", "experiment"], "").splitlines()
    assert [line.split()[0] for line in lines] == options_of("experiment")
    assert all(len(summary_of(name)) > 8 for name in options_of("experiment"))


def test_help_of_a_group_has_each_setting_with_its_value_meaning_and_limits():
    text = helped(["--help", "optim", "experiment=demo", "optim.clip_norm=null"], "")
    assert "  optim.clip_norm=null\n      largest norm of the whole gradient; null: not clipped (number > 0" in text
    assert "  optim.momentum=0.9\n      needs optim.kind=sgd, rmsprop or adafactor (number >= 0 and < 1)" in text
    assert "optim=NAME takes all from configs/optim/NAME.yaml: adam, adamw," in text
    assert "adamw, adam, rmsprop, sgd or adafactor" in text
    one = helped(["--help", "optim.batch_size"], "").splitlines()
    assert one[0] == "  optim.batch_size=64" and "(integer >= 2 and a multiple of 2)" in one[1]
    assert "  recipes=[best,second_best," in helped(["--help", "general"], "")


def test_help_of_tasks_says_which_kinds_have_a_setting():
    text = helped(["--help", "task", "experiment=demo"], "")
    common, *others = text.split("\n\nOf task.kind=")
    assert "  task.kind=emoji\n      how the data lie on the disk (emoji, image_folder, image_table, cifar10," in common
    assert "  task.num_classes=620\n" in common and "task.template" not in common
    texts = next(part for part in others if part.startswith("glue, sentences, sentiment:"))
    assert "  task.template=null\n      a network reads this, with columns in braces" in texts
    named = [each.name for each in settings_of(Experiment) if each.name.startswith("task.")]
    assert len(set(named)) == len(named) and all(f"  {name}=" in text for name in named)


def test_a_comment_belongs_to_the_field_that_it_stands_beside_or_above():
    assert comments_of(Optim)["loss"].endswith("for prompts: that of the answer's tokens over the whole vocabulary")
    assert comments_of(Optim).get("label_smoothing", "") == ""
    assert comments_of(Sweep)["index"] == "train this row only, as an array job does"


def test_help_on_what_is_not_there_names_what_is_near():
    for wrong, near in (("optm", "optim"), ("optim.momentun", "optim.momentum")):
        with pytest.raises(UserError, match=f"--help {wrong}: there is no such group or setting, but {near}"):
            helped(["--help", wrong], "")


@pytest.mark.parametrize(
    ("name", "near"), [("task.fodler", "task.folder, task.folders"), ("optim.folder", "task.folder"), ("zzz.yyy", "")]
)
def test_the_nearest_setting(name, near):
    assert nearest_setting(name, Experiment) == near


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "bad config: Missing mandatory value: name; an experiment sets it, e.g. experiment=demo"),
        ("demo", "'demo' is no setting: type experiment=demo"),
        ("demo_tinny", "'demo_tinny' is no setting: type experiment=demo_tiny"),
        ("experiment=demoo", "there is no experiment=demoo, but demo, "),
        ("experiment=demo model=emoji", "there is no model=emoji, but emoji_clip; all are in configs/model"),
        ("experiment=demo optim.foo=1", "there is no setting optim.foo; --help optim lists all of optim"),
        ("experiment=demo task.fodler=x", "there is no setting task.fodler, but task.folder"),
        ("experiment=demo task=folders", "task=folders is called task=image_folder now"),
        ("experiment=demo model=any_timm", "model=any_timm is called model=timm now"),
        ("experiment=demo optim.lr", "optim.lr has no value: type optim.lr=VALUE"),
        ("experiment=demo task.held_out=test", "bad config: each split has one role"),
        ("run=runs/nowhere", "run=runs/nowhere does not exist"),
        # What Hydra would refuse in words of its own, or with a traceback.
        ("=3", "'=3' names no setting"),
        ("optimizer=sgd optim=null", "there is no optim=null, but adam, adamw"),
        ("experiment=demo optim={lr:1}", "there is no optim={lr:1}, but adam, adamw"),
        ("experiment=demo optim=adam,sgd", "optim=adam,sgd is several files of configs/optim: type one of them"),
        ("experiment=demo +optim=adam", "+optim=adam: optim is chosen without +: type optim=adam"),
        ("experiment=demo_tiny.yaml", "there is no experiment=demo_tiny.yaml, but demo_tiny"),
        ("experiment=demo --foo", "there is no option --foo"),
        ("experiment=demo experiments=1", "there is no setting experiments, but experiment"),
        ("experiment=demo +optim.batch_size=2", "+optim.batch_size adds what is there already: type optim.batch_size="),
        (
            "experiment=demo task.titles.test=x",
            "task.titles.test gets names that it has not yet: type +task.titles.test",
        ),
        (
            "experiment=demo cluster.slurm.gpus=2",
            "cluster.slurm is null here: type 'cluster.slurm={gpus: VALUE}', or cl",
        ),
        (
            "experiment=demo sweep.draw.optim.lr=[1,2]",
            "sweep.draw.optim.lr=[1,2]: the value should be settings by name",
        ),
        ("experiment=demo optim.epochs=[1,2", "optim.epochs=[1,2 cannot be read: its brackets or quotes do not match"),
        ("experiment=demo optim.lr=1,2", "optim.lr=1,2 is several values: type a list as 'optim.lr=[1,2]', a text as"),
        ("experiment=demo task.title=", "task.title has no value: type task.title=VALUE"),
        ("experiment=demo task.title=a=b", """task.title=a=b cannot be read: type 'task.title="a=b"', its value in"""),
        (
            "experiment=demo task.title=\N{SNOWMAN}",
            "task.title=\N{SNOWMAN} cannot be read: type 'task.title=\"\N{SNOWMAN}",
        ),
        (
            "experiment=demo task.folder=~/x",
            "task.folder=~/x: your shell leaves ~ as it is here: type task.folder=$HOME",
        ),
        (
            "experiment=demo task.title=${x}",
            "bad config: task.title: Interpolation key 'x' not found; a setting that is",
        ),
        ("experiment=demo task.shifts=a", "bad config: task.shifts: should be a list, as in [first,second], got 'a'"),
        ("experiment=demo recipes=[best,best]", "bad config: recipes names one twice"),
        # An experiment of several sweeps would be taken for one of its own.
        ("experiment=demo_full", "demo_full is 20 experiments: type one, as in experiment=demo"),
        ("experiment=demo_seeds", "demo_seeds is 3 sweeps: type one of them, with name=demo_seeds/seed0 sweep.seed=0"),
    ],
)
def test_a_mistyped_word_is_one_line(words, message, tmp_path):
    answer = here(["-m", "finetune", *words.split(), f"paths.runs={tmp_path}/runs"])
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"error: {message}") and answer.stderr.count("\n") == 1, answer.stderr
    assert not (tmp_path / "runs").exists()


def test_a_command_that_is_printed_has_the_words_that_were_typed():
    words = ["experiment=demo_tiny", "recipes=[best,uniform]", "name=2024"]
    printed = here(["-m", "finetune.rows", *words]).stdout
    assert f"All rows:   python -m finetune {shlex.join(words)}\n" in printed


# run=FOLDER


@pytest.fixture
def pets(tmp_path):
    """A run of own images whose words were kept, and its configuration."""
    words = ["experiment=own_images", "name=pets", f"task.folder={tmp_path}", "task.num_classes=3", "sweep.rows=2"]
    config = load(words[0].partition("=")[2], *words[1:], f"paths.runs={tmp_path / 'runs'}")
    record_words(config, [*words, f"paths.runs={tmp_path / 'runs'}", "sweep.index=1", "recipe=greedy"])
    return config, tmp_path / "runs/pets"


def test_a_run_gives_back_every_setting_that_made_it(pets):
    config, folder = pets
    words = with_run([f"run={folder}"])
    experiment, *settings = words
    assert load(experiment.partition("=")[2], *settings) == config
    assert not any(word.startswith(("sweep.index", "recipe")) for word in words)


def test_what_is_typed_beside_a_run_wins_and_a_moved_run_is_found_where_it_is(pets, tmp_path):
    _, folder = pets
    assert with_run([f"run={folder}", "sweep.rows=4", "recipe=greedy"])[-2:] == ["sweep.rows=4", "recipe=greedy"]
    assert "sweep.rows=2" not in with_run([f"run={folder}", "sweep.rows=4"])
    folder.rename(tmp_path / "cats")
    moved = with_run([f"run={tmp_path / 'cats'}"])
    config = load("own_images", *moved[1:])
    assert config.paths.runs / config.name == tmp_path / "cats"


def test_a_folder_without_a_run_is_refused_with_the_nearest_one(pets, tmp_path):
    with pytest.raises(UserError, match=r"runs/pest does not exist, .* there is \S+/runs/pets"):
        with_run([f"run={tmp_path}/runs/pest"])
    (tmp_path / "runs/pets/seed0").mkdir()
    with pytest.raises(UserError, match=r"is one of several sweeps: type run=\S+/runs/pets"):
        with_run([f"run={tmp_path}/runs/pets/seed0"])


def test_every_stage_gets_the_words_of_its_run(pets, monkeypatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["command", f"run={pets[1]}", "recipe=greedy"])
    typed_right(lambda: seen.extend(sys.argv), "A command.")()
    assert "experiment=own_images" in seen and "recipe=greedy" in seen and shlex.join(seen).count("run=") == 0


def test_words_are_written_only_where_they_differ(pets, tmp_path):
    config, folder = pets
    before = (folder / COMMAND).stat().st_mtime_ns
    record_words(config, read_json(folder / COMMAND)["words"])
    assert (folder / COMMAND).stat().st_mtime_ns == before
    write_json(folder / COMMAND, {"words": ["experiment=demo"]})
    record_words(config, ["experiment=own_images"])
    assert read_json(folder / COMMAND)["words"] == ["experiment=own_images"]


def test_the_words_of_a_part_make_it_alone():
    words = ["experiment=demo_full", "parts=[demo_tiny,demo]", "cluster.workers=1"]
    config = load("demo_full", *words[1:])
    made = [typed for _, typed in parts_as_typed(config, words)]
    assert made == [["experiment=demo_tiny", "cluster.workers=1"], ["experiment=demo", "cluster.workers=1"]]
