"""Training: seeded by what a sample is, resumable to the bit, honest about divergence."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.chance import seed_globals
from configs.errors import UserError
from configs.schema import load
from configs.training import Augment
from finetune.augment import augmentation
from finetune.batches import TrainingBatches, epoch_order
from finetune.length import Length
from finetune.loop import ALONE, fine_tune
from finetune.optimisers import learning_rate
from models.classifier import Classifier, pretrained, zero_shot_head
from models.probe import linear_probe
from store.processes import Processes
from tasks.ahead import made_ahead
from tasks.load import class_names, load_split

MINIMAL = Augment(kind="minimal", crop=0.9, magnitude=0, layers=0, increasing=True, flip=0.5)
STRONG = Augment(kind="rand", crop=0.5, magnitude=9, layers=2, increasing=True, flip=0.5)


@pytest.fixture(scope="module")
def config():
    return load("demo_tiny")


@pytest.fixture(scope="module")
def train(config):
    return load_split(config.task, "train")


@pytest.fixture
def model(config):
    torch.set_num_threads(1)
    return pretrained(config.model, class_names(config.task))


def run(model, train, config, folder, **changes):
    """Train with changed settings of the optimiser, or of other groups and calls where they are named so."""
    calls = {k: changes.pop(k) for k in ("after_step", "teacher", "held_out", "processes", "log") if k in changes}
    groups = {k: changes.pop(k) for k in ("augment", "regularizer", "compute") if k in changes}
    optim = replace(config.optim, **{"epochs": 2} | changes)
    settings = replace(config, **{"optim": optim, "augment": MINIMAL} | groups)
    return fine_tune(model, train, settings, run_seed=1, folder=folder, **calls)


def batch_of(train, augment, step):
    """The uint8 images of one step of eight images, 64 pixels wide, and which they are."""
    length = Length(images=len(train), batch_size=8, steps_per_epoch=len(train) // 8, steps=500)
    batches = TrainingBatches(train, augment, 64, length, run_seed=1, processes=ALONE)
    return batches[step], batches.indices(step)


@pytest.mark.parametrize("augment", [MINIMAL, STRONG], ids=["minimal", "rand"])
def test_a_sample_looks_the_same_whatever_was_made_before_it(train, augment):
    later, _ = batch_of(train, augment, 3)
    batch_of(train, STRONG, 7)
    torch.rand(5)
    again, _ = batch_of(train, augment, 3)
    assert later.dtype == torch.uint8
    assert later.shape == (8, 3, 64, 64)
    assert torch.equal(later, again)


def test_a_sample_looks_the_same_whichever_process_makes_it(train):
    length = Length(images=len(train), batch_size=8, steps_per_epoch=len(train) // 8, steps=4)
    whole = TrainingBatches(train, STRONG, 64, length, run_seed=1, processes=ALONE)
    shares = [replace(whole, processes=Processes(rank, 2, torch.device("cpu"))) for rank in range(2)]
    together = torch.cat([share[2] for share in shares])
    order = torch.cat([share.indices(2) for share in shares])
    assert torch.equal(whole[2][whole.indices(2).argsort()], together[order.argsort()])
    ahead = list(made_ahead(replace(whole, first=2), workers=1))
    assert len(ahead) == 2
    assert torch.equal(ahead[0], whole[2])


def test_a_sample_looks_different_in_another_epoch_and_under_a_stronger_augmentation(train):
    epoch = len(train) // 8
    first, which = batch_of(train, STRONG, 0)
    weak, _ = batch_of(train, MINIMAL, 0)
    original = train.images[which].float()
    assert (weak.float() - original).abs().mean() < (first.float() - original).abs().mean()
    place = epoch_order(len(train), 1, 1).tolist().index(which[0].item())
    later, found = batch_of(train, STRONG, epoch + place // 8)
    assert found[place % 8] == which[0]
    assert not torch.equal(first[0], later[place % 8])


def test_the_crop_keeps_the_share_that_it_says():
    # A picture of one white quarter: a crop of at least 0.9 of the area keeps its share near a quarter.
    image = Image.fromarray(np.kron([[255, 0], [0, 0]], np.ones((32, 32))).astype(np.uint8)).convert("RGB")
    transform = augmentation(replace(MINIMAL, crop=0.9), 64)
    for sample in range(20):
        seed_globals(sample)
        assert 0.15 < np.asarray(transform(image)).mean() / 255 < 0.37


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    first, second = epoch_order(50, 1, 0), epoch_order(50, 1, 1)
    assert sorted(first.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()
    assert torch.equal(first, epoch_order(50, 1, 0))


def test_the_schedule_warms_up_linearly_and_ends_near_zero(config):
    optim = replace(config.optim, lr=0.1, warmup_steps=4)
    rates = [learning_rate(optim, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[12] == pytest.approx(0.05)
    assert 0 < rates[-1] < 0.002


def test_training_lowers_the_loss_and_moves_only_what_has_a_gradient(model, train, config, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []

    assert run(model, train, config, tmp_path, epochs=3, log=lambda row: losses.append(row["loss"])).finite
    assert losses[-1] < losses[0]
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.weight" in moved
    assert "tower.trunk.conv_stem.weight" not in moved
    assert "tower.trunk.blocks.1.0.conv_pw.weight" not in moved
    assert "tower.trunk.blocks.4.0.conv_pw.weight" in moved
    assert not {name for name in moved if "running_" in name or "num_batches" in name}


def test_an_interrupted_run_ends_with_the_same_bits(config, train, tmp_path):
    class KilledError(Exception):
        pass

    def die(step):
        if step == 5:
            raise KilledError

    names, often = class_names(config.task), replace(config.compute, save_every=2)
    whole = pretrained(config.model, names)
    run(whole, train, config, tmp_path / "whole", mixup=0.3)
    with pytest.raises(KilledError):
        run(pretrained(config.model, names), train, config, tmp_path / "cut", mixup=0.3, compute=often, after_step=die)
    resumed = pretrained(config.model, names)
    steps = []
    run(resumed, train, config, tmp_path / "cut", mixup=0.3, compute=often, after_step=steps.append)
    assert steps[0] == 5  # the state after step 4 was kept
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"weight_decay": 3.0}, {"label_smoothing": 0.2}, {"mixup": 0.5}])
def test_every_setting_of_the_sweep_changes_the_weights(config, train, tmp_path, change):
    heads = []
    for folder, changes in (("plain", {}), ("changed", change)):
        model = pretrained(config.model, class_names(config.task))
        run(model, train, config, tmp_path / folder, epochs=1, **changes)
        heads.append(model.head.weight.detach())
    assert not torch.equal(*heads)


def test_a_loss_that_is_not_finite_ends_training_and_says_so(model, train, config, tmp_path):
    with torch.no_grad():
        model.head.bias[0] = math.inf
    assert not run(model, train, config, tmp_path).finite


def test_a_damaged_state_is_named(model, train, config, tmp_path):
    run(model, train, config, tmp_path, epochs=1)
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state.pt is damaged .*delete the file to start this row anew"):
        run(model, train, config, tmp_path, epochs=2)


def test_a_batch_larger_than_the_training_set_is_refused(model, train, config, tmp_path):
    with pytest.raises(UserError, match=f"more than the {len(train.labels)} training images"):
        run(model, train, config, tmp_path, batch_size=5000)


def test_features_have_unit_norm_and_logits_are_linear_in_them(model, train):
    model.eval()
    with torch.inference_mode():
        features = model.features(train.images[:4])
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
        torch.testing.assert_close(model(train.images[:4]), features @ model.head.weight.T + model.head.bias)


def test_uint8_and_float_images_are_normalised_alike(model, train):
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(train.images[:2]), model(train.images[:2].float()))


def test_constants_are_not_weights(model):
    assert not [name for name in model.state_dict() if name in ("mean", "std")]


def test_training_mode_keeps_batch_norm_statistics(model):
    model.train()
    assert model.training
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_the_zero_shot_head_is_the_normalised_mean_over_templates():
    # Two templates at right angles average to the diagonal.
    weight, bias = zero_shot_head(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), scale=10.0)
    torch.testing.assert_close(weight, torch.tensor([[10 / 2**0.5, 10 / 2**0.5]]))
    assert bias.tolist() == [0]


def test_zero_frozen_stages_leave_the_model_whole(config):
    whole = pretrained(replace(config.model, frozen_stages=0), class_names(config.task))
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert isinstance(whole, Classifier)


def test_a_linear_probe_separates_what_is_separable_and_chooses_on_held_out():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(5)
    labels = torch.arange(5).repeat(20)
    features = centres[labels] + 0.1 * torch.randn(100, 5, generator=generator)
    probe = linear_probe((features, labels), (features, labels), 5, [1e-6, 10])
    assert ((features @ probe.weight.T + probe.bias).argmax(dim=1) == labels).float().mean() > 0.95
    assert {c for c, _ in probe.tried} == {1e-6, 10}
    shuffled = labels.roll(1)
    opposite = linear_probe((features, labels), (features, shuffled), 5, [1e-6, 10])
    assert dict(opposite.tried) != dict(probe.tried)


def test_a_linear_probe_refuses_a_class_without_examples():
    with pytest.raises(ValueError, match=r"classes \[2\] have no training example"):
        linear_probe((torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([0])), 3, [1])
