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
from configs.registered import ROOT
from configs.schema import Paths, load
from configs.training import Distill, Optim, Regularizer, Sam, Swa
from finetune.optim import build
from models.probe import PASSES
from slurm.cost import FLOAT32, HOUR, MOMENTS, Stage, Work, costs, images_of, makespan, stage_of, state_bytes, total
from slurm.jobs import TRAINING, jobs_of, seconds_of
from slurm.plan import overview, paper_experiments, show_all
from store.rows import row_config
from tests.commands import here
from tests.experiments import hub_folders, loaded, loaded_locally
from tests.test_slurm_jobs import assert_shared

TRACE = ROOT.parent / "shared/reference/released/greedy_trace.json"
B32 = 88_362_216  # parameters: the tower of CLIP ViT-B/32 and a head of 512 x 1,000 and 1,000
PEAK = 989.4e12  # FLOP/s of an H100 in bf16
IMAGES = {"train": 1000, "held_out": 30, "test": 20, "v2": 4, "r": 4, "sketch": 4, "objectnet": 4, "a": 4}


@pytest.fixture
def work(monkeypatch):
    """The work of an experiment of two epochs on IMAGES in batches of 32."""
    monkeypatch.setattr("slurm.cost.images_of", lambda task: IMAGES)
    words = ("optim.batch_size=32", "optim.epochs=2", "~sweep.draw.optim.epochs", "compute.precision=bf16")
    return Work(load("demo", *words))


def test_a_row_trains_on_whole_batches_and_regularisers_add_their_passes(work):
    config, once = work.config, work.net.forward * 2 * 31 * 32

    def passes(regularizer, checkpointing=False):
        compute = replace(config.compute, gradient_checkpointing=checkpointing)
        return work.flops(replace(config, regularizer=regularizer, compute=compute)) / once

    sam = Sam(rho=0.05, synchronised=True)
    assert (passes(Regularizer()), passes(Regularizer(), checkpointing=True)) == (3, 4)
    assert (passes(Regularizer(sam=sam)), passes(Regularizer(sam=sam), checkpointing=True)) == (6, 8)
    assert passes(Regularizer(distill=Distill(rows=(1, 2)))) == 5


def test_steps_replace_epochs_and_evaluations_are_of_every_kind_of_weights(work):
    optim = replace(work.config.optim, steps=10, evaluate_every=4)
    row = replace(work.config, optim=optim, regularizer=Regularizer(ema=(0.9,), swa=Swa(start=0.5, every=1)))
    # Raw, EMA and SWA weights are evaluated on 30 images after steps 4, 8 and 10; EMA and SWA at the end too.
    computing = 3 * work.net.forward * 320 / work.plan.utilisation
    computing += work.net.inference * 30 * (9 + 2) / work.plan.inference_utilisation
    decoding = 320 / work.plan.augmented_per_core + 30 * (9 + 2) / work.plan.fixed_per_core
    expected = [computing / PEAK / HOUR, decoding / work.plan.cores_per_gpu / HOUR, 0]
    assert work.row(row) == pytest.approx(expected)


def test_images_are_counted_from_settings_or_from_the_data():
    images = images_of(loaded("table3_clip_b32").task)
    assert (images["held_out"], images["train"], images["sketch"]) == (26_000, 1_281_167 - 26_000, 50_889)
    assert images_of(loaded("demo").task)["held_out"] == 616


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "table3_clip_b32",
            "task.held_out_index=x.npy task.held_out_per_class=null",
            r"task\.held_out_index=null task",
        ),
        ("table3_clip_b32", "~task.counts.a", r"\+task\.counts\.a=N"),
        ("table3_clip_b32", "plan.gpu=h101", "gpu=h101 .*h100"),
        ("released", "", "its rows are imported"),
    ],
)
def test_what_is_not_known_is_said_and_not_guessed(name, words, message):
    with pytest.raises(UserError, match=message):
        costs(load(name, *words.split()))


@pytest.mark.parametrize(
    "optim",
    [{"kind": "adamw"}, {"kind": "sgd"}, {"kind": "sgd", "momentum": 0}, {"kind": "rmsprop"}, {"kind": "adafactor"}],
    ids=str,
)
def test_moments_are_those_that_the_optimiser_keeps(optim):
    model = nn.Linear(400, 300)
    others = {"lr": 0.1, "weight_decay": 0.0, "epochs": 1, "batch_size": 2, "warmup_steps": 0, "clip_norm": None}
    settings_ = Optim(**optim, **others, label_smoothing=0.0, mixup=0.0)
    optimizer = build(settings_, model)
    model(torch.ones(2, 400)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim() > 0]
    kept = sum(t.numel() * t.element_size() for t in states)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert FLOAT32 * parameters * MOMENTS[settings_.kind][settings_.momentum > 0] == pytest.approx(kept, rel=0.02)


def test_jobs_and_storage_of_table_3_by_hand():
    found = costs(loaded("table3_clip_b32"))
    jobs = {stage.name: len(stage.jobs) for stage in found.stages}
    assert jobs == {"initialise": 1, "fine-tune": 71, "evaluate": 73, "recipes": 14, "evaluate soups": 12}
    kept = {stage.name: stage.storage for stage in found.stages}
    images = 26_000 + 50_000 + 10_000 + 30_000 + 50_889 + 18_574 + 7_500
    assert found.parameters == B32
    assert kept["fine-tune"] == 71 * 4 * B32
    heads = 3 * 1000 * 513 * 4  # of three values of C
    assert kept["initialise"] == 2 * 4 * B32 + 1_281_167 * 512 * 4 + heads  # with the probe's features
    assert kept["evaluate"] == 73 * images * 1000 * 4 + images * 3 * 224 * 224  # logits, and decoded copies
    assert kept["recipes"] == 12 * 4 * B32  # of twelve recipes two are ensembles, and one has three orders
    assert found.state == 3 * 4 * B32  # weights and AdamW's two moments


@pytest.mark.slow
def test_a_row_is_evaluated_once_for_each_kind_of_weights_that_single_models_are_chosen_from():
    jobs = {stage.name: len(stage.jobs) for stage in costs(loaded("tablel1_distill")).stages}
    assert (jobs["fine-tune"], jobs["distil"]) == (10, 4)
    config = loaded("table4_vitg")
    jobs = {stage.name: len(stage.jobs) for stage in costs(config).stages}
    assert (jobs["fine-tune"], jobs["evaluate"]) == (58, 58 * 2 + 1 + (config.model.templates is not None))
    assert Work(config).pool == 58  # the initialisation is no candidate


def test_hours_are_those_of_the_slower_of_gpu_and_cores_and_of_reading_before():
    words = ("plan.gpu=h100", "plan.utilisation=0.5", "plan.cores_per_gpu=10", "plan.augmented_per_core=100")
    work = Work(load("table3_clip_b32", *words))
    assert work.hours(PEAK * HOUR, 7200, 0) == pytest.approx([1, 0.2, 0])
    assert work.reading(2 * 10**9 * HOUR, 7 * 10**9 * HOUR) == pytest.approx([0, 0, 2])
    assert stage_of("x", [work.hours(PEAK * HOUR, 7200, HOUR)], 0).jobs == (pytest.approx(2),)
    # A pool that the node's memory does not hold is read again at the file system's pace.
    assert Work(loaded("table4_vitg")).reading(0, 2 * 10**9 * HOUR)[2] == pytest.approx(1)
    # Greedy tries every candidate but the first; a learned soup reads all 72 twice at each of 407 steps of an epoch.
    assert work.pool == 72
    computing, _, reading = work.recipe("greedy")
    assert computing == pytest.approx(71 * 26_000 * work.net.inference / 0.4 / PEAK / HOUR)
    assert reading == pytest.approx(72 * 4 * B32 / 2e9 / HOUR)
    assert work.recipe("learned")[2] - reading == pytest.approx(2 * 3 * 407 * 72 * 4 * B32 / 7e9 / HOUR)


def test_the_fit_of_a_probe_is_paid_in_float32_whatever_the_precision():
    work = Work(load("table3_clip_b32", "plan.gpu=a100", "compute.precision=bf16"))
    flops = 3 * PASSES * 4 * 1_255_167 * 512 * 1000 + 2 * 1_255_167 * 512**2
    seconds = HOUR * work.probe_fit(1_255_167)[0]
    assert seconds == pytest.approx(flops / 19.5e12 / work.plan.inference_utilisation)
    assert 15 < seconds < 90


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
    stage = Stage("fine-tune", (8.0, 8.0), 8, "computing", 0)  # rows of eight GPUs do not run on fewer
    assert total([stage, stage], (7, 15, 16)) == (32, [None, 4, 2], 0)


@pytest.mark.skipif(not TRACE.exists(), reason="the reference files are not beside the project")
@pytest.mark.parametrize("workers", [1, 8, 64])
def test_the_replayed_decisions_are_those_of_the_authors_log(workers):
    accepted = [decision["accepted"] for decision in json.loads(TRACE.read_text())["decisions"]]
    assert [trial.accepted for trial in replay(workers).trials[1:]] == accepted
    assert replay(workers).mixture == (0, 1, 10, 16, 17)


@pytest.mark.slow
def test_the_committed_tables_are_those_of_the_code():
    committed = pd.read_csv(ROOT / "results/measured/greedy_schedule.csv")
    pd.testing.assert_frame_equal(committed, pd.DataFrame(schedule()))
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
    hours, (on_8, on_64), kept = total(found.stages, (8, 64))
    assert 0 < on_64 <= on_8 < hours + 1e-9
    assert kept > found.rows * 4 * found.parameters
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
        assert_shared(own, trained, name)


def test_a_plan_takes_short_words_and_says_what_it_assumes():
    answer = here(["-m", "slurm.plan", "experiment=demo", "gpu=a100", "gpus=4", "utilisation=0.5", "plan.gpu=h200"])
    assert answer.returncode == 0, answer.stderr
    assert " on 4 " in answer.stdout and "gpu=h200" in answer.stdout and "50 % are used in training" in answer.stdout


def test_a_table_that_is_there_is_overwritten_only_if_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("slurm.plan.paper_experiments", lambda: [])
    there = tmp_path / "costs.csv"
    there.write_text("of yesterday")
    with pytest.raises(UserError, match="is there already: name another file, or type force=true"):
        show_all([], there, force=False)
    show_all([], there, force=True)
    assert there.read_text() != "of yesterday"
    with pytest.raises(UserError, match=r"name a file that ends in \.csv"):
        show_all([], tmp_path / "new.xlsx", force=False)
