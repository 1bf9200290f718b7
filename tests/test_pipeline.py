"""The whole story on a miniature, as a user runs it: real processes, killed for real."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import reproduce
from configs.errors import UserError
from configs.schema import load
from finetune.sweep import train_sweep
from soups.files.atomic import read_json, read_jsonl
from soups.files.weights import load_weights
from store.rows import identity
from store.runs import sole_writer
from tests.commands import here, python
from tests.pages import Page

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # the whole story, several times over
# docs/extend.md, whose commands tests/test_docs.py runs, has all recipes and one row more.
SMALL = ("task.classes=10", "task.shifts=[v2]", "sweep.rows=2", "recipes=[best,greedy,learned,ensemble]")
SMALL += ("analysis.resamples=100", "cooking.learned.epochs=40", "compute.eval_batch=1")  # long enough to be killed in
RESULTS = ("table3.md", "table3.tex", "table3.csv", "figure1.pdf", "figure1.png", "figure1.csv")


def command(runs, *overrides, program=("reproduce.py",)):
    return [*program, "experiment=demo_tiny", *SMALL, f"paths.runs={runs}", *overrides]


def finish(runs, *overrides):
    call = [python(), *command(runs, *overrides)]
    answer = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def kill_when(runs, happened):
    """Start the pipeline and kill -9 it, or the process whose number `happened` gives; its exit status and words."""
    call = [python(), *command(runs, "cluster.workers=1")]
    process = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (victim := happened()) and process.poll() is None:
        time.sleep(0.005)  # which leaves the processors to it
    assert process.poll() is None, process.stdout.read()
    os.kill(process.pid if victim is True else victim, signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]  # up to the end of its workers, who notice that it is gone
    return process.returncode, printed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs = tmp_path_factory.mktemp("undisturbed")
    output = finish(runs)
    return runs / "demo_tiny", output


def test_the_story_ends_with_a_table_the_files_and_what_to_do_next(undisturbed):
    run, output = undisturbed
    for name in RESULTS:
        assert (run / "analysis" / name).stat().st_size > 0
    assert output.count("greedy: held-out") == output.count("learned: held-out") == 1
    printed = " ".join(output.split())
    sentence = r"Greedy soup of \d: test \d+\.\d % \(n = 10\), [+-]\d+\.\d \[.*?\] over the best single model: \w+"
    assert re.search(sentence, printed)
    assert "with 95 % paired-bootstrap intervals" in printed and "its numbers mean nothing" in printed
    assert (run / "report.html").stat().st_size > 0 and "Look at " in output and "report.html" in output
    assert "Next: python reproduce.py experiment=demo " in output
    manifest = (run / "manifest.csv").read_text().splitlines()
    assert manifest[0].startswith("row,")
    assert "optim.lr" in manifest[0]
    assert len(manifest) == 1 + 3


def test_every_command_of_the_report_runs(undisturbed):
    run, _ = undisturbed
    page = Page((run / "report.html").read_text())
    commands = {cell.words for line in page.lines("parts") for cell in line if cell.words.startswith("python ")}
    assert len(commands) >= 6
    for each in sorted(commands):
        assert f"run={run}" in each
        answer = here(shlex.split(each)[1:])
        assert answer.returncode == 0, (each, answer.stdout, answer.stderr)


def test_every_result_says_where_it_comes_from_and_has_scores_for_every_split(undisturbed):
    run, _ = undisturbed
    for path in [*run.glob("ingredients/*/done.json"), *run.glob("soups/*/soup.json"), run / "zero_shot/done.json"]:
        record = read_json(path)["provenance"]
        assert {"commit", "versions", "machine"} <= record.keys()
    assert "commit" in read_json(run / "analysis/provenance.json")
    done, rows = read_json(run / "ingredients/001/done.json"), read_jsonl(run / "ingredients/001/scores.jsonl")
    assert done["seed"] > 0 and done["identity"] == identity(load("demo_tiny", *SMALL), 1)
    assert [row["split"] for row in rows] == ["held_out", "test", "v2"]
    assert rows[0]["correct"] == done["held_out"]["correct"]


def test_a_second_call_does_nothing_again(undisturbed):
    run, output = undisturbed
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in run.rglob("*.npy")}
    assert len(before) > 15
    printed = here(command(run.parent)).stdout
    assert printed.startswith("demo_tiny is finished, and nothing has changed since. It said:\n\n")
    before_and_now = [re.sub(r"\(\d+ s\)", "", text).strip() for text in (output, printed.split("\n\n", 1)[1])]
    assert len(printed.splitlines()) > 8 and before_and_now[0].endswith(before_and_now[1])
    table = (run / "analysis/table3.md").read_bytes()
    (run / "analysis/table3.md").unlink()
    assert "nothing has changed" not in here(command(run.parent)).stdout  # all stages look at what is there
    assert (run / "analysis/table3.md").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert set(before) == set(run.rglob("*.safetensors")) | set(run.rglob("*.npy"))


def test_killed_in_every_stage_it_ends_with_the_same_bytes(undisturbed, tmp_path):
    expected, _ = undisturbed
    run = tmp_path / "demo_tiny"

    def worker_that_trains():
        locks = [lock.read_text().split() for lock in run.glob("ingredients/00[12]/lock")]
        return next((int(words[1]) for words in locks if len(words) > 1), None)

    def epoch_done():
        return any(run.glob("ingredients/00[12]/metrics.jsonl"))

    def evaluating():
        return any((run / "logits/test").glob("*.npy"))

    def greedy_half_way():
        return (run / "soups/greedy/journal.jsonl").exists()

    def learning():
        return (run / "soups/learned/state.pt").exists()

    status, printed = kill_when(tmp_path, worker_that_trains)
    assert status == 2 and "a worker process was killed" in printed
    assert "Run the same command again to continue" in printed
    kill_when(tmp_path, epoch_done)
    assert not (run / "manifest.csv").exists()
    kill_when(tmp_path, evaluating)
    assert not list(run.rglob("soup.json"))
    kill_when(tmp_path, learning)
    assert not (run / "soups/learned/soup.json").exists()
    for _ in range(5):  # it was made before; and a kill may come when all is done
        if (run / "soups/greedy/soup.json").exists():
            shutil.rmtree(run / "soups/greedy")
            kill_when(tmp_path, greedy_half_way)
    assert not (run / "soups/greedy/soup.json").exists()
    finish(tmp_path, "cluster.workers=1")

    for name in RESULTS:
        assert (run / "analysis" / name).read_bytes() == (expected / "analysis" / name).read_bytes(), name
    weights = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert len(weights) == 3 + 1 + 3  # rows, zero-shot, soups
    for path in weights:
        assert (run / path).read_bytes() == (expected / path).read_bytes(), path
    assert not list((run / "ingredients").rglob(".*.tmp*"))


def test_array_tasks_make_the_same_weights_as_the_pool_of_workers(undisturbed, tmp_path):
    expected, _ = undisturbed

    def task(index):
        return here(command(tmp_path, f"sweep.index={index}", program=("-m", "finetune")))

    refused, line = task(2), "error: row 2 starts from row 0, which is not there: run the same with sweep.index=0 first"
    assert (refused.returncode, refused.stderr) == (2, f"{line}\n")
    assert task(0).returncode == 0 and "row 2: held-out" in task(2).stdout
    ours = load_weights(tmp_path / "demo_tiny/ingredients/002/weights.safetensors")
    theirs = load_weights(expected / "ingredients/002/weights.safetensors")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_two_runs_of_one_row_at_once_are_refused(undisturbed):
    run, _ = undisturbed
    with sole_writer(run / "ingredients/001"):
        answer = here(command(run.parent, "sweep.index=1", program=("-m", "finetune")))
    assert answer.returncode == 2
    assert f"ingredients/001 is being written by process {os.getpid()}" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.folder=elsewhere", "manifest.json: No such file or directory; restore it with"),
        ("model.weights=elsewhere.safetensors", "elsewhere.safetensors is missing; restore it with"),
        ("model.probe_c=[3]", "was made with other settings than these"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(undisturbed, tmp_path, override, words):
    run, _ = undisturbed
    runs = run.parent if override.startswith("model.probe_c") else tmp_path
    with pytest.raises(UserError, match=re.escape(words)):
        train_sweep(load("demo_tiny", *SMALL, override, f"paths.runs={runs}"))
    assert not list(tmp_path.rglob("done.json"))


def test_one_recipe_is_refused_where_all_are_made(tmp_path):
    with pytest.raises(UserError, match=r"recipe=wise_ft is for python -m soups: here type recipes=\[wise_ft\]"):
        reproduce.run(load("demo_tiny", "recipe=wise_ft", f"paths.runs={tmp_path}"))
    assert not list(tmp_path.iterdir())
