"""The scripts in slurm/, sent by hand to a real Slurm; tests/cluster/test_experiment.py sends them by one command."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from real_slurm import until

from configs.registered import CONFIGS
from soups.experiment import stage
from soups.files.atomic import read_json, read_jsonl
from soups.files.weights import load_weights
from tests.commands import python
from tests.pools import finished_pool, small_network

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = CONFIGS.parent
# Few steps, at a small rate, of an optimiser that does not go by signs of gradients: rounding has no time to grow.
ALIKE = ["experiment=demo_tiny", "sweep.rows=1", "~sweep.draw.optim.epochs", "optim.epochs=4", "~sweep.draw.optim.lr"]
ALIKE += ["optim.kind=sgd", "optim.lr=1e-4", "regularizer.ema=[0.9]", "optim.evaluate_every=20"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return small_network(tmp_path_factory.mktemp("network"))


@dataclass(frozen=True)
class Sent:
    """A job of one script, writing under a folder of its own."""

    cluster: object
    runs: Path
    job: str

    @property
    def printed(self):
        return "".join(log.read_text() for log in sorted(self.runs.glob(f"*-{self.job}*.out")))

    @property
    def is_running(self):
        return self.cluster.states(self.job) == {"RUNNING"}

    def wait(self, *states):
        try:
            self.cluster.wait(self.job, *states)
        except (RuntimeError, TimeoutError) as error:
            raise AssertionError(f"{error}\n{self.printed}") from None

    def until(self, happened, what):
        """Wait for something that the job does, while it runs."""

        def happened_or_failed():
            assert not self.cluster.states(self.job) & {"FAILED", "COMPLETED"}, self.printed
            return happened()

        until(happened_or_failed, 300, what)


def send(cluster, script, runs, *settings, options=()):
    """Send a script to a node without GPUs, from the project's root."""
    log = runs / ("%x-%A_%a.out" if any("--array" in option for option in options) else "%x-%j.out")
    own = ["--gres=none", "--cpus-per-task=1", f"--output={log}", *options, f"slurm/{script}.sbatch"]
    typed = [*own, f"paths.runs={runs}", *settings]
    return Sent(cluster, runs, cluster.sbatch(*typed, cwd=ROOT, environment={"PYTHON": python()}))


def row(runs, number=1):
    return runs / f"demo_tiny/ingredients/{number:03d}"


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


def soups_of(runs):
    records = [read_json(file) for file in sorted((runs / "demo_tiny/soups").rglob("soup.json"))]
    return {each["recipe"]: (each["digest"], each["held_out"], each["trials"]) for each in records}


@pytest.fixture(scope="module")
def trained(cluster, network, tmp_path_factory):
    """Rows 0 and 1, by an array whose first task starts when the second one waits for it."""
    runs = tmp_path_factory.mktemp("trained")
    sent = send(cluster, "finetune", runs, *ALIKE, *network, options=["--array=0-1", "--hold"])
    cluster.run("scontrol", "release", f"{sent.job}_1")
    sent.until(lambda: "waiting for row 0" in sent.printed, "a row that waits")
    cluster.run("scontrol", "release", f"{sent.job}_0")
    sent.wait()
    return runs, sent


def test_a_row_waits_for_the_initialisation_that_another_task_makes_and_tells_its_job(trained):
    runs, sent = trained
    assert f"waiting for row 0, which task {sent.job}_0 makes" in sent.printed
    record = read_json(row(runs) / "done.json")["slurm"]
    assert record == {"job": f"{sent.job}_1", "restarts": 0, "nodes": record["nodes"]}
    assert record["nodes"] in ("node1", "node2")


def signalled(sent):
    sent.cluster.run("scancel", "--signal=USR1", "--batch", sent.job)


def test_soups_that_are_disturbed_twice_are_continued_by_slurm_and_end_as_undisturbed_ones(cluster, network, tmp_path):
    alone, disturbed = tmp_path / "alone", tmp_path / "disturbed"
    settings = ["recipes=[best,greedy,learned]", "cooking.learned.epochs=60", "cluster.workers=1", *network]
    config, _ = finished_pool(alone, *settings)
    shutil.copytree(alone, disturbed)
    of_the_pool = ["experiment=demo_tiny", "task.classes=10", "analysis.resamples=200"]
    sent = send(cluster, "soups", disturbed, *of_the_pool, *settings)
    sent.until((disturbed / "demo_tiny/soups/learned/state.pt").exists, "a first state")
    signalled(sent)
    stage.run(config)
    sent.until(lambda: cluster.field_of(sent.job, "Restarts") == "1" and sent.is_running, "the second start")
    high = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.sbatch(*high, cwd=tmp_path)
    sent.wait()
    assert "interrupted by a signal, and saved" in sent.printed
    assert cluster.field_of(sent.job, "Restarts") == "2"
    assert soups_of(disturbed) == soups_of(alone)


def test_rows_do_not_wait_for_an_initialisation_that_failed(cluster, network, tmp_path):
    row(tmp_path, 0).parent.mkdir(parents=True)
    row(tmp_path, 0).write_text("a file where a folder should be")
    sent = send(cluster, "finetune", tmp_path, *ALIKE, *network, options=["--array=0-1%1"])
    sent.wait("FAILED")
    assert f"row 0 is not there, and task {sent.job}_0 has ended (FAILED)" in sent.printed


def test_a_row_on_two_nodes_requeued_midway_has_the_losses_of_one_process(cluster, network, trained, tmp_path):
    alone, together = trained[0], tmp_path / "together"
    shutil.copytree(row(alone, 0), row(together, 0))
    options = ["--nodes=2", "--ntasks-per-node=1"]
    settings = [*ALIKE, *network, "compute.save_every=1", "compute.strategy=fsdp", "sweep.index=1"]
    sent = send(cluster, "finetune_multi", together, *settings, options=options)
    sent.until((row(together) / "state.pt").exists, "a first state")
    signalled(sent)
    sent.wait()
    record = read_json(row(together) / "done.json")["slurm"]
    assert record == {"job": sent.job, "restarts": 1, "nodes": "node[1-2]"}
    assert_alike(together, alone)
