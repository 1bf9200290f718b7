"""Estimates: by hand where numbers are small, beside the real thing where there is one."""

import json
from dataclasses import replace
from itertools import product

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from configs.errors import UserError
from configs.schema import load
from configs.training import Distill, Optim, Regularizer, Sam, Swa
from finetune.optimisers import build
from finetune.rows import row_config
from slurm import workload
from slurm.costs import Stage, costs, hours, makespan
from slurm.metadata import metadata
from slurm.plan import overview, paper_experiments, spelled_out
from slurm.recipes import dish_work
from slurm.scaling import TABLES
from slurm.schedule import most_rounds, read_decisions, simulate
from slurm.schedule import table as schedule_table
from slurm.workload import Network, Work, described, images_of, moments, network, row_work, state_bytes
from soups.shortcuts import greedy_speculative
from store.tables import ROOT
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


@pytest.fixture
def counted():
    """An experiment that says it has 1,000 training images."""
    typed = "task.counts={train: 1000, held_out: 30, test: 20, v2: 4, r: 4, sketch: 4, objectnet: 4, a: 4}"
    fixed = ["optim.batch_size=32", "optim.epochs=2", "~sweep.draw.optim.epochs"]
    return load("demo", typed, *fixed)


def test_flops_of_a_network_of_two_matrices_are_two_for_each_of_their_numbers():
    found = described(Tiny(), image(4), image(4))
    assert found.forward == found.inference == 2 * (48 * 5 + 5 * 2)
    assert found.parameters == 48 * 5 + 5 + 5 * 2 + 2
    assert found.bytes == 4 * found.parameters
    assert described(Tiny(), image(5), image(5)) is None  # a network that such images do not fit


def test_a_row_trains_on_whole_batches_three_forward_passes_each(counted):
    forward = network(counted.model, counted.task).forward
    work = row_work(counted, images_of(counted.task))
    assert work == Work(trained=3 * forward * 2 * 31 * 32, augmented=2 * 31 * 32)


def test_sam_distillation_and_checkpointing_add_their_passes(counted):
    images, once = images_of(counted.task), network(counted.model, counted.task).forward * 2 * 31 * 32

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
    assert row_work(row, images_of(counted.task)) == Work(
        trained=3 * forward * 320, augmented=320, inferred=forward * 30 * 9, fixed=30 * 9
    )


def test_held_out_images_are_taken_from_train():
    images = images_of(load("table3_clip_b32").task)
    assert images["held_out"] == 26_000
    assert images["train"] == 1_281_167 - 26_000
    assert images["sketch"] == 50_889


def test_a_task_without_counts_is_counted_from_its_data():
    images = images_of(load("demo").task)
    assert images["held_out"] == 596


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
    model = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Linear(8, 6))
    others = {"lr": 0.1, "weight_decay": 0.0, "epochs": 1, "batch_size": 2, "warmup_steps": 0, "clip_norm": None}
    settings_ = Optim(**optim, **others, label_smoothing=0.0, mixup=0.0)
    optimizer = build(settings_, model)
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if torch.is_tensor(t)]
    kept = sum(t.numel() for t in states if t.dim() > 0)
    trainable = list(model.parameters())
    size = sum(p.numel() for p in trainable)
    net = Network(size, size, 4 * size, 8, 0, 0, sum(workload._adafactor(p) for p in trainable))
    assert moments(settings_, net) == 4 * kept


def test_storage_of_table_3_by_hand():
    found = costs(load("table3_clip_b32"))
    kept = {stage.name: stage.storage for stage in found.stages}
    images = 26_000 + 50_000 + 10_000 + 30_000 + 50_889 + 18_574 + 7_500
    assert found.parameters == B32
    assert kept["fine-tune"] == 71 * 4 * B32
    assert kept["initialise"] == 2 * 4 * B32 + 1_281_167 * 512 * 4  # with the probe's features
    assert kept["evaluate"] == 73 * images * 1000 * 4 + images * 3 * 224 * 224  # logits, and decoded copies
    assert kept["recipes"] == 11 * 4 * B32  # of eleven recipes two are ensembles, and one has three orders
    assert found.state == 3 * 4 * B32  # weights and AdamW's two moments


def test_every_row_and_model_and_dish_is_a_job():
    config = load("table3_clip_b32")
    jobs = {stage.name: len(stage.jobs) for stage in costs(config).stages}
    assert jobs == {"initialise": 1, "fine-tune": 71, "evaluate": 73, "recipes": 13, "evaluate soups": 11}
    jobs = {stage.name: len(stage.jobs) for stage in costs(load("tablel1_distill")).stages}
    assert (jobs["fine-tune"], jobs["distil"]) == (10, 4)


def test_greedy_looks_at_held_out_for_every_candidate_but_the_first():
    config = load("table3_clip_b32")
    images, net = images_of(config.task), network(config.model, config.task)
    work = dish_work(config, "greedy", images)
    assert work == Work(inferred=71 * 26_000 * net.inference, copied=71 * 26_000, read=72 * 4 * B32)
    learned = dish_work(config, "learned", images)
    assert learned.again == 2 * 3 * 407 * 72 * 4 * B32  # twice at each of 407 steps of 64 in three epochs


def test_hours_are_those_of_the_slower_of_gpu_and_cores():
    config = load(
        "table3_clip_b32",
        *("plan.gpu=h100", "plan.utilisation=0.5", "plan.cores_per_gpu=10", "plan.augmented_per_core=100"),
    )
    computing = hours(config, Work(trained=989.4e12 * 1800, augmented=1000))
    assert computing.all == pytest.approx(1)
    decoding = hours(config, Work(trained=989.4e12, augmented=3_600_000))
    assert decoding.all == pytest.approx(1)
    reading = hours(config, Work(read=2 * 10**9 * 3600, again=7 * 10**9 * 3600))
    assert reading.all == pytest.approx(2)


def test_a_pool_larger_than_memory_is_read_again_at_the_file_system_s_pace():
    large = load("table4_vitg")
    assert hours(large, Work(again=2 * 10**9 * 3600)).all == pytest.approx(1)


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
    stage = Stage("fine-tune", (8.0, 8.0), 8, 16, 0, 0, 0)
    assert stage.wall_hours(7) is None
    assert stage.wall_hours(15) == 2
    assert stage.wall_hours(16) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 10))
def test_rounds_are_never_more_than_their_bound(accepted, workers):
    spent = simulate(accepted, workers)
    assert spent.rounds <= most_rounds(len(accepted), sum(accepted), workers)
    assert spent.rounds <= len(accepted) <= spent.evaluations


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 16, 64])
def test_the_simulation_is_speculative_greedy_itself_with_the_authors_scores(workers):
    lines = (ROOT / "results/released/greedy_decisions.csv").read_text().splitlines()[1:]
    scores = [int(line.split(",")[3]) for line in lines]
    # Model i is the i-th unit vector: the last number of an average that is not 0 says which candidate it is of.
    models = [lambda i=i: {"w": torch.eye(len(scores))[i]} for i in range(len(scores))]

    def replayed(candidates):
        return [scores[int(load_one()["w"].nonzero().max())] / 26_000 for load_one in candidates]

    order = [scores[0] / 26_000 - 1e-6 * i for i in range(len(scores))]
    soup, spent = greedy_speculative(models, order, replayed, ahead=workers, ties="drop")
    assert spent == simulate(read_decisions(), workers)
    assert soup.ingredients == (0, 1, 10, 16, 17)


@pytest.mark.skipif(not TRACE.exists(), reason="the reference files are not beside the project")
def test_the_decisions_are_those_of_the_log():
    trace = json.loads(TRACE.read_text())["decisions"]
    assert read_decisions() == [decision["accepted"] for decision in trace]


@pytest.mark.parametrize("name", TABLES)
def test_the_page_says_what_its_command_prints(name):
    assert TABLES[name]() in (ROOT / "slurm/SCALING.md").read_text()


def test_the_committed_tables_are_those_of_the_code():
    committed = pd.read_csv(ROOT / "results/measured/greedy_schedule.csv")
    pd.testing.assert_frame_equal(committed, schedule_table(read_decisions()))
    lines = pd.read_csv(ROOT / "slurm/costs.csv", dtype=str, keep_default_na=False).set_index("experiment")
    assert list(lines.index) == paper_experiments()
    for line in overview(["table3_clip_b32", "tablec1_basic"], ["plan.gpu=h100"]).to_dict("records"):
        for column in ("rows", "gpu_hours", "wall_hours_64", "kept_gb", "state_gb"):
            assert float(lines.loc[line["experiment"], column]) == pytest.approx(line[column])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hub_folders(tmp_path_factory.mktemp("hub"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in paper_experiments() if not name.startswith("table5")])
def test_every_experiment_of_the_paper_has_a_plan(name, folders):
    config = loaded_locally(name, folders)  # the one reason for which a plan may fail: a config at the hub
    found = costs(config)
    assert found.rows == config.sweep.size
    assert 0 < found.wall_hours(64) <= found.wall_hours(8) < found.gpu_hours + 1e-9
    assert found.storage > found.rows * 4 * found.parameters
    assert found.state > max(state_bytes(row_config(config, 1)) / 2, 4 * found.parameters)


def test_short_names_are_of_the_plan():
    assert spelled_out(["gpu=a100", "gpus=4", "utilisation=0.5", "experiment=demo", "plan.gpu=h200"]) == [
        *("plan.gpu=a100", "plan.gpus=4", "plan.utilisation=0.5", "experiment=demo", "plan.gpu=h200")
    ]


def test_a_row_lists_the_training_images_and_opens_one_for_each_it_sees():
    found = {part.stage: part for part in metadata(load("figuref1_lr"))}
    assert found["fine-tune"].tasks == 6
    assert found["fine-tune"].created == 6 * 6  # config, metrics, lock, done, weights, logits of held-out
    assert found["fine-tune"].listed == 1_281_167
    assert found["fine-tune"].opened == 6 * 10 * (1_255_167 // 512) * 512
    assert found["evaluate"].created == 8 * 7  # six splits and scores.jsonl, of rows, initialisation and zero-shot
