"""The scripts in slurm/, sent by hand to a real Slurm: all stages, and jobs that are preempted, requeued and killed."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from real_slurm import until

from configs.schema import CONFIGS
from soups.files.atomic import read_json, read_jsonl
from soups.files.weights import load_weights

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = CONFIGS.parent
SETTINGS = ["experiment=demo_tiny", "sweep.rows=2", "~sweep.draw.optim.epochs", "optim.epochs=8"]
SETTINGS += ["compute.save_every=1", "recipes=[best,uniform,greedy,learned,ensemble]", "cooking.learned.epochs=12"]
SETTINGS += ["cluster.workers=1"]
TABLES = ("table3.md", "table3.csv", "figure1.csv", "figure1.png")
# Few steps, at a small rate, of an optimiser that does not go by signs of gradients: rounding has no time to grow.
ALIKE = ["experiment=demo_tiny", "sweep.rows=1", "~sweep.draw.optim.epochs", "optim.epochs=1", "~sweep.draw.optim.lr"]
ALIKE += ["optim.kind=sgd", "optim.lr=1e-4", "regularizer.ema=[0.9]", "optim.evaluate_every=4"]


@dataclass(frozen=True)
class Sent:
    """A job of one script, writing under a folder of its own."""

    cluster: object
    runs: Path
    job: str

    @property
    def said(self):
        return "".join(log.read_text() for log in sorted(self.runs.glob(f"*-{self.job}*.out")))

    def wait(self, *states):
        try:
            self.cluster.wait(self.job, *states)
        except (RuntimeError, TimeoutError) as error:
            raise AssertionError(f"{error}\n{self.said}") from None

    def until(self, happened, what):
        """Wait for something that the job does, while it runs."""

        def happened_or_failed():
            assert not self.cluster.states(self.job) & {"FAILED", "COMPLETED"}, self.said
            return happened()

        until(happened_or_failed, 300, what)


def send(cluster, script, runs, *settings, options=(), defaults=SETTINGS):
    """Send a script to a node without GPUs, from the project's root, with the Python of these tests."""
    log = runs / ("%x-%A_%a.out" if any("--array" in option for option in options) else "%x-%j.out")
    own = ["--gres=none", "--cpus-per-task=1", f"--output={log}", *options, f"slurm/{script}.sbatch", *defaults]
    environment = {"PYTHON": sys.executable}
    return Sent(cluster, runs, cluster.sbatch(*own, f"paths.runs={runs}", *settings, cwd=ROOT, environment=environment))


def row(runs, number=1):
    return runs / f"demo_tiny/ingredients/{number:03d}"


def finetune(runs, number):
    """Train a row of ALIKE on this machine, by one process."""
    words = [sys.executable, "-m", "finetune", *ALIKE, f"paths.runs={runs}", f"sweep.index={number}"]
    subprocess.run(words, cwd=ROOT, capture_output=True, check=True)


def assert_alike(one, other):
    """The row has the same losses, weights and looks in two folders, but for rounding."""
    metrics = [read_jsonl(row(runs) / "metrics.jsonl") for runs in (one, other)]
    first, second = ([line["loss"] for line in lines if "loss" in line] for lines in metrics)
    assert first == pytest.approx(second, rel=1e-3)
    first, second = ([line["held_out_correct"] for line in lines if "weights" in line] for lines in metrics)
    assert first and first == pytest.approx(second, abs=1)
    for kind in ("weights", "ema_0.9"):
        first, second = (load_weights(row(runs) / f"{kind}.safetensors") for runs in (one, other))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=2e-4)


def logits(runs):
    return {file: file.stat().st_mtime_ns for file in (runs / "demo_tiny/logits").rglob("*.npy")}


def contents(runs):
    """What the row is, to the byte, but for when and where it was made."""
    done = read_json(row(runs) / "done.json")
    told = {key: value for key, value in done.items() if key not in ("seconds", "provenance", "slurm")}
    return [(row(runs) / name).read_bytes() for name in ("weights.safetensors", "metrics.jsonl")], told


def cooked(runs):
    records = [read_json(file) for file in sorted((runs / "demo_tiny/soups").rglob("soup.json"))]
    return {each["recipe"]: (each["digest"], each["held_out"], each["trials"]) for each in records}


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """All stages, each sent to wait for the one before it."""
    runs = tmp_path_factory.mktemp("undisturbed")
    sent, before = {}, None
    steps = [("finetune", 3), ("evaluate", 2), ("soups", None), ("evaluate", None), ("analysis", None)]
    for place, (script, tasks) in enumerate(steps):
        options = [f"--array=0-{tasks - 1}"] if tasks else []
        options += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        sent[place] = send(cluster, script, runs, options=options)
        before = sent[place].job
    sent[1].wait()
    early = logits(runs)
    sent[4].wait()
    return runs, sent, early


def test_the_scripts_make_every_stages_files(undisturbed):
    runs, sent, _ = undisturbed
    assert [(row(runs, number) / "done.json").exists() for number in range(3)] == [True] * 3
    assert set(cooked(runs)) == {"best", "uniform", "greedy", "learned", "ensemble"}
    models = [*(row(runs, number) for number in range(3)), *(runs / "demo_tiny/soups").glob("[bugl]*")]
    assert all((folder / "scores.jsonl").exists() for folder in models)
    assert all((runs / "demo_tiny/analysis" / name).exists() for name in TABLES), sent[4].said


def test_rows_wait_for_the_initialisation_that_another_task_makes(undisturbed):
    sent = undisturbed[1][0]
    assert f"waiting for row 0, which task {sent.job}_0 makes" in sent.said


def test_an_evaluation_sent_again_computes_no_logits_twice(undisturbed):
    runs, _, early = undisturbed
    assert early
    assert early.items() <= logits(runs).items()


def test_a_row_tells_the_job_that_trained_it(undisturbed):
    runs, sent, _ = undisturbed
    told = read_json(row(runs) / "done.json")["slurm"]
    assert told == {"job": f"{sent[0].job}_1", "restarts": 0, "nodes": told["nodes"]}
    assert told["nodes"] in ("node1", "node2")


def python_of(sent):
    """The process of a job's python."""
    mark = f"SLURM_JOB_ID={sent.cluster.told(sent.job, 'JobId')}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = b"\0-m\0finetune\0" in (process / "cmdline").read_bytes()
            if is_ours and mark in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no python of job {sent.job}\n{sent.said}")


def signalled(sent):
    sent.cluster.run("scancel", "--signal=USR1", "--batch", sent.job)


def requeued(sent):
    sent.cluster.run("scontrol", "requeue", sent.job)


def killed(sent):
    os.kill(python_of(sent), signal.SIGKILL)
    sent.wait("FAILED")
    requeued(sent)


def begin(cluster, undisturbed, runs, script):
    """Send a row that has its initialisation, or soups that have their rows; and what shows that they are at work."""
    shutil.copytree(undisturbed / "demo_tiny", runs / "demo_tiny", ignore=shutil.ignore_patterns("soups", "analysis"))
    if script == "finetune":
        shutil.rmtree(row(runs))
        return send(cluster, script, runs, options=["--array=1"]), row(runs) / "state.pt"
    return send(cluster, script, runs), runs / "demo_tiny/soups/learned/state.safetensors"


@pytest.fixture(scope="module")
def disturbed(cluster, undisturbed, tmp_path_factory):
    """Jobs by script and fault, each disturbed once in the middle of its work and then left to Slurm.

    They run beside each other, but for those that a job of a higher partition preempts, which takes both nodes.
    """
    faults = [("finetune", signalled), ("finetune", requeued), ("finetune", killed), ("soups", signalled)]
    jobs = {}
    for script, fault in faults:
        jobs[script, fault.__name__] = begin(cluster, undisturbed[0], tmp_path_factory.mktemp(fault.__name__), script)
    for (_, fault), (sent, at_work) in zip(faults, jobs.values(), strict=True):
        sent.until(at_work.exists, str(at_work))
        fault(sent)
    for sent, _ in jobs.values():
        sent.wait()
    preempted = [
        begin(cluster, undisturbed[0], tmp_path_factory.mktemp("high"), each) for each in ("finetune", "soups")
    ]
    for sent, at_work in preempted:
        sent.until(at_work.exists, str(at_work))
    words = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.sbatch(*words, cwd=undisturbed[0])
    for sent, _ in preempted:
        sent.wait()
    jobs |= {("finetune", "preempted"): preempted[0], ("soups", "preempted"): preempted[1]}
    return {case: sent for case, (sent, _) in jobs.items()}


@pytest.mark.parametrize("fault", ["signalled", "requeued", "killed", "preempted"])
def test_a_disturbed_row_is_continued_by_slurm_and_ends_with_the_same_bytes(fault, disturbed, undisturbed):
    sent = disturbed["finetune", fault]
    assert contents(sent.runs) == contents(undisturbed[0])
    assert read_json(row(sent.runs) / "done.json")["slurm"]["restarts"] == 1
    assert ("interrupted by a signal, and saved" in sent.said) == (fault != "killed")


@pytest.mark.parametrize("fault", ["signalled", "preempted"])
def test_disturbed_soups_are_continued_and_end_as_undisturbed_ones(fault, cluster, disturbed, undisturbed):
    sent = disturbed["soups", fault]
    assert cooked(sent.runs) == cooked(undisturbed[0])
    assert cluster.told(sent.job, "Restarts") == "1"


def test_rows_do_not_wait_for_an_initialisation_that_failed(cluster, tmp_path):
    row(tmp_path, 0).parent.mkdir(parents=True)
    row(tmp_path, 0).write_text("a file where a folder should be")
    sent = send(cluster, "finetune", tmp_path, options=["--array=0-1%1"])
    sent.wait("FAILED")
    assert f"row 0 is not there, and task {sent.job}_0 has ended (FAILED)" in sent.said


def test_a_row_on_two_nodes_requeued_midway_has_the_losses_of_one_process(cluster, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    finetune(alone, 0)
    shutil.copytree(alone, together)
    options = ["--nodes=2", "--ntasks-per-node=1"]
    settings = ["compute.save_every=1", "compute.strategy=fsdp", "sweep.index=1"]
    sent = send(cluster, "finetune_multi", together, *settings, options=options, defaults=ALIKE)
    sent.until((row(together) / "state.pt").exists, "a first state")
    signalled(sent)
    finetune(alone, 1)
    sent.wait()
    told = read_json(row(together) / "done.json")["slurm"]
    assert told == {"job": sent.job, "restarts": 1, "nodes": "node[1-2]"}
    assert_alike(together, alone)
