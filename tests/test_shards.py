"""Two processes (gloo) that share a model's weights train as one does: precision, optimiser, SAM, loss scaling."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from configs.schema import load
from configs.training import Optim, Sam
from finetune.data import local_batch
from finetune.dist import wrap
from finetune.optim import Objective, backward_with_sam, build
from models.classifier import Classifier
from store.processes import Processes
from tests.apart import exits

OPTIM = Optim(
    lr=0.01, weight_decay=0.1, epochs=1, batch_size=8, warmup_steps=0, clip_norm=None, label_smoothing=0.0, mixup=0.0
)
COMPUTE = replace(load("demo_tiny").compute, channels_last=False)


def images_and_targets(step=0):
    """Eight images, as mixing leaves them: pixels that bfloat16 has not."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=generator).float() * 0.7 + 3.3
    return images, torch.randn(8, 5, generator=generator).softmax(dim=1)


def vit(seed=0):
    """A Vision Transformer of 3 blocks, some sizes of which two processes cannot halve.

    Without a bias of keys, whose gradient is 0 but for rounding, of which Adafactor would make steps.
    """
    torch.manual_seed(seed)
    tower = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=42, depth=3, num_heads=2, num_classes=0, qkv_bias=False
    )
    return Classifier(tower, 42, 5, torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.2]), normalize=False)


def efficientnet():
    """A network of batch norms, whose statistics are float32 beside weights of whatever precision."""
    torch.manual_seed(0)
    tower = timm.create_model("test_efficientnet", num_classes=0)
    return Classifier(tower, tower.num_features, 5, torch.zeros(3) + 0.5, torch.zeros(3) + 0.2)


def in_pairs(test, folder):
    """What `test(processes)` returns on each of two processes."""
    assert exits(_kept, test, folder, processes=2) == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _kept(test, folder):
    dist.init_process_group("gloo")
    torch.save(test(Processes(dist.get_rank(), 2, torch.device("cpu"))), folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def train(model, processes, *, steps=2, sam=None, compute=COMPUTE, optim=OPTIM):
    """Losses, and whole weights after some steps of this process's share of each batch."""
    network = wrap(model.train(), compute, processes)
    optimizer, losses = build(optim, model), []
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[compute.precision]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=compute.precision == "fp16")
    objective = Objective(network, optim, compute.micro_batch, autocast, scaler, None, None)
    own = local_batch(torch.arange(8), processes)
    for step in range(steps):
        images, targets = images_and_targets(step)
        dtype = next(model.parameters()).dtype
        losses.append(backward_with_sam(objective, (images[own], targets[own].to(dtype)), processes, model, sam))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    if processes.world > 1:
        for loss in losses:
            dist.all_reduce(loss)
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    return torch.stack(losses), weights, scaler.get_scale()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def distance(one, two):
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one)


def compared_in_float64(processes):
    """Sharded weights against whole copies, and both against one process: nothing but float64's rounding."""
    found, alone = {}, Processes(0, 1, torch.device("cpu"))
    sharded, small = replace(COMPUTE, strategy="fsdp"), replace(COMPUTE, strategy="fsdp", micro_batch=2)
    for kind, compute in (("adafactor", sharded), ("adamw", small)):
        optim = replace(OPTIM, kind=kind)
        one = train(vit().double(), alone, optim=optim)
        two = train(vit().double(), processes, optim=optim, compute=compute)
        found[kind] = ((one[0] - two[0]).abs().max().item(), distance(one[1], two[1]))
    for synchronised, compute in ((True, sharded), (False, small)):
        sam = Sam(rho=0.5, synchronised=synchronised)
        copies = train(vit().double(), processes, sam=sam)
        shards = train(vit().double(), processes, sam=sam, compute=compute)
        found[f"sam {synchronised}"] = (0.0, distance(copies[1], shards[1]))
        found[synchronised] = copies[1]
    return found


@pytest.mark.slow
def test_sharded_weights_take_the_steps_of_whole_ones_in_float64(tmp_path):
    for found in in_pairs(compared_in_float64, tmp_path):
        own, shared = found.pop(False), found.pop(True)
        assert distance(own, shared) > 1e-4  # a process's own perturbation is another than that of all
        assert len(found) == 4
        for name, (losses, weights) in found.items():
            assert losses < 1e-12, name
            assert weights < 1e-12, name


def seen_in_low_precision(processes):
    """Of each network and precision: losses with shards and with copies, the type of gathered weights, and inputs."""
    found = {}
    for name, network, precision in (
        ("vit", vit, "bf16"),
        ("vit", vit, "fp16"),
        ("efficientnet", efficientnet, "bf16"),
    ):
        for strategy in ("ddp", "fsdp"):
            model, seen = network(), {}
            first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
            # A copy of them, since what comes in may be changed in place.
            first.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.update(pixels=inputs[0].clone()))
            compute = replace(COMPUTE, strategy=strategy, precision=precision)
            sam = Sam(rho=0.05, synchronised=name != "vit" or precision != "bf16")
            losses, weights, scale = train(model, processes, compute=compute, steps=1, sam=sam)
            found[name, precision, strategy] = (losses, weights, seen["pixels"], scale)
    return found


@pytest.mark.slow
def test_sharded_weights_train_in_low_precision_and_see_pixels_in_float32(tmp_path):
    images = images_and_targets(0)[0]
    for rank, found in enumerate(in_pairs(seen_in_low_precision, tmp_path)):
        for (name, precision, strategy), (losses, weights, pixels, _) in found.items():
            mean, std = (
                (vit() if name == "vit" else efficientnet()).mean,
                (vit() if name == "vit" else efficientnet()).std,
            )
            own = images[local_batch(torch.arange(8), Processes(rank, 2, torch.device("cpu")))]
            assert torch.equal(pixels, (own - mean) / std), (name, precision, strategy)
            assert losses.dtype == torch.float32
            copies = found[name, precision, "ddp"]
            torch.testing.assert_close(losses, copies[0], rtol=0.02, atol=0.02)
            assert all(tensor.dtype == torch.float32 for tensor in weights.values() if tensor.is_floating_point())
            assert distance(weights, copies[1]) < 0.05


def overflowed(processes):
    """An infinite gradient in the shard of one process."""
    model = vit()
    wrap(model, replace(COMPUTE, strategy="fsdp"), processes)
    assert isinstance(model, FSDPModule)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=4.0), build(OPTIM, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        scaler.scale(torch.ones(()))
    before = whole(model.head.weight)
    model.head.weight.grad.to_local().fill_(torch.inf if processes.rank else 1.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return distance({"w": before}, {"w": whole(model.head.weight)}), scaler.get_scale()


@pytest.mark.slow
def test_all_processes_leave_out_a_step_of_which_one_shard_overflowed(tmp_path):
    assert in_pairs(overflowed, tmp_path) == [(0.0, 2.0)] * 2


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_one_kernel_takes_the_step_of_whole_parameters(kind):
    assert build(replace(OPTIM, kind=kind), nn.Linear(2, 2)).defaults["fused"]
