"""Every optimiser, schedule, loss, augmentation and regulariser does what its name says, and not nothing."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from configs.errors import UserError
from configs.schema import load
from configs.training import Augment, Distill, Optim, Regularizer, Sam, Swa
from eval.forward import Evaluator
from finetune.__main__ import run as finetune
from finetune.averages import Averages
from finetune.data import augmentation, augmentation_of_epoch, local_batch, seed_globals
from finetune.dist import wrap
from finetune.length import largest_world, refuse_unequal_shares
from finetune.optim import build, classification_loss, distillation_loss, learning_rate, perturbed
from finetune.train import held_out_correct
from soups.files.atomic import read_jsonl
from store.processes import Processes
from tasks.split import ImageSplit
from tests.training import distance, network, small_config, small_split, trained

OPTIM = Optim(
    lr=0.1, weight_decay=0.0, epochs=1, batch_size=2, warmup_steps=0, clip_norm=None, label_smoothing=0.0, mixup=0.0
)
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -2.0]])
KINDS = ("sgd", "adam", "adamw", "rmsprop", "adafactor")


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def train():
    return small_split()


@pytest.fixture(scope="module")
def plain(config, train, tmp_path_factory):
    """The weights after three steps without any switch."""
    return trained(config, train, tmp_path_factory.mktemp("plain")).weights["raw"]


def of_world(world):
    """Processes 0, 1, ... on the CPU, of which none runs."""
    return [Processes(rank, world, torch.device("cpu")) for rank in range(world)]


def layer_of(value, *shape):
    """A linear layer whose weights and biases have one value."""
    layer = torch.nn.Linear(*shape)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, value)
    return layer


def step(optimizer, layer, gradient):
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


# One step on w = 1 with gradient 2 and lr 0.1, worked out by hand from each method's definition.
@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("sgd", 1 - 0.1 * 2),
        ("adam", 1 - 0.1),  # bias-corrected moments cancel: the sign of the gradient
        ("adamw", 1 - 0.1),
        ("rmsprop", 1 - 0.1 * 2 / math.sqrt(0.01 * 4)),
        ("adafactor", 1 - 0.1 * 0.1),  # the gradient over its root mean square, of which the momentum takes a tenth
    ],
)
def test_each_optimiser_takes_the_step_of_its_definition(kind, after):
    layer = layer_of(1.0, 1, 1)
    step(build(replace(OPTIM, kind=kind), layer), layer, 2.0)
    assert layer.weight.item() == pytest.approx(after, abs=1e-4)


def test_adafactor_moves_small_weights_as_far_as_adamw_does():
    # Big Vision's steps are of the size of lr; torch's are lr times the weights' size, and would hardly move these.
    moved = {}
    for kind in ("adamw", "adafactor"):
        generator = torch.Generator().manual_seed(0)
        layer = torch.nn.Linear(64, 64, bias=False)
        start = 0.02 * torch.randn(64, 64, generator=generator)
        layer.weight.data.copy_(start)
        optimizer = build(replace(OPTIM, kind=kind, lr=3e-5), layer)
        towards = torch.randn(64, 64, generator=generator)
        for _ in range(200):
            layer.weight.grad = 0.1 * towards + torch.randn(64, 64, generator=generator)
            optimizer.step()
        moved[kind] = ((layer.weight - start).norm() / start.norm()).item()
    assert 0.02 < moved["adamw"] < 0.1
    assert moved["adafactor"] == pytest.approx(moved["adamw"], rel=0.3)


def test_adafactor_has_a_momentum_only_where_one_is_set():
    states = {}
    for momentum in (0.0, 0.9):
        layer = layer_of(1.0, 40, 40)
        optimizer = build(replace(OPTIM, kind="adafactor", momentum=momentum), layer)
        step(optimizer, layer, 1.0)
        states[momentum] = optimizer.state[layer.weight]
    assert states[0.0].keys() == {"step", "exp_avg_sq_r", "exp_avg_sq_c"}
    assert states[0.9]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimiser_decays_matrices_and_spares_biases(kind):
    plain, decayed = layer_of(1.0, 2, 2), layer_of(1.0, 2, 2)
    for layer, decay in ((plain, 0.0), (decayed, 0.5)):
        optimizer = build(replace(OPTIM, kind=kind, weight_decay=decay), layer)
        for _ in range(2):
            step(optimizer, layer, 0.1)
    assert torch.equal(plain.bias, decayed.bias) and not torch.allclose(plain.weight, decayed.weight)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1.0] * 8),
        ("linear", [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
        ("cosine_restarts", 2 * [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
    ],
)
def test_schedules_are_their_closed_forms_after_the_warm_up(schedule, rates):
    optim = replace(OPTIM, lr=1.0, schedule=schedule, cycles=2, warmup_steps=2)
    assert [learning_rate(optim, step, 10) for step in range(10)] == pytest.approx([0.5, 1.0, *rates])


def test_binary_cross_entropy_asks_of_every_class_on_its_own():
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.7, 0.3]])
    by_hand = -(targets * LOGITS.sigmoid().log() + (1 - targets) * (1 - LOGITS.sigmoid()).log()).sum() / 2
    assert classification_loss(replace(OPTIM, loss="bce"), LOGITS, targets).item() == pytest.approx(by_hand.item())
    softmax = -(targets * LOGITS.log_softmax(dim=1)).sum() / 2
    assert classification_loss(OPTIM, LOGITS, targets).item() == pytest.approx(softmax.item())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_at_equal_logits_is_the_entropy_of_the_teacher(temperature):
    shares = (LOGITS / temperature).softmax(dim=1)
    entropy = -(shares * shares.log()).sum(dim=1).mean()
    found = distillation_loss(LOGITS, LOGITS, temperature)
    assert found.item() == pytest.approx(temperature**2 * entropy.item())
    assert distillation_loss(LOGITS + torch.tensor([1.0, 0, 0]), LOGITS, temperature) > found


def test_distillation_follows_its_teacher_and_its_weight(config, train, plain, tmp_path):
    teacher = lambda images: 20 * F.one_hot(torch.zeros(len(images), dtype=torch.long), config.task.size).float()  # noqa: E731
    taught = {}
    for weight in (0.0, 1.0):
        distill = Regularizer(distill=Distill(rows=(1,), weight=weight))
        found = trained(config, train, tmp_path / str(weight), regularizer=distill, teacher=teacher)
        taught[weight] = found.weights["raw"]
    assert distance(plain, taught[0.0]) == 0
    assert taught[1.0]["head.bias"].argmax() == 0


def averaged(values, steps=None, **regularizer):
    """Averages of a model with one weight, which starts as the first value and has each other one after a step."""
    averages = Averages({"w": torch.tensor([values[0]])}, Regularizer(**regularizer), steps or len(values) - 1)
    for number, value in enumerate(values[1:]):
        averages.update({"w": torch.tensor([value])}, number)
    return {kind: weights["w"] for kind, weights in averages.weights().items()}


def test_an_ema_is_its_closed_form_at_several_decays_at_once():
    values = [1.0, 3.0, -2.0, 5.0]
    found = averaged(values, ema=(0.9, 0.5))
    for decay in (0.9, 0.5):
        closed = decay**3 * values[0] + sum((1 - decay) * decay ** (3 - i) * values[i] for i in (1, 2, 3))
        assert found[f"ema_{decay}"].item() == pytest.approx(closed)


def test_averages_of_one_precision_move_together_and_to_the_same_bits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {str(i): torch.randn(7, 5, generator=generator) for i in range(3)} | {"n": torch.tensor(4)}  # noqa: E731
    start, weights, moved = draw(), draw(), []
    together = torch._foreach_lerp_
    monkeypatch.setattr("torch._foreach_lerp_", lambda *call: (moved.append(len(call[0])), together(*call))[1])
    averages = Averages(start, Regularizer(ema=(0.9, 0.9999999)), steps=3)
    averages.update(weights, 0)
    assert moved == [3]  # the other average is float64, and takes one wide copy of the weights at a time
    for key in "012":
        assert torch.equal(averages.ema["ema_0.9"][key], start[key].clone().lerp_(weights[key], 1 - 0.9))


def test_a_ramp_starts_with_low_decays_and_ends_with_the_full_one():
    values = [1.0, 3.0, -2.0, 5.0]
    expected = values[0]
    for value, decay in zip(values[1:], (2 / 11, 0.22, 0.22), strict=True):
        expected = decay * expected + (1 - decay) * value
    assert averaged(values, ema=(0.22,), ema_ramp=True)["ema_0.22"].item() == pytest.approx(expected)


def test_an_ema_of_almost_no_forgetting_still_moves():
    found = averaged([1.0, *[1.5] * 1000], ema=(0.9999999,))["ema_0.9999999"]
    assert found.item() == pytest.approx(1 + 0.5 * (1 - 0.9999999**1000), abs=1e-7)
    assert found.item() > 1 and found.dtype == torch.float32


def test_swa_is_the_plain_mean_of_the_models_from_its_start_on():
    found = averaged([0.0, *(float(10**number) for number in range(8))], swa=Swa(start=0.5, every=2))["swa"]
    assert found.item() == pytest.approx((10**4 + 10**6) / 2)


def test_averages_of_a_training_are_kept_beside_its_last_weights(config, train, plain, tmp_path):
    regularizer = Regularizer(ema=(0.5,), swa=Swa(start=0.0, every=1))
    found = trained(config, train, tmp_path, regularizer=regularizer).weights
    assert list(found) == ["raw", "ema_0.5", "swa"]
    assert distance(plain, found["raw"]) == 0
    assert distance(found["raw"], found["ema_0.5"]) > 0
    assert distance(found["swa"], found["ema_0.5"]) > 0


def test_sam_takes_its_gradient_at_the_perturbed_point_and_puts_the_weights_back():
    one, two = (torch.nn.Parameter(torch.tensor([value])) for value in (3.0, 4.0))
    (one**2 + two**2).backward()  # gradient (6, 8), length 10
    with perturbed([one, two], rho=0.5):
        assert (one.item(), two.item()) == pytest.approx((3.3, 4.4))
        one.grad = two.grad = None
        (one**2 + two**2).backward()
    assert (one.item(), two.item()) == (3.0, 4.0)
    assert (one.grad.item(), two.grad.item()) == pytest.approx((6.6, 8.8))
    one.grad.zero_()
    with pytest.raises(KeyError), perturbed([one], rho=1.0):  # it stands still without a gradient
        assert one.item() == 3.0
        one.data.fill_(7.0)
        raise KeyError
    assert one.item() == 3.0


@pytest.mark.parametrize(
    "changes",
    [
        *({"kind": kind} for kind in KINDS if kind != "adamw"),
        {"lr": 2e-3},
        {"weight_decay": 3.0},
        {"label_smoothing": 0.2},
        {"mixup": 0.5},
        {"loss": "bce"},
        {"cutmix": 1.0},
        {"clip_norm": 0.01},
        {"momentum": 0.5, "kind": "sgd"},
        {"regularizer": Regularizer(sam=Sam(rho=0.5, synchronised=True))},
        {"augment": Augment(kind="medium", crop=0.5, color_jitter=0.4)},
        {"augment": Augment(kind="auto", crop=0.9)},
    ],
    ids=str,
)
def test_every_switch_changes_the_training(changes, config, train, plain, tmp_path):
    assert distance(plain, trained(config, train, tmp_path, **changes).weights["raw"]) > 0


def test_a_frozen_head_stays_as_it_was_and_batch_norm_statistics_move_only_where_they_are_not_frozen(
    train, plain, tmp_path
):
    config = small_config("model.train_head=false", "model.frozen_batch_norm=false")
    start, found = network(config).state_dict(), trained(config, train, tmp_path).weights["raw"]
    held = [torch.equal(found[name], start[name]) for name in ("head.weight", "tower.conv_stem.weight")]
    assert held == [True, False]
    statistics = [name for name in start if "running_mean" in name]
    assert statistics and all(torch.equal(plain[name], start[name]) for name in statistics)
    assert not any(torch.equal(found[name], start[name]) for name in statistics)


@pytest.mark.parametrize("on", [True, False])
def test_the_memory_format_is_the_one_of_the_config_and_changes_last_bits_only(on, config, train, plain, tmp_path):
    model, compute = network(config), replace(config.compute, channels_last=on)
    found = trained(config, train, tmp_path, model, compute=compute).weights["raw"]
    assert distance(plain, found) <= (0 if on else 0.02)
    assert model.tower.conv_stem.weight.is_contiguous(memory_format=torch.channels_last) == on


@pytest.mark.slow
def test_a_compiled_network_trains_the_same(config, train, plain, tmp_path, monkeypatch):
    # Traced, and not translated for this processor, which takes a minute and is torch's own work.
    traced, compiled = [], torch.compile
    monkeypatch.setattr("torch.compile", lambda network: compiled(network, backend=backend))

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    found = trained(config, train, tmp_path, compute=replace(config.compute, compile=True)).weights["raw"]
    assert traced and found.keys() == plain.keys()
    assert distance(plain, found) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_lower_precision_trains_nearly_the_same(precision, config, train, plain, tmp_path):
    compute = replace(config.compute, precision=precision)
    assert 0 < distance(plain, trained(config, train, tmp_path, compute=compute).weights["raw"]) < 0.2


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(mixup, config, train, tmp_path):
    found = []
    for size in (None, 3):
        settings = {"mixup": mixup, "kind": "sgd", "compute": replace(config.compute, micro_batch=size)}
        found.append(trained(config, train, tmp_path / str(size), **settings).weights["raw"])
    assert 0 < distance(*found) < 1e-5


def test_the_best_evaluation_on_held_out_is_kept_for_each_kind_of_weights(config, train, tmp_path):
    scores, rows = iter([3, 5, 9, 1, 4, 2, 5, 5]), []  # raw, ema; raw, ema; ... after steps 1, 2, 3, 4
    best = {"evaluate_every": 1, "keep": "best", "steps": 4, "regularizer": Regularizer(ema=(0.5,))}
    found = trained(config, train, tmp_path, held_out=lambda model: (next(scores), 10), log=rows.append, **best)
    assert found.best == {"raw": {"step": 2, "correct": 9, "n": 10}, "ema_0.5": {"step": 1, "correct": 5, "n": 10}}
    assert [row["step"] for row in rows if "weights" in row] == [1, 1, 2, 2, 3, 3, 4, 4]
    later = iter([9, 1])
    best = {"evaluate_every": 2, "keep": "best", "schedule": "constant"}
    two_steps = trained(config, train, tmp_path / "two", steps=2, schedule="constant")
    four = trained(config, train, tmp_path / "four", steps=4, held_out=lambda model: (next(later), 10), **best)
    assert distance(two_steps.weights["raw"], four.weights["raw"]) == 0


def test_an_evaluation_of_an_average_sees_its_weights_and_leaves_the_model_its_own(config, train, plain, tmp_path):
    seen = []

    def held_out(model):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 1, 10

    evaluated = {"evaluate_every": 1, "regularizer": Regularizer(ema=(0.5,)), "held_out": held_out}
    found = trained(config, train, tmp_path, **evaluated).weights
    assert len(seen) == 6  # raw and average, after each of three steps
    assert distance(seen[-2], found["raw"]) == distance(seen[-1], found["ema_0.5"]) == 0
    assert distance(seen[-2], seen[-1]) > 0
    assert distance(found["raw"], plain) == 0


def test_fix_aug_switches_at_the_last_epoch_and_only_then():
    strong = Augment(kind="rand", crop=0.5, layers=2, magnitude=9, last_epochs_minimal=1)
    kinds = [augmentation_of_epoch(strong, epoch, 5) for epoch in range(5)]
    assert kinds[:4] == [strong] * 4
    assert (kinds[4].kind, kinds[4].crop) == ("minimal", 0.9)


@pytest.mark.slow
def test_fix_aug_leaves_all_but_the_last_epoch_as_it_was(config, train, tmp_path):
    losses = {}
    for last in (0, 1):
        rows, augment = [], Augment(kind="rand", crop=0.5, layers=2, magnitude=9, last_epochs_minimal=last)
        trained(config, train, tmp_path / str(last), epochs=2, augment=augment, log=rows.append)
        losses[last] = [row["loss"] for row in rows]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def seen_by(transform, image, samples):
    """What an augmentation makes of an image, each time with another seed."""
    for sample in range(samples):
        seed_globals(sample)
        yield np.asarray(transform(image)).astype(int)


def test_stochastic_augmentation_takes_each_of_its_kinds_about_equally_often():
    small = [Augment(kind="minimal", crop=crop) for crop in (1.0, 0.02)]
    transform = augmentation(Augment(kind="stochastic", among=small), 16)
    image = Image.fromarray(np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8))
    assert 70 < sum(int(np.ptp(made)) > 200 for made in seen_by(transform, image, 200)) < 160


def test_a_magnitude_acts_up_to_its_limit_and_no_further():
    image = Image.fromarray((np.indices((64, 64)).sum(0)[..., None] * [1, 1.5, 2]).astype(np.uint8))
    made = {}
    for magnitude, limit in ((10, 10), (20, 10), (20, 20)):
        transform = augmentation(Augment(kind="rand", crop=1.0, layers=2, magnitude=magnitude, magnitude_max=limit), 64)
        made[magnitude, limit] = np.stack(list(seen_by(transform, image, 20)))
    assert np.array_equal(made[10, 10], made[20, 10])
    assert not np.array_equal(made[20, 10], made[20, 20])


@pytest.mark.parametrize(("kind", "smallest"), [("minimal", 0.9), ("medium", 0.08), ("rand", 0.08), ("auto", 0.08)])
def test_a_crop_that_is_not_set_is_the_one_of_its_kind(kind, smallest):
    assert f"scale=({smallest}, 1.0)" in repr(augmentation(Augment(kind=kind), 64))
    assert "scale=(0.3, 1.0)" in repr(augmentation(Augment(kind=kind, crop=0.3), 64))


def test_points_of_the_loss_curve_come_as_often_as_tracking_says(config, train, tmp_path):
    rows = []
    trained(config, train, tmp_path, steps=5, tracking=replace(config.tracking, every=2), log=rows.append)
    points = [row for row in rows if "epoch" not in row]
    assert [row["step"] for row in points] == [2, 4]
    kept = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in points] == [row["loss"] for row in kept if "epoch" not in row]


def test_batch_norms_that_move_are_refused_on_several_processes_without_gpus(config):
    moving = replace(config, model=replace(config.model, frozen_batch_norm=False))
    with pytest.raises(UserError, match=r"frozen_batch_norm=false on several processes needs GPUs"):
        wrap(network(moving), config.compute, of_world(2)[0])


@pytest.mark.parametrize("world", [3, 7])  # the number of images is a multiple of neither
def test_each_process_counts_its_own_held_out_images_and_no_extra_one(world, config):
    evaluator = Evaluator(config)
    with torch.no_grad():  # class 0 is the answer to every image
        evaluator.model.head.weight.zero_()
        evaluator.model.head.bias.zero_()
    split = evaluator.split("held_out")
    assert len(split.labels) % world
    whole = ImageSplit("held_out", split.stored, torch.zeros_like(split.labels), "all of class 0")
    for each in (split, whole):  # in the second every image is right, so that an extra one would show
        evaluator._splits["held_out"] = each
        counts = [held_out_correct(evaluator, one, evaluator.model) for one in of_world(world)]
        assert {n for _, n in counts} == {len(split.labels)}
        assert sum(correct for correct, _ in counts) == int((each.labels == 0).sum())


def test_a_share_of_a_batch_keeps_mixups_pairs_and_shares_make_up_the_batch():
    batch = torch.arange(100, 114)
    for world in (1, 2, 3):
        parts = [local_batch(batch, one) for one in of_world(world)]
        assert sorted(itertools.chain(*(part.tolist() for part in parts))) == batch.tolist()
        for part in parts:
            assert ((part + part.flip(0)) == 213).all()  # image i with image B - 1 - i
    assert torch.equal(local_batch(batch, of_world(1)[0]), batch)


@pytest.mark.parametrize("batch_size", [2, 6, 8, 16, 24, 512])
def test_processes_share_a_batch_exactly_where_their_shares_are_of_one_size(batch_size):
    optim = replace(OPTIM, batch_size=batch_size)
    for world in range(1, 13):
        if batch_size % (2 * world) == 0:
            sizes = {len(local_batch(torch.arange(batch_size), one)) for one in of_world(world)}
            assert sizes == {batch_size // world}
            refuse_unequal_shares(optim, world)
            assert largest_world(optim, world) == world
        else:
            with pytest.raises(UserError, match=rf"{world} processes cannot share optim.batch_size={batch_size} equal"):
                refuse_unequal_shares(optim, world)
            refuse_unequal_shares(optim, largest_world(optim, world))


def test_a_row_that_its_processes_cannot_share_is_refused_before_one_waits_for_another(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("finetune.sweep.start_processes", lambda: pytest.fail("a process waits for the others"))
    with pytest.raises(UserError, match=r"4 processes cannot share optim.batch_size=6 equally.*: start 3, or make"):
        finetune(load("demo_tiny", "sweep.index=1", "optim.batch_size=6", "optim.steps=1", f"paths.runs={tmp_path}"))
