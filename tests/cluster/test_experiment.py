"""A whole experiment as jobs of a real Slurm: the tables of one machine, whatever goes wrong on the way."""

import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from real_slurm import start_node, stop_node, until
from safetensors.torch import load_file

from configs.schema import CONFIGS
from configs.slurm import State, accounted
from soups.files.atomic import read_json, read_jsonl
from tests.commands import here, python
from tests.pools import small_network

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = CONFIGS.parent
SMALL = ["experiment=demo_tiny", "task.classes=10", "task.shifts=[v2]", "recipes=[best,greedy]"]
SMALL += ["analysis.resamples=100"]
TABLES = ("table3.md", "table3.csv", "table3.tex", "figure1.csv", "figure1.png")
ROWS = 3
FAULTS = ("requeued", "signalled", "preempted", "killed", "signalled", "cancelled", "node_down")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of an experiment of seconds."""
    return [*SMALL, *small_network(tmp_path_factory.mktemp("network"))]


@contextmanager
def login_node(cluster):
    """This process as one where the clients of Slurm find the cluster; jobs take over its environment and folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (cluster.environment | {"PYTHON": python(), "COLUMNS": "200"}).items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        yield


def command(cluster, module, runs, *settings):
    """A command of the project on the login node; what it printed."""
    with login_node(cluster):
        ended = here([*module.split(), *settings, f"paths.runs={runs}"])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def submitted(cluster, runs, *settings):
    """Send what is left; ids by stage."""
    printed = command(cluster, "reproduce.py", runs, *settings, "cluster=slurm_test", "submit=true")
    lines = [line for line in printed.splitlines() if line.startswith("job ")]
    return {line.split(", ")[1]: line.split(":")[0].removeprefix("job ") for line in lines}


def status(cluster, runs, *settings):
    """What is printed, and the counts of each stage: done, running, waiting, failed, not sent."""
    printed = command(cluster, "-m slurm.status", runs, *settings, "cluster=slurm_test")
    counts = {}
    for line in printed.splitlines():
        words = line.split()
        if len(words) >= 7 and words[0] == "demo_tiny" and all(word.isdigit() for word in words[-5:]):
            counts[" ".join(words[1:-5])] = [int(word) for word in words[-5:]]
    return printed, counts


def accounts(cluster, job):
    """What this project reads in the accounts of a job."""
    with login_node(cluster):
        return accounted([job])


def all_over(cluster, runs):
    ids = sorted({row["job"] for row in read_jsonl(runs / "demo_tiny/slurm/sent.jsonl")})
    return cluster.states(",".join(ids)) <= {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}


def ingredient(runs, row):
    return runs / f"demo_tiny/ingredients/{row:03d}"


def logits(runs):
    return {file: file.stat().st_mtime_ns for file in (runs / "demo_tiny/logits").rglob("*.npy")}


def test_a_failing_row_is_told_and_sent_again_alone_and_the_tables_are_those_of_one_machine(cluster, small, tmp_path):
    tiny = [*small, "sweep.rows=2"]
    here, there = tmp_path / "local", tmp_path / "slurm"
    broken = ingredient(there, 2)
    broken.mkdir(parents=True)
    (broken / "state.pt").write_bytes(b"no state of a training")
    stages = ["initialise", "fine-tune", "evaluate", "recipes", "evaluate soups", "analysis"]
    sent = submitted(cluster, there, *tiny, "cluster.slurm.options=[--hold]")  # none is over before the queue is seen
    assert list(sent) == stages
    assert submitted(cluster, there, *tiny) == {}  # all of it is in the queue
    cluster.run("scontrol", "release", ",".join(sent.values()))
    command(cluster, "reproduce.py", here, *tiny, "cluster=local", "cluster.workers=1")
    until(lambda: all_over(cluster, there), 600, "the end of all jobs")

    printed, counts = status(cluster, there, *tiny)
    assert counts["fine-tune"] == [1, 0, 0, 1, 0]
    (line,) = [line for line in printed.splitlines() if "fine-tune 2" in line]
    assert "FAILED" in line and "state.pt is damaged" in line and "delete the file to start this row anew" in line
    failed = f"{sent['fine-tune']}_2"
    until(lambda: failed in accounts(cluster, failed), 30, "the accounts of SLURM")
    assert accounts(cluster, failed)[failed] == State("FAILED", "None")  # what is left when the queue has forgotten it
    assert (ingredient(there, 1) / "scores.jsonl").exists()  # the other rows were evaluated all the same
    (broken / "state.pt").unlink()
    early = logits(there)
    printed = command(cluster, "-m slurm.retry", there, *tiny, "cluster=slurm_test")
    assert printed.count("job ") == 1 and "fine-tune, tasks 2" in printed
    ids = submitted(cluster, there, *tiny)
    assert list(ids) == stages[2:]  # the row is in the queue
    until(lambda: all_over(cluster, there), 600, "the end of all jobs")

    assert cluster.states(ids["analysis"]) == {"COMPLETED"}
    assert early and early.items() < logits(there).items()  # none is computed twice
    for name in TABLES:
        assert (there / "demo_tiny/analysis" / name).read_bytes() == (here / "demo_tiny/analysis" / name).read_bytes()
    made = [{str(file.relative_to(runs)) for file in runs.rglob("*") if file.is_file()} for runs in (here, there)]
    alone = {f"demo_tiny/{name}" for name in ("manifest.csv", "report.html", "printed.json")}  # no single job has them
    assert made[0] - made[1] <= alone
    assert status(cluster, there, *tiny)[1]["fine-tune"] == [2, 0, 0, 0, 0]
    assert "nothing is left to do" in command(cluster, "reproduce.py", there, *tiny, "cluster=slurm_test")
    assert "no row has failed" in command(cluster, "-m slurm.retry", there, *tiny, "cluster=slurm_test")


@pytest.fixture(scope="module")
def long(small):
    """The same with rows that train for long enough to be disturbed."""
    return [*small, f"sweep.rows={ROWS}", "~sweep.draw.optim.epochs", "optim.epochs=20", "compute.save_every=3"]


@pytest.fixture(scope="module")
def undisturbed(cluster, long, tmp_path_factory):
    """All rows, trained on this machine."""
    runs = tmp_path_factory.mktemp("undisturbed")
    command(cluster, "-m finetune", runs, *long[:-1], "cluster=local", "cluster.workers=2")  # nothing interrupts it
    return runs


class Faults:
    """What goes wrong on a cluster, each done to a running row; names of those that were done are kept."""

    def __init__(self, cluster, runs):
        self.cluster, self.runs, self.done = cluster, runs, Counter()

    def training(self):
        """(id, row, node) of the rows that have saved a state since they were started, and are not at their end."""
        words = ["--noheader", "--array", "--states=R", "--format=%i|%K|%N|%S|%j"]
        found = []
        for line in self.cluster.run("squeue", *words).splitlines():
            name, row, node, start, job = line.split("|")
            if "fine-tune" in job:
                states = list(ingredient(self.runs, int(row)).glob("state.pt"))
                since = datetime.fromisoformat(start).timestamp() + 1  # whole seconds
                found += [(name, int(row), node) for state in states if state.stat().st_mtime > since]
        return found

    def signalled(self, name, row, node):
        self.cluster.run("scancel", "--signal=USR1", "--batch", name)

    def requeued(self, name, row, node):
        self.cluster.run("scontrol", "requeue", name)

    def cancelled(self, name, row, node):
        self.cluster.run("scancel", name)

    def killed(self, name, row, node):
        mark = f"sweep.index={row}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_bytes()
                words = line.split(b"\0")
                if b"\0-m\0finetune\0" in line and mark in words and str(self.runs).encode() in line:
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue

    def preempted(self, name, row, node):
        words = ["--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        self.cluster.sbatch(*words, cwd=self.runs)

    def node_down(self, name, row, node):
        stop_node(node)
        self.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        for process in Path("/proc").glob("[0-9]*"):  # what ran there ends with the node, as on a machine of its own
            try:
                own = (process / "environ").read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={node}".encode() in own and b"SLURM_JOB_ID" in b" ".join(own):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue
        start_node(node)
        self.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")

    def one(self, kind):
        """Do it to some running row, if there is one; whether it was done."""
        rows = self.training()
        if not rows:
            return False
        name, row, node = random.Random(sum(self.done.values())).choice(rows)
        try:
            getattr(self, kind)(name, row, node)
        except RuntimeError:
            return False  # it ended in the meantime
        self.done[kind] += 1
        return True


@pytest.fixture(scope="module")
def disturbed(cluster, long, undisturbed, tmp_path_factory):
    """The same rows as jobs, with faults; what was cancelled or killed is sent again by the same command."""
    runs = tmp_path_factory.mktemp("disturbed")
    faults, wanted = Faults(cluster, runs), list(FAULTS)
    submitted(cluster, runs, *long)
    deadline = time.monotonic() + 900
    while not all((ingredient(runs, row) / "done.json").exists() for row in range(ROWS + 1)):
        assert time.monotonic() < deadline, (faults.done, cluster.run("squeue", "--states=all"))
        if wanted and faults.one(wanted[0]):
            wanted.pop(0)
        time.sleep(0.2)
        queued = cluster.run("squeue", "--noheader", "--array", "--format=%j|%r").splitlines()
        if not any("fine-tune" in line for line in queued) or any("NeverSatisfied" in line for line in queued):
            submitted(cluster, runs, *long)
    until(lambda: all_over(cluster, runs), 240, "the end of all jobs")
    submitted(cluster, runs, *long)  # evaluation and tables, whose first jobs went with the rows that they waited for
    until(lambda: all_over(cluster, runs), 240, "the end of all jobs")
    return runs, faults.done


def test_after_all_faults_every_row_is_done_with_the_bytes_of_an_undisturbed_run(disturbed, undisturbed):
    assert disturbed[1] == Counter(FAULTS)
    for row in range(ROWS + 1):
        ours, theirs = ingredient(disturbed[0], row), ingredient(undisturbed, row)
        assert (ours / "weights.safetensors").read_bytes() == (theirs / "weights.safetensors").read_bytes(), row
        assert read_json(ours / "done.json")["digest"] == read_json(theirs / "done.json")["digest"]


def logs_of(runs):
    return [log.read_text(errors="replace") for log in (runs / "demo_tiny/slurm/logs").glob("*fine-tune*.out")]


def test_rows_that_slurm_stopped_saved_their_state_and_count_their_restarts(disturbed):
    assert any("interrupted by a signal, and saved" in log for log in logs_of(disturbed[0]))
    records = [read_json(ingredient(disturbed[0], row) / "done.json")["slurm"] for row in range(1, ROWS + 1)]
    assert any(each["restarts"] for each in records), records


def test_no_row_ran_twice_to_its_end(disturbed):
    logs = logs_of(disturbed[0])
    lines = [line for log in logs for line in log.splitlines() if line.startswith("row ") and "held-out" in line]
    # A job that is preempted between its row's end and its own says the row's line again, with the same seconds.
    ends = Counter(line.split(":")[0] for line in set(lines))
    assert ends == {f"row {row}": 1 for row in range(1, ROWS + 1)}


def test_no_file_is_torn_or_left_half_written(disturbed):
    runs = disturbed[0]
    assert not [path for path in runs.rglob("*") if ".tmp" in path.name]
    for path in runs.rglob("*.json"):
        json.loads(path.read_text())
    for path in runs.rglob("*.safetensors"):
        load_file(path)
    assert not list(runs.rglob("state.pt"))


def test_the_stages_after_the_faults_ended_too(cluster, long, disturbed):
    counts = status(cluster, disturbed[0], *long)[1]
    assert all(done and not any(rest) for done, *rest in counts.values()), counts
