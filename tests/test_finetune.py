"""Training: seeded by what a sample is, resumable to the bit, honest about divergence."""

import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import InterruptedBySignalError, UserError
from configs.schema import load
from configs.training import Augment, Distill, Regularizer, Swa
from eval.forward import Evaluator
from finetune.data import TrainingBatches, augmentation, epoch_order, mixed_batch, seed_globals
from finetune.dist import DivergedError, LateLosses
from finetune.length import Length
from finetune.train import ONE_PROCESS, held_out_correct
from models.classifier import pretrained, zero_shot_head
from store.processes import Processes, use_kernels
from tasks.load import class_names
from tasks.prefetch import prefetch
from tests.training import network, small_config, small_split, trained

MINIMAL = Augment(kind="minimal", crop=0.9)
STRONG = Augment(kind="rand", crop=0.5, magnitude=9, layers=2)


@pytest.fixture(scope="module")
def config():
    return replace(small_config(), augment=MINIMAL)


@pytest.fixture(scope="module")
def train():
    return small_split()


@pytest.fixture
def model(config):
    return network(config)


def batches_of(train, augment, **settings):
    """Batches of eight images, 64 pixels wide."""
    length = Length(examples=len(train), batch_size=8, steps_per_epoch=len(train) // 8, steps=500)
    config = replace(load("demo_tiny"), augment=augment)
    return TrainingBatches(train.stored, config, length, **{"run_seed": 1, "processes": ONE_PROCESS} | settings)


@pytest.mark.parametrize("augment", [MINIMAL, STRONG], ids=["minimal", "rand"])
def test_a_sample_looks_the_same_whatever_was_made_before_it(train, augment):
    later = batches_of(train, augment)[3]
    batches_of(train, STRONG)[7]
    torch.rand(5)
    assert (later.dtype, later.shape) == (torch.uint8, (8, 3, 64, 64))
    assert torch.equal(later, batches_of(train, augment)[3])


def test_a_sample_looks_the_same_whichever_process_makes_it(train):
    whole = batches_of(train, STRONG)
    parts = [replace(whole, processes=Processes(rank, 2, torch.device("cpu"))) for rank in range(2)]
    together = torch.cat([part[2] for part in parts])
    order = torch.cat([part.indices(2) for part in parts])
    assert torch.equal(whole[2][whole.indices(2).argsort()], together[order.argsort()])
    prefetched = list(prefetch(whole.__getitem__, range(498, 500), workers=1))
    assert len(prefetched) == 2
    assert torch.equal(prefetched[0], whole[498])


def test_a_sample_looks_different_in_another_epoch_and_under_a_stronger_augmentation(train):
    strong, weak = batches_of(train, STRONG), batches_of(train, MINIMAL)
    first, which = strong[0], strong.indices(0)
    original = train.images[which].float()
    assert (weak[0].float() - original).abs().mean() < (first.float() - original).abs().mean()
    step, place = divmod(epoch_order(len(train), 1, 1).tolist().index(which[0].item()), 8)
    step += len(train) // 8
    assert strong.indices(step)[place] == which[0]
    assert not torch.equal(first[0], strong[step][place])


def test_an_epoch_that_the_steps_cut_short_is_one(config):
    length = Length.of(replace(config.optim, batch_size=4, steps=7), 12)
    assert (length.steps_per_epoch, length.epochs) == (3, 3)
    assert Length.of(replace(config.optim, batch_size=4, steps=6), 12).epochs == 2


def test_the_crop_keeps_the_share_that_it_says():
    # A picture of one white quarter: a crop of at least 0.9 of the area keeps its share near a quarter.
    image = Image.fromarray(np.kron([[255, 0], [0, 0]], np.ones((32, 32))).astype(np.uint8)).convert("RGB")
    transform = augmentation(MINIMAL, 64)
    for sample in range(20):
        seed_globals(sample)
        assert 0.15 < np.asarray(transform(image)).mean() / 255 < 0.37


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    first, second = epoch_order(50, 1, 0), epoch_order(50, 1, 1)
    assert sorted(first.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()
    assert torch.equal(first, epoch_order(50, 1, 0))


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_only_what_has_a_gradient(train, tmp_path):
    config, losses = replace(load("demo_tiny"), augment=MINIMAL), []
    clip = network(config)  # with unit features, and stages that are not trained
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    assert trained(config, train, tmp_path, clip, epochs=2, log=lambda row: losses.append(row["loss"])).finite
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in clip.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {"head.weight", "tower.trunk.blocks.4.0.conv_pw.weight"} < moved
    assert moved.isdisjoint({"tower.trunk.conv_stem.weight", "tower.trunk.blocks.1.0.conv_pw.weight"})
    assert not {name for name in moved if "running_" in name or "num_batches" in name}


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(config, train, tmp_path):
    class KilledError(Exception):
        pass

    def die(step):
        if step == 5:
            raise KilledError

    same = {"epochs": 2, "mixup": 0.3, "regularizer": Regularizer(ema=(0.9,), swa=Swa(start=0.0, every=1))}
    cut = same | {"compute": replace(config.compute, save_every=2)}
    whole = trained(config, train, tmp_path / "whole", **same)
    with pytest.raises(KilledError):
        trained(config, train, tmp_path / "cut", after_step=die, **cut)
    steps = []
    resumed = trained(config, train, tmp_path / "cut", after_step=steps.append, **cut)
    assert steps[0] == 5  # the state after step 4 was kept
    assert whole.weights.keys() == resumed.weights.keys() == {"raw", "ema_0.9", "swa"}
    for kind, weights in whole.weights.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, resumed.weights[kind][name]), (kind, name)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_a_signal_is_seen_within_two_steps_and_the_next_run_goes_on_after_them(config, train, tmp_path, number):
    def ask(step):
        if step == 1:
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedBySignalError) as ended:
        trained(config, train, tmp_path, steps=4, after_step=ask)
    assert ended.value.signum == number
    steps = []
    assert trained(config, train, tmp_path, steps=4, after_step=steps.append).finite
    assert steps == [4]


def test_a_loss_that_is_not_finite_ends_training_and_says_so(model, train, config, tmp_path):
    with torch.no_grad():
        model.head.bias[0] = math.inf
    assert not trained(config, train, tmp_path, model).finite


@pytest.mark.parametrize("groups", [{}, {"regularizer": Regularizer(ema=(0.5,))}], ids=["raw", "with an average"])
def test_a_last_step_that_no_loss_sees_ends_as_diverged_too(train, config, tmp_path, groups):
    huge = {"kind": "sgd", "lr": 1e30, "weight_decay": 1e38}
    ended = trained(config, train, tmp_path, warmup_steps=0, steps=1, **huge, **groups)
    assert not ended.finite
    assert ended.weights == {}


def test_an_evaluation_whose_logits_are_no_numbers_ends_as_diverged(train, config, tmp_path):
    counts, rows = iter([(3, 10), None]), []
    held_out = lambda model: next(counts)  # noqa: E731
    assert not trained(config, train, tmp_path, evaluate_every=1, held_out=held_out, log=rows.append).finite
    assert [row["step"] for row in rows if "weights" in row] == [1]


@pytest.mark.parametrize("world", [1, 2])
def test_every_process_says_so_where_the_logits_of_an_evaluation_are_no_numbers(model, config, monkeypatch, world):
    evaluator = Evaluator(config)
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    monkeypatch.setattr("finetune.train.sum_over", lambda both: both)
    for rank in range(world):
        assert held_out_correct(evaluator, Processes(rank, world, torch.device("cpu")), model) is None


def test_a_loss_is_read_one_step_late_unless_something_is_made_of_it():
    losses = LateLosses()
    losses.add(torch.tensor(1.0), stop=False)
    assert losses.read(newest=False) == []
    losses.add(torch.tensor(2.0), stop=True)
    assert losses.read(newest=False) == [(1.0, False)]
    assert losses.read(newest=True) == [(2.0, True)]
    losses.add(torch.tensor(math.nan), stop=False)
    assert losses.read(newest=False) == []
    with pytest.raises(DivergedError):
        losses.read(newest=True)


def test_dropout_on_gpus_has_a_seed_of_run_step_and_process(monkeypatch):
    seeds = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeds.append)

    def last_seed(run_seed, step, rank, world):
        processes = Processes(rank, world, torch.device("cpu"))
        leave = lambda inputs, labels: (inputs, labels)  # noqa: E731
        mixed_batch(torch.zeros(2, 4), torch.zeros(2), leave, run_seed=run_seed, step=step, processes=processes)
        return seeds[-1]

    keys = [(run, step, rank, 2) for run in (1, 2) for step in (0, 7) for rank in (0, 1)] + [(1, 0, 0, 1), (1, 7, 0, 1)]
    found = {key: last_seed(*key) for key in keys}
    assert len(set(found.values())) == len(keys)
    assert found == {key: last_seed(*key) for key in keys}  # whatever was drawn before, as after a restart


def test_gradients_are_not_looked_at_where_nothing_is_clipped(train, config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: pytest.fail("a pass over all gradients"))
    assert trained(config, train, tmp_path, steps=1, clip_norm=None).finite


def test_a_teacher_computes_in_the_precision_of_its_student(train, config, tmp_path):
    precisions = []

    def teacher(images):
        precisions.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return torch.zeros(len(images), config.task.size, dtype=torch.bfloat16)

    taught, bf16 = Regularizer(distill=Distill(rows=(1,))), replace(config.compute, precision="bf16")
    assert trained(config, train, tmp_path, steps=1, teacher=teacher, regularizer=taught, compute=bf16).finite
    assert precisions == [torch.bfloat16]


def test_a_gpu_computes_as_the_settings_say_and_a_cpu_is_left_alone(config, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    flags = torch.backends.cuda.matmul, torch.backends.cudnn

    def now():
        cuda, cudnn = flags
        return cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()

    before = now()
    use_kernels(replace(config.compute, tf32=True, deterministic=True), torch.device("cpu"))
    assert now() == before
    try:
        use_kernels(replace(config.compute, tf32=True, deterministic=True), torch.device("cuda"))
        assert now() == (True, True, False, True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        use_kernels(config.compute, torch.device("cuda"))
        assert now() == (False, False, True, False)
    finally:
        flags[0].allow_tf32, flags[1].allow_tf32, flags[1].benchmark = before[:3]
        torch.use_deterministic_algorithms(before[3])


def test_a_state_that_is_damaged_or_of_another_training_is_named(train, config, tmp_path):
    trained(config, train, tmp_path, steps=1)
    with pytest.raises(UserError, match=r"of another training .*exp_avg.* is unknown\): delete the file to start"):
        trained(config, train, tmp_path, steps=2, kind="sgd")
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state.pt is damaged .*delete the file to start this row anew"):
        trained(config, train, tmp_path, steps=2)


def test_a_batch_larger_than_the_training_set_is_refused(train, config, tmp_path):
    with pytest.raises(UserError, match=f"more than the {len(train.labels)} training images"):
        trained(config, train, tmp_path, steps=None, batch_size=5000)


def test_the_zero_shot_head_is_the_normalised_mean_over_templates():
    # Two templates at right angles average to the diagonal.
    weight, bias = zero_shot_head(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), scale=10.0)
    torch.testing.assert_close(weight, torch.tensor([[10 / 2**0.5, 10 / 2**0.5]]))
    assert bias.tolist() == [0]


def test_zero_frozen_stages_leave_the_model_whole_and_uint8_and_float_images_are_normalised_alike(train):
    config = load("demo_tiny")
    whole = pretrained(replace(config.model, frozen_stages=0), class_names(config.task)).eval()
    assert all(parameter.requires_grad for parameter in whole.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(whole(train.images[:2]), whole(train.images[:2].float()))
