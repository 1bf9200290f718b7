"""What a run says when it ends: a sentence with n and interval, a page, and a next step that suits it."""

from io import StringIO

import pandas as pd
import pytest
from rich.console import Console

from analysis.ending import ending, next_steps, reminder, verdict
from analysis.page.files import Commands
from analysis.pipeline import _show
from analysis.tables.table3 import note
from configs.cli import record_words, with_run
from configs.schema import load
from reproduce import missing_data
from soups.files.atomic import write_json
from store.runs import RunFolder


def scores(differences, seed=None):
    """Lines of a tidy table: column -> difference, low and high of the greedy soup, in points."""
    lines = [
        {"method": "greedy", "column": column, "n": 620, "accuracy": 0.55, "difference": d, "low": low, "high": high}
        for column, (d, low, high) in differences.items()
    ]
    return pd.DataFrame(lines).assign(**({} if seed is None else {"seed": seed}))


@pytest.fixture
def demo(tmp_path):
    config = load("demo", f"paths.runs={tmp_path}")
    write_json(RunFolder.of(config).soup("greedy") / "soup.json", {"ingredients": [{}] * 4})
    return config


UNDECIDED, BETTER, WORSE = (0.024, -0.002, 0.05), (0.024, 0.002, 0.05), (-0.024, -0.05, -0.002)


@pytest.mark.parametrize(("interval", "word"), [(UNDECIDED, "undecided"), (BETTER, "better"), (WORSE, "worse")])
def test_the_sentence_has_the_score_n_the_difference_and_a_word(demo, interval, word):
    lines = verdict(demo, scores({"test": interval, "shift_mean": interval}))
    ends = f"[{100 * interval[1]:.1f}, {100 * interval[2]:.1f}]"
    difference = f"{100 * interval[0]:+.1f} {ends} over the best single model: {word}"
    assert lines[0] == f"Greedy soup of 4: test 55.0 % (n = 620), {difference}"
    assert lines[1] == f"Greedy soup of 4: mean of 5 shifts 55.0 % (n = 620), {difference}"


def test_the_demo_says_that_it_is_short_of_trained_and_what_larger_pools_say(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.ending.MEASURED", tmp_path)
    lines, found = scores({"test": UNDECIDED, "shift_mean": UNDECIDED}), "short of trained"
    assert found in note(demo) and not any(found in line for line in ending(demo, [], lines, [], 1.0))
    rows = [(1, 2, 0.007, 0.001, 0.013), (2, 2, 0.02, 0.01, 0.03)]
    pd.DataFrame(rows, columns=["claim", "pools", "difference", "low", "high"]).to_csv(
        tmp_path / "claims.csv", index=False
    )
    assert [line for line in ending(demo, [], lines, [], 1.0) if found in line] == [
        "Trained for 4 to 7 epochs, the models are short of trained. 2 pools of 72 models trained for 4 to 16 epochs: "
        "greedy soup +0.7 [+0.1, +1.3] over the best single model on test, +2.0 [+1.0, +3.0] on the mean of 5 shifts "
        "(docs/claims.md)"
    ]
    tiny = load("demo_tiny", f"paths.runs={tmp_path}")
    write_json(RunFolder.of(tiny).soup("greedy") / "soup.json", {"ingredients": [{}] * 4})
    assert not any(found in line for line in ending(tiny, [], lines, [], 1.0))


def test_several_sweeps_are_counted(tmp_path):
    config = load("demo_seeds", f"paths.runs={tmp_path}")
    lines = pd.concat(
        scores({"test": each, "shift_mean": each}, seed) for seed, each in enumerate((UNDECIDED, BETTER, WORSE))
    )
    assert verdict(config, lines)[0] == (
        "Greedy soup, 3 sweeps: test 55.0 % in the mean, +2.4, +2.4, -2.4 over the best single models: better in 1, "
        "worse in 1, undecided in 1"
    )


def test_the_next_step_suits_the_run(demo, tmp_path):
    undecided = scores({"test": UNDECIDED, "shift_mean": UNDECIDED})
    assert next_steps(demo, ["experiment=demo"], undecided)[0][0] == "python reproduce.py experiment=demo_seeds"
    tiny = load("demo_tiny", f"paths.runs={tmp_path}")
    assert "its numbers mean nothing" in reminder(tiny) and reminder(demo) == ""
    assert next_steps(tiny, ["experiment=demo_tiny"], undecided)[0][0] == "python reproduce.py experiment=demo"
    paper = load("figure3_angles", f"paths.runs={tmp_path}", "task.folder=x")
    assert next_steps(paper, [], undecided)[0][0] == f"python -m analysis artefact=all run={tmp_path}/figure3_angles"


def test_after_a_run_of_own_images_more_models_or_the_export_come_next(tmp_path):
    words = ["experiment=own_images", "name=pets", "task.folder=x", "task.num_classes=3", "sweep.rows=5"]
    config = load("own_images", *words[1:], f"paths.runs={tmp_path}")
    soup = RunFolder.of(config).soup("greedy")
    soup.mkdir(parents=True)
    (soup / "weights.safetensors").write_bytes(b"")
    undecided, better = (scores({"test": each}) for each in (UNDECIDED, BETTER))
    more, export = [command for command, _ in next_steps(config, words, undecided)]
    assert more == f"python reproduce.py run={tmp_path}/pets sweep.rows=10"
    assert export == f"python -m soups.experiment.export soup={soup} to=open_clip out=pets-soup"
    assert [command for command, _ in next_steps(config, words, better)] == [export]
    lines = ending(config, words, better, [tmp_path / "pets/report.html"], 3.2)
    assert lines[1] == f"Look at {tmp_path}/pets/report.html" and not any("demo" in line for line in lines)


def test_proxies_are_named_in_the_papers_experiments_alone():
    own = load("own_images", "task.folder=pets", "task.num_classes=3", "model=imagenet_lite0", "name=pets")
    assert "proxy" not in note(own)
    assert "a proxy for ViT-B/32 pretrained on ImageNet-22k" in note(load("demo_imagenet_init"))


def test_the_commands_of_a_report_compose_the_run_that_they_stand_for(tmp_path):
    words = ["experiment=own_images", "name=pets", "task.folder=x", "task.num_classes=3", f"paths.runs={tmp_path}"]
    config = load("own_images", *words[1:])
    record_words(config, words)
    command = Commands.of(config, ["experiment=pets"]).stage("soups")
    assert command == f"python -m soups run={tmp_path}/pets"
    experiment, *settings = with_run(command.split()[3:])
    assert load(experiment.partition("=")[2], *settings) == config


def test_a_dry_run_says_once_which_data_are_missing(tmp_path):
    there = load("own_images", f"task.folder={tmp_path}", "task.num_classes=3")
    absent = [load("own_images", f"task.folder={tmp_path}/{name}", "task.num_classes=3") for name in ("a", "a", "b")]
    lines = missing_data([there, *absent])
    assert [line.split()[2] for line in lines] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert "docs/datasets.md" in lines[0] and "task.folder=DIR" in lines[0]
    assert missing_data([load("demo"), load("tablej1_bert_base_rte", "task.folder=nyu-mll/glue")]) == []


@pytest.mark.parametrize("width", [60, 110])
def test_no_number_of_the_table_on_the_terminal_is_cut(width):
    row = [
        "Learned soup (by layer: every tensor)",
        "56.0 (1.5)",
        "31.6 (0.5)",
        "-45.4 [-49.4, -41.1]",
        "-23.0 [-24.9, -21.1]",
    ]
    columns = ["Method", "Test", "Mean of shifts", "Test − best", "Shifts − best"]
    output = StringIO()
    _show(pd.DataFrame([row], columns=columns), "", Console(file=output, width=width))
    printed = output.getvalue()
    assert "…" not in printed
    assert sorted("".join(printed.split())) == sorted("".join("".join([*columns, *row]).split()))
