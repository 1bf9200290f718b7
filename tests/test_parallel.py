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


def finetune(runs, *settings, processes=1, row=1):
    module = ["-m", "finetune", *SETTINGS, *settings, f"paths.runs={runs}", f"sweep.index={row}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    call = [sys.executable, *(torchrun if processes > 1 else []), *module]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


def results(runs):
    folder = runs / "demo_tiny/ingredients/001"
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses, {kind: load_weights(folder / f"{kind}.safetensors") for kind in ("weights", "ema_0.9")}


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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_and_weights_of_one(strategy, alone, tmp_path):
    start, expected = alone
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    finetune(tmp_path, f"compute.strategy={strategy}", processes=2)
    assert_alike(results(tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_started_on_two_processes_is_continued_by_one(strategy, alone, tmp_path):
    start, expected = alone
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "demo_tiny/ingredients/001/state.pt"
    script = (
        "import os, sys, finetune.loop as loop\n"
        "keep = loop._keep\n"
        "def stop(state, folder, processes):\n"
        "    keep(state, folder, processes)\n"
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
    assert torch.load(state, weights_only=True)["progress"]["metrics"][-1]["epoch"] == 1
    finetune(tmp_path)
    assert_alike(results(tmp_path), expected)
