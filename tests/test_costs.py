"""Estimates: by hand where numbers are small, beside the real thing where there is one."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.schedule import replay, schedule
from configs.errors import UserError
from configs.schema import Paths, load
from configs.tables import ROOT
from configs.training import Distill, Optim, Regularizer, Sam, Swa
from finetune.optim import build
from models.probe import PASSES
from slurm.cost import (
    HOUR,
    Stage,
    Work,
    _stage,
    costs,
    hours,
    images_of,
    initialise_work,
    makespan,
    pool_size,
    recipe_work,
    row_work,
)
from slurm.jobs import TRAINING, jobs_of, seconds_of
from slurm.plan import overview, paper_experiments, refuse_out, spelled_out
from slurm.sizes import Network, factored, measured, moments, network, state_bytes
from store.rows import row_config
from tests.experiments import hub_folders, loaded_locally

TRACE = ROOT.parent / "shared/reference/released/greedy_trace.json"
B32 = 88_362_216  # parameters: the tower of CLIP ViT-B/32 and a head of 512 x 1,000 and 1,000


class Tiny(nn.Module):
    """Two multiplications by hand: 3 x 4 x 4 pixels to 5 features to 2 classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(48, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)))


def image(size):
    return torch.empty(1, 3, size, size, device="meta")


IMAGES = {"train": 1000, "held_out": 30, "test": 20, "v2": 4, "r": 4, "sketch": 4, "objectnet": 4, "a": 4}


@pytest.fixture
def counted():
    """An experiment whose work is counted for IMAGES."""
    return load("demo", "optim.batch_size=32", "optim.epochs=2", "~sweep.draw.optim.epochs")


def test_flops_of_a_network_of_two_matrices_are_two_for_each_of_their_numbers():
    found = measured(Tiny(), image(4), image(4))
    assert found.forward == found.inference == 2 * (48 * 5 + 5 * 2)
    assert found.parameters == 48 * 5 + 5 + 5 * 2 + 2
    assert found.bytes == 4 * found.parameters
    assert measured(Tiny(), image(5), image(5)) is None  # a network that such images do not fit


def test_a_row_trains_on_whole_batches_three_forward_passes_each(counted):
    forward = network(counted.model, counted.task).forward
    work = row_work(counted, IMAGES)
    assert work == Work(trained=3 * forward * 2 * 31 * 32, augmented=2 * 31 * 32)


def test_sam_distillation_and_checkpointing_add_their_passes(counted):
    images, once = IMAGES, network(counted.model, counted.task).forward * 2 * 31 * 32

    def passes(regularizer, checkpointing=False):
        compute = replace(counted.compute, gradient_checkpointing=checkpointing)
        return row_work(replace(counted, regularizer=regularizer, compute=compute), images).trained / once

    sam = Sam(rho=0.05, synchronised=True)
    assert passes(Regularizer()) == 3
    assert passes(Regularizer(), checkpointing=True) == 4
    assert passes(Regularizer(sam=sam)) == 6
    assert passes(Regularizer(sam=sam), checkpointing=True) == 8
    assert passes(Regularizer(distill=Distill(rows=(1, 2)))) == 5


def test_steps_replace_epochs_and_looks_are_of_every_kind_of_weights(counted):
    optim = replace(counted.optim, steps=10, evaluate_every=4)
    row = replace(counted, optim=optim, regularizer=Regularizer(ema=(0.9,), swa=Swa(start=0.5, every=1)))
    forward = network(counted.model, counted.task).forward
    # After steps 4, 8 and 10: raw, EMA and SWA on 30 images.
    assert row_work(row, IMAGES) == Work(
        trained=3 * forward * 320, augmented=320, inferred=forward * 30 * 9, fixed=30 * 9
    )


def test_held_out_images_are_taken_from_train():
    images = images_of(load("table3_clip_b32").task)
    assert images["held_out"] == 26_000
    assert images["train"] == 1_281_167 - 26_000
    assert images["sketch"] == 50_889


def test_a_task_without_counts_is_counted_from_its_data():
    images = images_of(load("demo").task)
    assert images["held_out"] == 616


def test_what_is_not_known_is_said_and_not_guessed():
    with pytest.raises(UserError, match=r"task\.held_out_index=null task\.held_out_per_class"):
        images_of(load("table3_clip_b32", "task.held_out_index=x.npy", "task.held_out_per_class=null").task)
    with pytest.raises(UserError, match=r"\+task\.counts\.a=N"):
        images_of(load("table3_clip_b32", "~task.counts.a").task)
    with pytest.raises(UserError, match="h100"):
        costs(load("table3_clip_b32", "plan.gpu=h101"))


@pytest.mark.parametrize(
    "optim",
    [{"kind": "adamw"}, {"kind": "sgd"}, {"kind": "sgd", "momentum": 0}, {"kind": "rmsprop"}, {"kind": "adafactor"}],
    ids=str,
)
def test_moments_are_those_that_the_optimiser_keeps(optim):
    model = nn.Sequential(nn.Conv2d(3, 40, 4), nn.Flatten(), nn.Linear(40, 36))  # adafactor factors the latter
    others = {"lr": 0.1, "weight_decay": 0.0, "epochs": 1, "batch_size": 2, "warmup_steps": 0, "clip_norm": None}
    settings_ = Optim(**optim, **others, label_smoothing=0.0, mixup=0.0)
    optimizer = build(settings_, model)
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if torch.is_tensor(t)]
    kept = sum(t.numel() * t.element_size() for t in states if t.dim() > 0)
    trainable = list(model.parameters())
    size = sum(p.numel() for p in trainable)
    net = Network(size, size, 4 * size, 40, 0, 0, sum(factored(p) for p in trainable))
    assert moments(settings_, net) == kept


def test_storage_of_table_3_by_hand():
    found = costs(load("table3_clip_b32"))
    kept = {stage.name: stage.storage for stage in found.stages}
    images = 26_000 + 50_000 + 10_000 + 30_000 + 50_889 + 18_574 + 7_500
    assert found.parameters == B32
    assert kept["fine-tune"] == 71 * 4 * B32
    heads = 3 * 1000 * 513 * 4  # of three values of C
    assert kept["initialise"] == 2 * 4 * B32 + 1_281_167 * 512 * 4 + heads  # with the probe's features
    assert kept["evaluate"] == 73 * images * 1000 * 4 + images * 3 * 224 * 224  # logits, and decoded copies
    assert kept["recipes"] == 12 * 4 * B32  # of twelve recipes two are ensembles, and one has three orders
    assert found.state == 3 * 4 * B32  # weights and AdamW's two moments


def test_the_fit_of_a_probe_is_paid_in_float32_whatever_the_precision():
    config = load("table3_clip_b32", "plan.gpu=a100", "compute.precision=bf16")
    work = initialise_work(config, images_of(config.task))
    assert work.fitted == 3 * PASSES * 4 * 1_255_167 * 512 * 1000 + 2 * 1_255_167 * 512**2  # 26,000 are held out
    seconds = 3600 * (hours(config, work)[0] - hours(config, replace(work, fitted=0))[0])
    assert seconds == pytest.approx(work.fitted / 19.5e12 / config.plan.inference_utilisation)
    assert 15 < seconds < 90


def test_every_row_and_model_and_dish_is_a_job():
    config = load("table3_clip_b32")
    jobs = {stage.name: len(stage.jobs) for stage in costs(config).stages}
    assert jobs == {"initialise": 1, "fine-tune": 71, "evaluate": 73, "recipes": 14, "evaluate soups": 12}
    jobs = {stage.name: len(stage.jobs) for stage in costs(load("tablel1_distill")).stages}
    assert (jobs["fine-tune"], jobs["distil"]) == (10, 4)


def test_a_row_is_evaluated_once_for_each_kind_of_weights_that_single_models_are_chosen_from():
    found = costs(load("table4_vitg"))
    jobs = {stage.name: len(stage.jobs) for stage in found.stages}
    zero_shot = load("table4_vitg").model.templates is not None
    assert (jobs["fine-tune"], jobs["evaluate"]) == (58, 58 * 2 + 1 + zero_shot)
    assert pool_size(load("table4_vitg")) == 58  # the initialisation is no candidate
    assert pool_size(load("table3_clip_b32")) == 72


def test_greedy_looks_at_held_out_for_every_candidate_but_the_first():
    config = load("table3_clip_b32")
    images, net = images_of(config.task), network(config.model, config.task)
    work = recipe_work(config, "greedy", images)
    assert work == Work(inferred=71 * 26_000 * net.inference, copied=71 * 26_000, read=72 * 4 * B32)
    learned = recipe_work(config, "learned", images)
    assert learned.again == 2 * 3 * 407 * 72 * 4 * B32  # twice at each of 407 steps of 64 in three epochs


def test_hours_are_those_of_the_slower_of_gpu_and_cores():
    config = load(
        "table3_clip_b32",
        *("plan.gpu=h100", "plan.utilisation=0.5", "plan.cores_per_gpu=10", "plan.augmented_per_core=100"),
    )
    assert hours(config, Work(trained=989.4e12 * 1800, augmented=1000)) == pytest.approx((1, 1 / 3600, 0))
    assert hours(config, Work(trained=989.4e12, augmented=3_600_000)) == pytest.approx((1 / 1800, 1, 0))
    assert hours(config, Work(read=2 * 10**9 * 3600, again=7 * 10**9 * 3600)) == pytest.approx((0, 0, 2))
    # Images are decoded while the GPU computes, and weights are read before it does.
    assert _stage(config, "x", [Work(trained=989.4e12 * 1800, augmented=1000, read=2 * 10**9 * 3600)], 0).jobs == (
        pytest.approx(2),
    )


def test_a_pool_larger_than_memory_is_read_again_at_the_file_system_s_pace():
    large = load("table4_vitg")
    assert hours(large, Work(again=2 * 10**9 * 3600))[2] == pytest.approx(1)


def best_end(jobs, workers):
    """The slow obvious way: every assignment."""
    return min(
        max(sum(job for job, place in zip(jobs, places, strict=True) if place == w) for w in range(workers))
        for places in product(range(workers), repeat=len(jobs))
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_the_end_of_the_longest_first_is_within_a_third_of_the_best(jobs, workers):
    best, found = best_end(jobs, workers), makespan(jobs, workers)
    assert best <= found <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9


def test_the_longest_first_ends_where_it_does_by_hand():
    assert makespan([1, 1, 1, 3], 2) == 3  # in the order of the list it would be 5
    assert makespan([2, 4], 1) == 6
    assert makespan([2, 4], 9) == 4


def test_a_row_of_eight_gpus_does_not_run_on_fewer():
    stage = Stage("fine-tune", (8.0, 8.0), 8, "computing", 0)
    assert stage.wall_hours(7) is None
    assert stage.wall_hours(15) == 2
    assert stage.wall_hours(16) == 1


@pytest.mark.skipif(not TRACE.exists(), reason="the reference files are not beside the project")
@pytest.mark.parametrize("workers", [1, 8, 64])
def test_the_replayed_decisions_are_those_of_the_authors_log(workers):
    accepted = [decision["accepted"] for decision in json.loads(TRACE.read_text())["decisions"]]
    assert [trial.accepted for trial in replay(workers).trials[1:]] == accepted
    assert replay(workers).mixture == (0, 1, 10, 16, 17)


def test_the_committed_tables_are_those_of_the_code():
    committed = pd.read_csv(ROOT / "results/measured/greedy_schedule.csv")
    pd.testing.assert_frame_equal(committed, schedule())
    lines = pd.read_csv(ROOT / "slurm/costs.csv", dtype=str, keep_default_na=False).set_index("experiment")
    assert list(lines.index) == paper_experiments()
    for line in overview(["table3_clip_b32", "tablec1_basic"], ["plan.gpu=h100"]).to_dict("records"):
        assert list(line)[1:] == list(lines.columns)
        for column in ("rows", "gpu_hours", "wall_hours_64", "kept_gb", "state_gb"):
            assert float(lines.loc[line["experiment"], column]) == pytest.approx(line[column])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hub_folders(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def clusters():
    return [load("demo", f"cluster={name}").cluster for name in ("slurm_1gpu", "slurm_8gpu")]


@pytest.mark.slow
@pytest.mark.parametrize("name", paper_experiments())
def test_every_experiment_of_the_paper_has_a_plan(name, folders, clusters):
    config = loaded_locally(name, folders)  # the one reason for which a plan may fail: a config at the hub
    found = costs(config)
    assert found.rows == config.sweep.size
    assert 0 < found.wall_hours(64) <= found.wall_hours(8) < found.gpu_hours + 1e-9
    assert found.storage > found.rows * 4 * found.parameters
    assert found.state > max(state_bytes(row_config(config, 1)) / 2, 4 * found.parameters)
    for cluster in clusters:
        own = replace(config, cluster=cluster, paths=Paths(runs=Path("new")))
        trained = [job for job in jobs_of(own, [f"experiment={name}"], found) if job.stage in TRAINING]
        for job in trained:
            (asked,) = [seconds_of(option[7:]) for option in job.options if option.startswith("--time=")]
            hours = next(stage.jobs for stage in found.stages if stage.name == job.stage)
            longest = max(hours) * HOUR / job.shape.processes
            limit = seconds_of(own.cluster.slurm.time)
            assert asked == limit or asked > longest  # in one go, or in some that each have all that they may
            assert asked <= limit and longest <= limit * (own.cluster.restarts + 1)
        assert sum(len(job.tasks) for job in trained) == config.sweep.size


def test_short_names_are_of_the_plan():
    assert spelled_out(["gpu=a100", "gpus=4", "utilisation=0.5", "experiment=demo", "plan.gpu=h200"]) == [
        *("plan.gpu=a100", "plan.gpus=4", "plan.utilisation=0.5", "experiment=demo", "plan.gpu=h200")
    ]


def test_a_table_that_is_there_is_overwritten_only_if_it_is_said(tmp_path):
    there = tmp_path / "costs.csv"
    there.write_text("of yesterday")
    with pytest.raises(UserError, match="is there already: name another file, or type force=true"):
        refuse_out(there, force=False)
    refuse_out(there, force=True)
    refuse_out(tmp_path / "new.csv", force=False)
    with pytest.raises(UserError, match=r"name a file that ends in \.csv"):
        refuse_out(tmp_path / "new.xlsx", force=False)
