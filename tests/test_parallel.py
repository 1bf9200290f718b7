"""Real torchrun processes (gloo) train as one process does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from configs.schema import CONFIGS
from store.weights import load_weights

ROOT = CONFIGS.parent
SETTINGS = ["experiment=demo_tiny", "sweep.rows=1", "~sweep.draw.optim.epochs", "optim.epochs=3"]
SETTINGS += ["regularizer.ema=[0.9]", "~sweep.draw.optim.mixup", "optim.mixup=0.4", "~sweep.draw.optim.lr"]
# The first steps of Adam go by the sign of a gradient, which noise decides where it is almost zero.
SETTINGS += ["optim.kind=sgd", "optim.lr=1e-4", "optim.clip_norm=null", "model.frozen_stages=0"]
SETTINGS += ["optim.evaluate_every=4"]


def finetune(runs, *settings, processes=1, row=1):
    module = ["-m", "finetune", *SETTINGS, *settings, f"paths.runs={runs}", f"sweep.index={row}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    call = [sys.executable, *(torchrun if processes > 1 else []), *module]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


def results(runs):
    folder = runs / "demo_tiny/ingredients/001"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    looks = [(row["step"], row["weights"], row["held_out_correct"]) for row in rows if "weights" in row]
    return losses, {kind: load_weights(folder / f"{kind}.safetensors") for kind in ("weights", "ema_0.9")}, looks


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    runs = tmp_path_factory.mktemp("alone")
    finetune(runs, row=0)
    start = tmp_path_factory.mktemp("start")
    shutil.copytree(runs, start, dirs_exist_ok=True)
    finetune(runs)
    return start, results(runs)


def assert_alike(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    for kind, weights in expected[1].items():
        for name, tensor in weights.items():
            torch.testing.assert_close(found[1][kind][name], tensor, rtol=1e-3, atol=2e-4, msg=f"{kind} {name}")
    assert [look[:2] for look in found[2]] == [look[:2] for look in expected[2]]
    assert max(abs(one[2] - other[2]) for one, other in zip(found[2], expected[2], strict=True)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["compute.strategy=ddp"],
        ["compute.strategy=ddp", "compute.micro_batch=3", "compute.loader_workers=1"],
        ["compute.strategy=fsdp"],
        ["compute.strategy=fsdp", "compute.gradient_checkpointing=true", "compute.micro_batch=4"],
    ],
    ids=["ddp", "ddp, small parts", "fsdp", "fsdp, small parts, recomputed"],
)
def test_two_processes_give_the_losses_weights_and_held_out_counts_of_one(settings, alone, tmp_path):
    start, expected = alone
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    finetune(tmp_path, *settings, processes=2)
    assert_alike(results(tmp_path), expected)


@pytest.mark.slow
def test_two_processes_keep_the_best_of_each_kind_of_weights(alone, tmp_path):
    start, _ = alone
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    finetune(tmp_path, "compute.strategy=fsdp", "optim.keep=best", "optim.epochs=2", processes=2)
    _, _, looks = results(tmp_path)
    best = json.loads((tmp_path / "demo_tiny/ingredients/001/done.json").read_text())["best"]
    for kind in ("raw", "ema_0.9"):
        counts = [(step, count) for step, name, count in looks if name == kind]
        assert (best[kind]["step"], best[kind]["correct"]) == max(counts, key=lambda look: (look[1], -look[0]))


@pytest.mark.slow
def test_perturbations_of_each_process_are_not_those_of_all(alone, tmp_path):
    start, _ = alone
    found = {}
    for synchronised in ("true", "false"):
        runs = tmp_path / synchronised
        shutil.copytree(start, runs)
        sam = [f"regularizer.sam.synchronised={synchronised}", "regularizer.sam.rho=0.5", "optim.steps=3"]
        finetune(runs, "regularizer=sam", "regularizer.ema=[0.9]", "regularizer.ingredient=raw", *sam, processes=2)
        found[synchronised] = results(runs)[1]["weights"]
    assert any(not torch.equal(tensor, found["false"][name]) for name, tensor in found["true"].items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_started_on_two_processes_is_continued_by_one(strategy, alone, tmp_path):
    start, expected = alone
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "demo_tiny/ingredients/001/state.pt"
    script = (
        "import os, sys, finetune.loop as loop\n"
        "keep = loop._keep\n"
        "def stop(state, folder):\n"
        "    keep(state, folder)\n"
        "    os._exit(7)\n"
        "loop._keep = stop\n"
        "import runpy; sys.argv[0] = 'finetune'; runpy.run_module('finetune', run_name='__main__')\n"
    )
    file = tmp_path / "stops_after_an_epoch.py"
    file.write_text(script)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(file)]
    call += [*SETTINGS, f"compute.strategy={strategy}", f"paths.runs={tmp_path}", "sweep.index=1"]
    subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert state.exists()
    ends = [row["epoch"] for row in torch.load(state, weights_only=True)["progress"]["metrics"] if "epoch" in row]
    assert ends == [1]
    finetune(tmp_path)
    assert_alike(results(tmp_path), expected)
