"""Several processes train as one does, to 1e-9 over all steps, where rounding cannot grow: in float64.

In float32 the same comparison says little: a last place that differs decides at some step on which side of a kink an
activation is, and from there on losses part by 1e-3 on one processor and not on another. In bfloat16 and float32, for a
few steps, tests/test_shipped_rows.py compares.
"""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from configs.schema import load
from finetune.start import initialise
from finetune.train import fine_tune, train_row
from soups.files.atomic import read_jsonl
from soups.files.weights import load_weights
from store.runs import RunFolder
from tests.pair import StoppedError, in_float64, start_pair, stop_after
from tests.readers import cola_folder, t5_folder
from tests.test_shipped_rows import saved_timm

pytestmark = pytest.mark.slow
STEPS, STOP = 6, 3
NETWORK, SIZE = "test_efficientnet.r160_in1k", 64
SETTINGS = ["sweep.rows=1", "task.classes=10", "recipes=[best]"]
SETTINGS += ["~sweep.draw.optim.epochs", f"optim.steps={STEPS}", "~sweep.draw.optim.mixup", "optim.mixup=0.4"]
SETTINGS += ["~sweep.draw.optim.lr", "optim.lr=1e-3", "optim.batch_size=8", "optim.evaluate_every=2"]
SETTINGS += ["regularizer.ema=[0.9]", "compute.save_every=1", "tracking.every=1"]
SGD = ["optim.kind=sgd", "optim.clip_norm=null"]
SAM = ["regularizer.sam={rho: 0.5, synchronised: true}", *SGD]
OWN_SAM = ["regularizer.sam={rho: 0.5, synchronised: false}", *SGD]
BEST = ["optim.keep=best"]  # and AdamW, with clipping
DDP, FSDP = ["compute.strategy=ddp"], ["compute.strategy=fsdp"]
SMALL = ["compute.micro_batch=1"]
EQUAL = {  # what is trained -> how the pair does it
    "ddp": (SGD, DDP),
    "ddp, small parts": (SGD, [*DDP, *SMALL]),
    "fsdp": (SGD, FSDP),
    "fsdp, small parts, recomputed": (SGD, [*FSDP, *SMALL, "compute.gradient_checkpointing=true"]),
    "ddp, best of adamw": (BEST, DDP),
    "fsdp, best of adamw": (BEST, FSDP),
    "ddp, sam": (SAM, DDP),
    "fsdp, sam": (SAM, FSDP),
}
TIED = ["compute=cpu", "cluster=local", "task.counts=null", "task.held_out_share=0.3", "model.max_length=32"]
TIED += ["sweep.rows=1", "~sweep.draw.optim.epochs", "~sweep.draw.optim.batch_size", "optim.batch_size=8"]
TIED += ["~sweep.draw.optim.lr", "optim.lr=1e-3", f"optim.steps={STEPS}", "tracking.every=1"]
TIED += ["optim.evaluate_every=2", *SGD]
TIED += ["task.options=[bad,good]"]  # words that the network knows: unknown ones would be equally likely, to rounding
SHARED = {"ddp": (SGD, DDP), "fsdp": (BEST, FSDP)}  # begun by some, ended by others


def settings(folder, what, how=()):
    """Of a small network whose weights are a file beside the runs' folder."""
    config = load("demo_tiny", *SETTINGS, *what, *how, f"paths.runs='{folder}'")
    small = {"kind": "timm", "name": NETWORK, "weights": folder.parent / f"{NETWORK}.safetensors", "image_size": SIZE}
    small |= {"frozen_stages": 0, "head": "random", "templates": None, "proxy_for": None}
    return replace(config, model=replace(config.model, **small))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """By name, what the pair trains, to the end or one half of it; and what one process made of the same."""
    folder, configs, by_one = tmp_path_factory.mktemp("pair"), {}, {}

    def from_the_start(name, what, how=()):
        shutil.copytree(folder / "start", folder / name, dirs_exist_ok=True)
        return settings(folder / name, what, how)

    saved_timm(folder, NETWORK)
    texts, network = cola_folder(folder / "glue"), t5_folder(folder / "t5", dropout_rate=0.0)

    def tied(runs, *how):
        words = [*TIED, *how, f"task.folder={texts}", f"model.weights={network}", f"paths.runs={folder / runs}"]
        shutil.copytree(folder / "tied start", folder / runs) if runs != "tied start" else None
        return load("tablej1_t5_base_cola", *words)

    with in_float64(), start_pair(folder, "float64") as pair:
        initialise(tied("tied start"))
        for strategy in ("ddp", "fsdp"):
            configs[strategy, "tied"] = tied(f"tied {strategy}", f"compute.strategy={strategy}")
            pair.train(configs[strategy, "tied"])
        initialise(settings(folder / "start", SGD))
        for name, (what, how) in EQUAL.items():
            configs[name] = from_the_start(name, what, how)
            pair.train(configs[name])
        configs["own sam"] = from_the_start("own sam", OWN_SAM)
        pair.train(configs["own sam"])
        for name, (what, how) in SHARED.items():
            first, last = f"{name}, begun by two", f"{name}, ended by two"
            configs |= {each: from_the_start(each, what, how) for each in (first, last)}
            pair.train(configs[first], stop=STOP)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
                stop = partial(stop_after, {"stop": STOP, "kill": False})
                patch.setattr("finetune.train.fine_tune", partial(fine_tune, after_step=stop))
                train_row(settings(folder / last, what), 1)
            pair.train(configs[last])
        for what in (SGD, BEST, SAM):
            by_one[tuple(what)] = from_the_start(f"one{len(by_one)}", what)
            train_row(by_one[tuple(what)], 1)
        by_one["tied"] = tied("tied one")
        train_row(by_one["tied"], 1)
        yield configs, by_one, pair


def made(config):
    """What a row left: the loss of every step, the counts of evaluations on held-out, and weights of each kind."""
    folder = RunFolder.of(config).ingredient(1)
    rows = read_jsonl(folder / "metrics.jsonl")
    points = [row["loss"] for row in rows if "loss" in row and "epoch" not in row]
    counts = [row for row in rows if "weights" in row]
    return points, counts, {path.stem: load_weights(path) for path in folder.glob("*.safetensors")}


def assert_equal(config, expected):
    (points, counts, kinds), (points_of_one, counts_of_one, kinds_of_one) = made(config), made(expected)
    assert len(points) == STEPS and points == pytest.approx(points_of_one, rel=1e-9)
    assert counts == counts_of_one and len(counts) == STEPS // 2 * len(kinds)
    assert kinds.keys() == kinds_of_one.keys() >= {"weights"}
    for kind, weights in kinds_of_one.items():
        assert kinds[kind].keys() == weights.keys()  # a tied tensor once, whoever wrote it
        for name, tensor in weights.items():
            torch.testing.assert_close(kinds[kind][name], tensor, rtol=1e-9, atol=1e-9, msg=f"{kind} {name}")
            assert tensor.dtype == torch.float64 or not tensor.is_floating_point()


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_give_the_losses_weights_and_held_out_counts_of_one(name, started):
    configs, by_one, pair = started
    assert pair.outcomes(configs[name]) == ["ended"] * 2
    assert_equal(configs[name], by_one[tuple(EQUAL[name][0])])


@pytest.mark.parametrize("name", SHARED)
def test_a_run_begun_by_two_processes_is_ended_by_one(name, started):
    configs, by_one, pair = started
    what, config = SHARED[name][0], configs[f"{name}, begun by two"]
    assert pair.outcomes(config) == ["stopped"] * 2
    with in_float64():
        train_row(settings(config.paths.runs, what), 1)
    assert_equal(config, by_one[tuple(what)])


@pytest.mark.parametrize("name", SHARED)
def test_a_run_begun_by_one_process_is_ended_by_two(name, started):
    configs, by_one, pair = started
    config = configs[f"{name}, ended by two"]
    assert pair.outcomes(config) == ["ended"] * 2
    assert_equal(config, by_one[tuple(SHARED[name][0])])


def test_perturbations_of_each_process_are_not_those_of_all(started):
    configs, by_one, pair = started
    assert pair.outcomes(configs["own sam"]) == ["ended"] * 2
    (own, *_), (together, *_) = made(configs["own sam"]), made(by_one[tuple(SAM)])
    assert own[0] == pytest.approx(together[0], rel=1e-9)
    assert own[1] != pytest.approx(together[1], rel=1e-8)  # where what is the same agrees to 1e-9


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_tied_weights_as_one_does(strategy, started):
    configs, by_one, pair = started
    assert pair.outcomes(configs[strategy, "tied"]) == ["ended"] * 2
    assert_equal(configs[strategy, "tied"], by_one["tied"])
