"""The objective of a step and what minimises it: losses, SAM, torch's optimisers and schedules, by name."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import AdafactorBigVision, param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros

from configs.training import SMALLEST_FACTORED, Distill, Optim, Sam
from finetune.dist import synchronised
from models.classifier import Network
from store.processes import Processes

EPSILON = 1e-30  # added to squares of gradients, as in Big Vision


class Adafactor(AdafactorBigVision):
    """timm's, with Big Vision's defaults, which also takes the same steps on parameters that FSDP2 shards.

    timm's code stops at them, since DTensor's means change the placement of a tensor of one row. Here each process
    works on its shard, means over rows are summed over processes, and states are sharded like the parameter.

    Source: Zhai et al. 2022, Section 3.4, and Big Vision's `scale_by_adafactor`: second moments by rows and columns,
    their decay 1 - t^-0.8 at most 0.999; a bfloat16 momentum of updates; no clipping of its own; and steps that do not
    grow with the weights.
    """

    def __init__(self, params: Any, lr: float, momentum: float | None = 0.9):
        super().__init__(params, lr=lr, momentum=momentum, min_dim_size_to_factor=SMALLEST_FACTORED)
        # A dtype is no value of a state dict for torch.distributed, so it is left out there and put back afterwards.
        self.register_state_dict_post_hook(_without_dtypes)
        self.register_load_state_dict_pre_hook(_with_dtypes)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        stepping = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not any(isinstance(parameter, DTensor) for parameter, _ in stepping):
            return super().step(closure)
        for parameter, group in stepping:
            _step_of_shard(parameter, self.state[parameter], group)
        return None


def _without_dtypes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        del group["momentum_dtype"]


def _with_dtypes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        group["momentum_dtype"] = optimizer.defaults["momentum_dtype"]


def _step_of_shard(parameter: DTensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """timm's step of a parameter of which each process has some rows, which are the entries along dimension 0."""
    assert isinstance(parameter.grad, DTensor)
    weights, gradient, dims = parameter.to_local(), parameter.grad.to_local(), _largest_two(parameter.shape)
    if not state:
        state["step"] = torch.zeros(())
        if dims is None:
            state["exp_avg_sq"] = torch.zeros_like(parameter.grad)
        else:
            state["exp_avg_sq_r"], state["exp_avg_sq_c"] = (_zeros_of_mean(parameter, dim) for dim in reversed(dims))
        if group["momentum"] is not None:
            state["exp_avg"] = torch.zeros_like(parameter.grad, dtype=group["momentum_dtype"])
    state["step"] += 1
    new = max(1 - group["beta2_cap"], state["step"].item() ** -group["decay_rate"])
    squares = gradient.square() + EPSILON
    if dims is None:
        update = gradient * state["exp_avg_sq"].to_local().lerp_(squares, new).rsqrt()
    else:
        dc, dr = dims
        rows = state["exp_avg_sq_r"].to_local().lerp_(_mean(squares, dr, parameter), new)
        columns = state["exp_avg_sq_c"].to_local().lerp_(_mean(squares, dc, parameter), new)
        # The mean of either is that of the whole tensor; this process has all of one of them.
        mean = columns.mean(dr, keepdim=True) if dc == 0 else rows.mean(dc, keepdim=True)
        update = gradient * (rows / mean).rsqrt() * columns.rsqrt()
    if group["momentum"] is not None:
        momentum = state["exp_avg"].to_local()
        update = momentum.lerp_(update.to(momentum.dtype), 1 - group["momentum"]).to(gradient.dtype)
    weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def _largest_two(shape: torch.Size) -> tuple[int, int] | None:
    """The second largest dimension and the largest, over which squares are averaged; None where that one is small."""
    ordered = sorted(range(len(shape)), key=lambda dim: (shape[dim], dim))
    return (ordered[-2], ordered[-1]) if len(shape) > 1 and shape[ordered[-2]] >= SMALLEST_FACTORED else None


def _zeros_of_mean(parameter: DTensor, dim: int) -> DTensor:
    """Zeros of the shape of a mean over a dimension: whole where it is dimension 0, else sharded like the parameter."""
    shape = [1 if i == dim else size for i, size in enumerate(parameter.shape)]
    placement = Replicate() if dim == 0 else Shard(0)
    return zeros(shape, dtype=parameter.dtype, device_mesh=parameter.device_mesh, placements=[placement])


def _mean(shard: Tensor, dim: int, parameter: DTensor) -> Tensor:
    total = shard.sum(dim, keepdim=True)
    if dim == 0:
        dist.all_reduce(total, group=parameter.device_mesh.get_group())
    return total / parameter.shape[dim]


def build(optim: Optim, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a model's trainable parameters; by `optim.decay`, biases and norms do not decay or do.

    In adam, rmsprop and sgd the decay is added to the gradient; adamw and adafactor shrink the weights themselves.
    One kernel takes the whole step of those that have one, but for sharded parameters on a CPU, which have none.
    """
    if optim.decay == "all":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "weight_decay": optim.weight_decay}]
    else:
        groups = param_groups_weight_decay(model, optim.weight_decay)
    first = next(model.parameters())
    fused = True if first.is_cuda or not isinstance(first, DTensor) else None
    match optim.kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=optim.lr, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=optim.lr, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=optim.lr, momentum=optim.momentum)
        case "sgd":
            return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)
        case "adafactor":
            return Adafactor(groups, lr=optim.lr, momentum=optim.momentum or None)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Linear warm-up from lr / warmup_steps, then the schedule, which all but `constant` bring to 0 at the last step.

    Steps count from 0. cosine_restarts has `cycles` cosines of equal length, each from the peak.

    Source: the authors' `cosine_lr`; Appendix J.2.1 gives the cosine, L.3 the restarts (Loshchilov and Hutter 2017).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    share = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    match optim.schedule:
        case "cosine":
            return optim.lr * (1 + math.cos(math.pi * share)) / 2
        case "cosine_restarts":
            return optim.lr * (1 + math.cos(math.pi * (share * optim.cycles % 1))) / 2
        case "linear":
            return optim.lr * (1 - share)
        case "constant":
            return optim.lr


def classification_loss(optim: Optim, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of the loss of (B, C) logits against (B, C) soft labels.

    `softmax` takes the cross-entropy; `bce` the sum over classes of binary ones, as ViT-G/14 was fine-tuned with
    (Appendix J.2.3); `likelihood` is minus the log-probability of the label's answer over all that a language model may
    say, its own loss (Appendix J.5), summed over tokens.
    """
    match optim.loss:
        case "softmax":
            return F.cross_entropy(logits, targets)
        case "bce":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()
        case "likelihood":
            return -(targets * logits).sum(dim=1).mean()


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of the cross-entropy of (B, C) logits against the teacher's, at a temperature T, times T^2.

    The factor keeps gradients of one size whatever T is. Source: Hinton et al. 2015, Section 2.
    """
    return temperature**2 * F.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1))


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits of low precision as float32, in which losses are taken; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, and its backward pass."""

    network: nn.Module
    optim: Optim
    micro_batch: int | None
    autocast: torch.dtype | None
    scaler: torch.amp.GradScaler
    distill: Distill | None
    teacher: Callable[[Tensor], Tensor] | None

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over these examples."""
        with torch.autocast(inputs.device.type, self.autocast, enabled=self.autocast is not None):
            logits = at_least_float32(self.network(inputs))
            taught = None if self.teacher is None else at_least_float32(self.teacher(inputs))
        on_labels = classification_loss(self.optim, logits, targets)
        if self.distill is None or taught is None:
            return on_labels
        on_teacher = distillation_loss(logits, taught, self.distill.temperature)
        return self.distill.weight * on_teacher + (1 - self.distill.weight) * on_labels

    def backward(self, inputs: Tensor, targets: Tensor, processes: Processes, *, average: bool = True) -> Tensor:
        """Replace the parameters' gradients by those of a batch; returns this process's part of the mean loss.

        With `average` gradients are those over processes, hence the factor W; without, those of its own part.
        """
        self.network.zero_grad()
        losses = []
        size = self.micro_batch or len(inputs)
        micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        for i, micro_batch in enumerate(micro_batches):
            with synchronised(self.network, average and i == len(micro_batches) - 1):
                loss = self.loss(*micro_batch) * (len(micro_batch[0]) * processes.world / self.optim.batch_size)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach() / processes.world)
        return torch.stack(losses).sum()


def backward_with_sam(
    objective: Objective, batch: tuple[Tensor, Tensor], processes: Processes, model: Network, sam: Sam | None
) -> Tensor:
    """The backward pass of a step; SAM takes the gradient at a point nearby, the loss at the weights themselves."""
    if sam is None:
        return objective.backward(*batch, processes)
    if not sam.synchronised and isinstance(model, FSDPModule):
        return backward_at_own_perturbations(
            model, sam.rho, lambda average: objective.backward(*batch, processes, average=average)
        )
    loss = objective.backward(*batch, processes, average=sam.synchronised)
    with perturbed([p for p in model.parameters() if p.requires_grad], sam.rho):
        objective.backward(*batch, processes)
    return loss


@torch.no_grad()
def _scale(gradients: list[Tensor], rho: float) -> Tensor:
    """The factor that makes gradients as long as `rho` over all tensors; 0 where they are 0."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # parameters are sharded
    return torch.where(norm > 0, rho / norm, 0.0)  # an `if` would wait for the GPU


@contextmanager
@torch.no_grad()
def perturbed(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Move parameters uphill by `rho` along their gradient, over all of them together; afterwards back, to the bit.

    Among several processes it is the mean over all of them, or each process's own (m-sharpness).

    Source: Foret et al. 2021, Equation 2 and Section 4.1; Appendix J.2.3 of the paper has both kinds.
    """
    moving = [(p, p.detach().clone(), p.grad) for p in parameters if p.grad is not None]
    scale = _scale([gradient for _, _, gradient in moving], rho)
    for parameter, _, gradient in moving:
        parameter.add_(gradient * scale)
    try:
        yield
    finally:
        for parameter, original, _ in moving:
            parameter.copy_(original)


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Let a model of FSDP2 hold whole weights while the block lasts; what is written into them is forgotten then."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        yield {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)  # like finetune.dist.wrap
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()


def backward_at_own_perturbations(model: nn.Module, rho: float, backward: Callable[[bool], Tensor]) -> Tensor:
    """SAM where each process moves along its own gradient (m-sharpness), for a model of FSDP2.

    A process's own gradient and perturbed weights are of no use to the others, so both are whole on each for now.
    `backward` computes gradients, averaged over processes or not; the loss is that before the move.
    """
    shards = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for shard in shards.values():
        shard.grad = None
    own: dict[str, Tensor] = {}

    def take(name: str, parameter: Tensor) -> None:
        """Add up gradients in the precision of the weights, as FSDP would; none is left for it to send."""
        assert parameter.grad is not None
        found = parameter.grad.to(shards[name].dtype)
        own[name] = own[name].add_(found) if name in own else found
        parameter.grad = None

    with gathered_weights(model) as whole:
        hooks = [each.register_post_accumulate_grad_hook(partial(take, name)) for name, each in whole.items()]
        loss = backward(False)
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            scale = _scale(list(own.values()), rho)
            for name in whole:
                if name in own:  # moved in the precision of the shards: in a lower one the move would be rounded away
                    shard = shards[name]
                    assert isinstance(shard, DTensor)
                    whole[name].copy_(shard.full_tensor().add_(own.pop(name) * scale))
        backward(True)
    return loss
