"""Every optimiser, schedule, loss, augmentation and regulariser does what its name says, and not nothing."""

import itertools
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from configs.chance import seed_globals
from configs.errors import UserError
from configs.schema import load
from configs.training import Augment, Distill, Optim, Regularizer, Sam, Swa
from eval.forward import Evaluator
from finetune.__main__ import run as finetune
from finetune.averages import Averages
from finetune.data import augmentation, augmentation_of_epoch, local_batch
from finetune.dist import wrap
from finetune.length import largest_world, refuse_unequal_shares
from finetune.optim import build, classification_loss, distillation_loss, learning_rate, perturbed
from finetune.train import fine_tune, held_out_correct
from models.classifier import pretrained
from soups.files.atomic import read_jsonl
from store.processes import Processes
from tasks.load import class_names, load_split
from tasks.split import ImageSplit
from tests.pools import small_network

OPTIM = Optim(
    lr=0.1, weight_decay=0.0, epochs=1, batch_size=2, warmup_steps=0, clip_norm=None, label_smoothing=0.0, mixup=0.0
)
SOME = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -2.0]])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    return load("demo_tiny", *small_network(tmp_path_factory.mktemp("network")), "optim.batch_size=8")


@pytest.fixture(scope="module")
def train(config):
    return load_split(config.task, "train")


def train_some(config, train, folder, *, optim=None, groups=None, **calls):
    model = pretrained(config.model, class_names(config.task))
    settings = replace(config, optim=replace(config.optim, **{"steps": 3} | (optim or {})), **(groups or {}))
    return fine_tune(model, train, settings, run_seed=1, folder=folder, **calls)


def distance(one, two):
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def plain(config, train, tmp_path_factory):
    return train_some(config, train, tmp_path_factory.mktemp("plain")).weights["raw"]


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
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = build(replace(OPTIM, kind=kind), layer)
    layer.weight.grad = torch.tensor([[2.0]])
    optimizer.step()
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
        layer = torch.nn.Linear(40, 40)
        optimizer = build(replace(OPTIM, kind="adafactor", momentum=momentum), layer)
        layer.weight.grad = torch.ones(40, 40)
        optimizer.step()
        states[momentum] = optimizer.state[layer.weight]
    assert states[0.0].keys() == {"step", "exp_avg_sq_r", "exp_avg_sq_c"}
    assert states[0.9]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "rmsprop", "adafactor"])
def test_every_optimiser_decays_matrices_and_spares_biases(kind):
    moved = []
    for decay in (0.0, 0.5):
        layer = torch.nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.fill_(1.0)
        optimizer = build(replace(OPTIM, kind=kind, weight_decay=decay), layer)
        layer.weight.grad, layer.bias.grad = torch.full((2, 2), 0.1), torch.full((2,), 0.1)
        optimizer.step()
        optimizer.step()
        moved.append((layer.weight.detach().clone(), layer.bias.detach().clone()))
    assert not torch.allclose(moved[0][0], moved[1][0])
    assert torch.equal(moved[0][1], moved[1][1])


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
    by_hand = -(targets * SOME.sigmoid().log() + (1 - targets) * (1 - SOME.sigmoid()).log()).sum() / 2
    assert classification_loss(replace(OPTIM, loss="bce"), SOME, targets).item() == pytest.approx(by_hand.item())
    softmax = -(targets * SOME.log_softmax(dim=1)).sum() / 2
    assert classification_loss(OPTIM, SOME, targets).item() == pytest.approx(softmax.item())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_at_equal_logits_is_the_entropy_of_the_teacher(temperature):
    shares = (SOME / temperature).softmax(dim=1)
    entropy = -(shares * shares.log()).sum(dim=1).mean()
    found = distillation_loss(SOME, SOME, temperature)
    assert found.item() == pytest.approx(temperature**2 * entropy.item())
    assert distillation_loss(SOME + torch.tensor([1.0, 0, 0]), SOME, temperature) > found


def test_distillation_follows_its_teacher_and_its_weight(config, train, plain, tmp_path):
    classes = len(class_names(config.task))
    teacher = lambda images: 20 * F.one_hot(torch.zeros(len(images), dtype=torch.long), classes).float()  # noqa: E731
    taught = {
        weight: train_some(
            config,
            train,
            tmp_path / str(weight),
            groups={"regularizer": Regularizer(distill=Distill(rows=(1,), weight=weight))},
            teacher=teacher,
        ).weights["raw"]
        for weight in (0.0, 1.0)
    }
    assert distance(plain, taught[0.0]) == 0
    assert taught[1.0]["head.bias"].argmax() == 0


def test_an_ema_is_its_closed_form_at_several_decays_at_once():
    values = [1.0, 3.0, -2.0, 5.0]
    averages = Averages.of({"w": torch.tensor([values[0]])}, Regularizer(ema=(0.9, 0.5)), steps=3)
    for step, value in enumerate(values[1:]):
        averages.update({"w": torch.tensor([value])}, step)
    for decay in (0.9, 0.5):
        closed = decay**3 * values[0] + sum((1 - decay) * decay ** (3 - i) * values[i] for i in (1, 2, 3))
        assert averages.weights()[f"ema_{decay}"]["w"].item() == pytest.approx(closed)


def test_averages_of_one_precision_move_together_and_to_the_same_bits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {str(i): torch.randn(7, 5, generator=generator) for i in range(3)} | {"n": torch.tensor(4)}  # noqa: E731
    start, weights, moved = draw(), draw(), []
    together = torch._foreach_lerp_
    monkeypatch.setattr("torch._foreach_lerp_", lambda *call: (moved.append(len(call[0])), together(*call))[1])
    averages = Averages.of(start, Regularizer(ema=(0.9, 0.9999999)), steps=3)
    averages.update(weights, 0)
    assert moved == [3]  # the other average is float64, and takes one wide copy of the weights at a time
    for key in "012":
        assert torch.equal(averages.ema["ema_0.9"][key], start[key].clone().lerp_(weights[key], 1 - 0.9))


def test_a_ramp_starts_with_low_decays_and_ends_with_the_full_one():
    values = [1.0, 3.0, -2.0, 5.0]
    averages = Averages.of({"w": torch.tensor([values[0]])}, Regularizer(ema=(0.22,), ema_ramp=True), steps=3)
    expected = values[0]
    for step, (value, decay) in enumerate(zip(values[1:], (2 / 11, 0.22, 0.22), strict=True)):
        averages.update({"w": torch.tensor([value])}, step)
        expected = decay * expected + (1 - decay) * value
    assert averages.weights()["ema_0.22"]["w"].item() == pytest.approx(expected)


def test_an_ema_of_almost_no_forgetting_still_moves():
    averages = Averages.of({"w": torch.tensor([1.0])}, Regularizer(ema=(0.9999999,)), steps=1000)
    for step in range(1000):
        averages.update({"w": torch.tensor([1.5])}, step)
    found = averages.weights()["ema_0.9999999"]["w"]
    assert found.item() == pytest.approx(1 + 0.5 * (1 - 0.9999999**1000), abs=1e-7)
    assert found.item() > 1
    assert found.dtype == torch.float32


def test_swa_is_the_plain_mean_of_the_models_from_its_start_on():
    averages = Averages.of({"w": torch.zeros(1)}, Regularizer(swa=Swa(start=0.5, every=2)), steps=8)
    for step in range(8):
        averages.update({"w": torch.tensor([float(10**step)])}, step)
    assert averages.weights()["swa"]["w"].item() == pytest.approx((10**4 + 10**6) / 2)


def test_averages_of_a_training_are_kept_beside_its_last_weights(config, train, plain, tmp_path):
    regularizer = Regularizer(ema=(0.5,), swa=Swa(start=0.0, every=1))
    found = train_some(config, train, tmp_path, groups={"regularizer": regularizer}).weights
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


def test_sam_puts_the_weights_back_after_an_error_and_stands_still_without_a_gradient():
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    weight.grad = torch.zeros(1)
    with pytest.raises(KeyError), perturbed([weight], rho=1.0):
        assert weight.item() == 3.0
        weight.data.fill_(7.0)
        raise KeyError
    assert weight.item() == 3.0


@pytest.mark.parametrize(
    "changes",
    [
        *({"optim": {"kind": kind}} for kind in ("sgd", "adam", "rmsprop", "adafactor")),
        {"optim": {"lr": 2e-3}},
        {"optim": {"weight_decay": 3.0}},
        {"optim": {"label_smoothing": 0.2}},
        {"optim": {"mixup": 0.5}},
        {"optim": {"loss": "bce"}},
        {"optim": {"cutmix": 1.0}},
        {"optim": {"clip_norm": 0.01}},
        {"optim": {"momentum": 0.5, "kind": "sgd"}},
        {"groups": {"regularizer": Regularizer(sam=Sam(rho=0.5, synchronised=True))}},
        {"groups": {"augment": Augment(kind="medium", crop=0.5, color_jitter=0.4)}},
        {"groups": {"augment": Augment(kind="auto", crop=0.9)}},
    ],
    ids=str,
)
def test_every_switch_changes_the_training(changes, config, train, plain, tmp_path):
    assert distance(plain, train_some(config, train, tmp_path, **changes).weights["raw"]) > 0


def test_a_frozen_head_stays_as_it_was_initialised(train, tmp_path):
    config = load("demo_tiny", *small_network(tmp_path), "optim.batch_size=8", "model.train_head=false")
    start = pretrained(config.model, class_names(config.task)).state_dict()
    found = train_some(config, train, tmp_path).weights["raw"]
    assert torch.equal(found["head.weight"], start["head.weight"])
    assert distance(start, found) > 0


def test_batch_norm_statistics_move_only_where_they_are_not_frozen(train, plain, tmp_path):
    config = load("demo_tiny", *small_network(tmp_path), "optim.batch_size=8", "model.frozen_batch_norm=false")
    start = pretrained(config.model, class_names(config.task)).state_dict()
    found = train_some(config, train, tmp_path).weights["raw"]
    statistics = [name for name in start if "running_mean" in name]
    assert statistics
    assert all(torch.equal(plain[name], start[name]) for name in statistics)
    assert not any(torch.equal(found[name], start[name]) for name in statistics)


def test_the_memory_format_is_the_one_of_the_config_and_changes_last_bits_only(config, train, plain, tmp_path):
    found = {}
    for on in (True, False):
        model = pretrained(config.model, class_names(config.task))
        settings = replace(
            config, optim=replace(config.optim, steps=3), compute=replace(config.compute, channels_last=on)
        )
        found[on] = fine_tune(model, train, settings, run_seed=1, folder=tmp_path / str(on)).weights["raw"]
        convolution = model.tower.conv_stem.weight
        assert convolution.is_contiguous(memory_format=torch.channels_last) == on
    assert distance(plain, found[True]) == 0
    assert distance(plain, found[False]) < 0.02


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_network_trains_nearly_the_same(train, tmp_path):
    # Of two blocks: the demo's network takes the compiler two minutes.
    save_file(timm.create_model("test_vit.r160_in1k").state_dict(), tmp_path / "start.safetensors")
    words = ["model=timm", "model.name=test_vit.r160_in1k", f"model.weights={tmp_path / 'start.safetensors'}"]
    small = load("demo_tiny", *words, "model.head=random", "model.image_size=64", "model.frozen_stages=0")
    found = {}
    for on in (False, True):
        compute = replace(small.compute, compile=on)
        found[on] = train_some(small, train, tmp_path / str(on), groups={"compute": compute}).weights["raw"]
    assert found[True].keys() == found[False].keys()
    assert 0 < distance(found[False], found[True]) < 0.02


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_nearly_the_same(precision, config, train, plain, tmp_path):
    compute = replace(config.compute, precision=precision)
    found = train_some(config, train, tmp_path, groups={"compute": compute}).weights["raw"]
    assert 0 < distance(plain, found) < 0.2


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(mixup, config, train, tmp_path):
    found = [
        train_some(
            config,
            train,
            tmp_path / str(size),
            optim={"mixup": mixup, "kind": "sgd"},
            groups={"compute": replace(config.compute, micro_batch=size)},
        ).weights["raw"]
        for size in (None, 3)
    ]
    assert 0 < distance(*found) < 1e-5


def test_the_best_look_at_held_out_is_kept_for_each_kind_of_weights(config, train, tmp_path):
    scores = iter([3, 5, 9, 1, 4, 2, 5, 5])  # raw, ema; raw, ema; ... after steps 1, 2, 3, 4
    rows = []
    trained = train_some(
        config,
        train,
        tmp_path,
        optim={"evaluate_every": 1, "keep": "best", "steps": 4},
        groups={"regularizer": Regularizer(ema=(0.5,))},
        held_out=lambda model: (next(scores), 10),
        log=rows.append,
    )
    assert trained.best == {
        "raw": {"step": 2, "correct": 9, "n": 10},
        "ema_0.5": {"step": 1, "correct": 5, "n": 10},
    }
    looked = [row for row in rows if "weights" in row]
    assert [row["step"] for row in looked] == [1, 1, 2, 2, 3, 3, 4, 4]
    later = iter([9, 1])
    two_steps = train_some(config, train, tmp_path / "two", optim={"steps": 2, "schedule": "constant"})
    four = train_some(
        config,
        train,
        tmp_path / "four",
        optim={"evaluate_every": 2, "keep": "best", "steps": 4, "schedule": "constant"},
        held_out=lambda model: (next(later), 10),
    )
    assert distance(two_steps.weights["raw"], four.weights["raw"]) == 0


def test_a_look_at_an_average_sees_its_weights_and_leaves_the_model_its_own(config, train, plain, tmp_path):
    seen = []

    def held_out(model):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 1, 10

    found = train_some(
        config,
        train,
        tmp_path,
        optim={"evaluate_every": 1},
        groups={"regularizer": Regularizer(ema=(0.5,))},
        held_out=held_out,
    ).weights
    assert len(seen) == 6  # raw and average, after each of three steps
    assert distance(seen[-2], found["raw"]) == 0
    assert distance(seen[-1], found["ema_0.5"]) == 0
    assert distance(seen[-2], seen[-1]) > 0
    assert distance(found["raw"], plain) == 0


def test_fix_aug_switches_at_the_last_epoch_and_only_then():
    strong = Augment(kind="rand", crop=0.5, layers=2, magnitude=9, last_epochs_minimal=1)
    kinds = [augmentation_of_epoch(strong, epoch, 5) for epoch in range(5)]
    assert kinds[:4] == [strong] * 4
    assert (kinds[4].kind, kinds[4].crop) == ("minimal", 0.9)


def test_fix_aug_leaves_all_but_the_last_epoch_as_it_was(config, train, tmp_path):
    augment = Augment(kind="rand", crop=0.5, layers=2, magnitude=9)
    losses = {}
    for last in (0, 1):
        rows = []
        groups = {"augment": replace(augment, last_epochs_minimal=last)}
        optim = {"steps": None, "epochs": 2}
        train_some(config, train, tmp_path / str(last), optim=optim, groups=groups, log=rows.append)
        losses[last] = [row["loss"] for row in rows]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_stochastic_augmentation_takes_each_of_its_kinds_about_equally_often():
    small = [Augment(kind="minimal", crop=crop) for crop in (1.0, 0.02)]
    transform = augmentation(Augment(kind="stochastic", among=small), 16)
    image = Image.fromarray(np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8))
    widths = []
    for sample in range(200):
        seed_globals(sample)
        widths.append(int(np.ptp(np.asarray(transform(image)).astype(int))) > 200)
    assert 70 < sum(widths) < 160


def test_a_magnitude_acts_up_to_its_limit_and_no_further():
    image = Image.fromarray((np.indices((64, 64)).sum(0)[..., None] * [1, 1.5, 2]).astype(np.uint8))
    looks = {}
    for magnitude, limit in ((10, 10), (20, 10), (20, 20)):
        transform = augmentation(Augment(kind="rand", crop=1.0, layers=2, magnitude=magnitude, magnitude_max=limit), 64)
        made = []
        for sample in range(20):
            seed_globals(sample)
            made.append(np.asarray(transform(image)))
        looks[magnitude, limit] = np.stack(made)
    assert np.array_equal(looks[10, 10], looks[20, 10])
    assert not np.array_equal(looks[20, 10], looks[20, 20])


@pytest.mark.parametrize(("kind", "smallest"), [("minimal", 0.9), ("medium", 0.08), ("rand", 0.08), ("auto", 0.08)])
def test_a_crop_that_is_not_set_is_the_one_of_its_kind(kind, smallest):
    assert f"scale=({smallest}, 1.0)" in repr(augmentation(Augment(kind=kind), 64))
    assert "scale=(0.3, 1.0)" in repr(augmentation(Augment(kind=kind, crop=0.3), 64))


def test_points_of_the_loss_curve_come_as_often_as_tracking_says(config, train, tmp_path):
    rows = []
    tracking = replace(config.tracking, every=2)
    train_some(config, train, tmp_path, optim={"steps": 5}, groups={"tracking": tracking}, log=rows.append)
    points = [row for row in rows if "epoch" not in row]
    assert [row["step"] for row in points] == [2, 4]
    kept = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in points] == [row["loss"] for row in kept if "epoch" not in row]


def test_batch_norms_that_move_are_refused_on_several_processes_without_gpus(config):
    model = pretrained(replace(config.model, frozen_batch_norm=False), class_names(config.task))
    with pytest.raises(UserError, match=r"frozen_batch_norm=false on several processes needs GPUs"):
        wrap(model, config.compute, Processes(0, 2, torch.device("cpu")))


@pytest.mark.parametrize("world", [3, 7])  # of neither are the images a multiple
def test_each_process_counts_its_own_held_out_images_and_no_extra_one(world, config):
    evaluator = Evaluator(config)
    with torch.no_grad():  # every image is right, so that an extra one would show
        evaluator.model.head.weight.zero_()
        evaluator.model.head.bias.zero_()
    labels = evaluator.split("held_out").labels
    right = int((labels == 0).sum())
    whole = ImageSplit("held_out", evaluator.split("held_out").stored, torch.zeros_like(labels), "all of class 0")
    counts = {}
    for name, split in (("some", evaluator.split("held_out")), ("all", whole)):
        evaluator._splits["held_out"] = split
        parts = [
            held_out_correct(evaluator, Processes(r, world, torch.device("cpu")), evaluator.model) for r in range(world)
        ]
        assert {n for _, n in parts} == {len(labels)}
        counts[name] = sum(correct for correct, _ in parts)
    assert counts == {"some": right, "all": len(labels)}
    assert len(labels) % world


def test_a_share_of_a_batch_keeps_mixups_pairs_and_shares_make_up_the_batch():
    batch = torch.arange(100, 114)
    for world in (1, 2, 3):
        parts = [local_batch(batch, Processes(rank, world, torch.device("cpu"))) for rank in range(world)]
        assert sorted(itertools.chain(*(part.tolist() for part in parts))) == batch.tolist()
        for part in parts:
            assert ((part + part.flip(0)) == 213).all()  # image i with image B - 1 - i
    assert torch.equal(local_batch(batch, Processes(0, 1, torch.device("cpu"))), batch)


@pytest.mark.parametrize("batch_size", [2, 6, 8, 16, 24, 512])
def test_processes_share_a_batch_exactly_where_their_shares_are_of_one_size(batch_size):
    optim = replace(OPTIM, batch_size=batch_size)
    for world in range(1, 13):
        if batch_size % (2 * world) == 0:
            parts = [
                local_batch(torch.arange(batch_size), Processes(r, world, torch.device("cpu"))) for r in range(world)
            ]
            assert {len(part) for part in parts} == {batch_size // world}
            refuse_unequal_shares(optim, world)
            assert largest_world(optim, world) == world
        else:
            with pytest.raises(UserError, match=rf"{world} processes cannot share optim.batch_size={batch_size} equal"):
                refuse_unequal_shares(optim, world)
            refuse_unequal_shares(optim, largest_world(optim, world))


def test_a_row_that_its_processes_cannot_share_is_refused_before_one_waits_for_another(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("store.processes.start_processes", lambda: pytest.fail("a process waits for the others"))
    with pytest.raises(UserError, match=r"4 processes cannot share optim.batch_size=6 equally.*: start 3, or make"):
        finetune(load("demo_tiny", "sweep.index=1", "optim.batch_size=6", "optim.steps=1", f"paths.runs={tmp_path}"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["optim.keep=best"], "optim.keep=best needs optim.evaluate_every"),
        (["regularizer.ingredient=swa"], "regularizer.ingredient=swa is not made"),
        (["augment.kind=stochastic", "~sweep.draw.augment"], "augment.among"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        load("demo_tiny", *changes)
