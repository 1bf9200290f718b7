"""The training loop."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn

from configs.chance import seed_globals
from configs.errors import UserError
from configs.schema import Experiment
from configs.training import Distill, Optim
from eval.batch_size import largest_input
from finetune.averages import Averages, holding
from finetune.batches import training_batches
from finetune.length import Length
from finetune.losses import classification_loss, distillation_loss
from finetune.meter import Meter, peak_flops, training_flops
from finetune.optimisers import build, learning_rate
from finetune.parallel import DTYPES, gathered, prepare, reshard, synchronised
from finetune.sharpness import perturbed
from finetune.state import Checkpoint, Interruption, State
from models.classifier import Network
from models.tokens import TokenSplit
from store.atomic import write_jsonl
from store.processes import Processes, any_of, sum_over
from tasks.ahead import made_ahead
from tasks.split import Images

RAW = "raw"  # the weights as the optimiser leaves them, beside their averages
ALONE = Processes(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Trained:
    """What a training ended with."""

    finite: bool  # False: the loss stopped being a number, which ended it at once
    weights: dict[str, dict[str, Tensor]]  # by kind: raw, ema_<decay>, swa; none where it diverged
    best: dict[str, dict[str, int]]  # by kind, where the best was kept: step, correct, n


def mixing(optim: Optim, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """timm's mixup and CutMix of a batch, which also smooth the labels; one coefficient a batch."""
    return Mixup(
        optim.mixup,
        optim.cutmix,
        prob=float(optim.mixup > 0 or optim.cutmix > 0),
        label_smoothing=optim.label_smoothing,
        num_classes=classes,
    )


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, and its gradient in the parameters' `.grad`."""

    network: nn.Module
    optim: Optim
    micro_batch: int | None
    autocast: torch.dtype | None
    scaler: torch.amp.GradScaler
    distill: Distill | None
    teacher: Callable[[Tensor], Tensor] | None

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Mean over some examples."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.network(images).float()
        labels = classification_loss(self.optim, logits, targets)
        if self.distill is None or self.teacher is None:
            return labels
        taught = distillation_loss(logits, self.teacher(images), self.distill.temperature)
        return self.distill.weight * taught + (1 - self.distill.weight) * labels

    def gradient(self, images: Tensor, targets: Tensor, processes: Processes, *, shared: bool = True) -> Tensor:
        """This process's part of the mean loss over the batch of all processes; gradients in place of earlier ones.

        Args:
            images: (b, 3, H, W), this process's share; of texts (b, L) token ids.
            targets: (b, C).
            processes: gradients are averaged over them, hence the factor W.
            shared: whether they are; without, each process has the gradient of its own share.
        """
        self.network.zero_grad()
        total = torch.zeros((), device=images.device)
        size = self.micro_batch or len(images)
        parts = list(zip(images.split(size), targets.split(size), strict=True))
        for i, (some, some_targets) in enumerate(parts):
            with synchronised(self.network, shared and i == len(parts) - 1):
                loss = self.loss(some, some_targets)
                part = loss * (len(some) * processes.world / self.optim.batch_size)
                self.scaler.scale(part).backward()
            total += part.detach() / processes.world
        return total


def nothing_shown(meter: Meter) -> AbstractContextManager[Callable[[int, float], None]]:
    """For trainings that nobody watches."""
    return nullcontext(lambda step, loss: None)


def meter_of(model: Network, config: Experiment, length: Length, processes: Processes) -> Meter:
    """A meter of the training, with what is needed for MFU where the devices' peak is known."""
    if processes.device.type != "cuda":
        return Meter(length.steps)
    peak = peak_flops(torch.cuda.get_device_name(processes.device), config.compute.precision)
    flops = training_flops(model, largest_input(config.model, training=True)) if peak else None
    return Meter(length.steps, flops=flops, peak=peak * processes.world if peak else None)


def fine_tune(
    model: Network,
    train: Images | TokenSplit,
    config: Experiment,
    *,
    run_seed: int,
    folder: Path,
    processes: Processes = ALONE,
    teacher: Callable[[Tensor], Tensor] | None = None,
    held_out: Callable[[Network], tuple[int, int]] | None = None,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    show: Callable[[Meter], AbstractContextManager[Callable[[int, float], None]]] = nothing_shown,
    after_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train `model` in place, from folder/state.pt where there is one.

    Args:
        model: with its initial weights; parameters without gradient stay as they are.
        train: the training images or texts; the last incomplete batch of an epoch is dropped.
        config: of the row: optimiser, schedule, loss, augmentation, regularisation, how it is computed.
        run_seed: of the data order, augmentation and mixup.
        folder: state.pt is written there at the end of every epoch and every `compute.save_every` steps, and
            metrics.jsonl, a row for every epoch, every `tracking.every` steps and every look at held-out.
        processes: this one among those that train the row together.
        teacher: (b, 3, H, W) images or (b, L) token ids to the (b, C) logits of the ensemble that is distilled.
        held_out: the model to how many held-out images it gets right, of how many; for `optim.evaluate_every`. All
            processes call it together.
        log: gets each row of metrics as it is made, with images a second and MFU where they are known.
        show: shows what a meter knows while the training lasts, told steps and loss after each step.
        after_step: called with the number of steps taken, after what belongs to them is on disk.

    Raises:
        UserError: damaged state, full disk, a batch larger than the training set, or settings this network has not.
        InterruptedBySignalError: SIGTERM or SIGUSR1 came, and the state is saved.
    """
    optim, compute, sam = config.optim, config.compute, config.regularizer.sam
    length = Length.of(optim, len(train))
    if sam is not None and not sam.synchronised and compute.strategy == "fsdp":
        raise UserError("regularizer.sam.synchronised=false needs whole gradients: set compute.strategy=ddp")
    meter = meter_of(model, config, length, processes)
    network = prepare(model, compute, processes)
    trainable = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler(processes.device.type, enabled=compute.precision == "fp16")
    averages = Averages.of(model.state_dict(), config.regularizer, length.steps)
    state = State(model, build(optim, model), averages, scaler, processes.writes)
    state.load(folder / "state.pt")
    progress = state.progress
    autocast = None if compute.precision == "fp32" or compute.strategy == "fsdp" else DTYPES[compute.precision]
    objective = Objective(network, optim, compute.micro_batch, autocast, scaler, config.regularizer.distill, teacher)
    mixed = mixing(optim, model.num_classes)
    first = progress.step
    batches = training_batches(train, config, length, run_seed=run_seed, processes=processes, first=first)

    model.train()
    meter.first = first
    with Interruption().listening() as interruption, show(meter) as tell:
        for step, made in enumerate(made_ahead(batches, batches.workers(compute)), start=first):
            lr = learning_rate(optim, step, length.steps)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            batch = _mixed(made, train.labels[batches.indices(step)], mixed, (run_seed, step), processes)
            loss = objective.gradient(*batch, processes, shared=sam is None or sam.synchronised)
            if sam is not None:
                with perturbed(trainable, sam.rho):
                    objective.gradient(*batch, processes)
            scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(trainable, optim.clip_norm or math.inf)
            scaler.step(state.optimizer)
            scaler.update()
            _take_in(model, averages, step)
            value = sum_over(loss).item()
            if not math.isfinite(value):
                return Trained(False, {}, {})
            meter.step(optim.batch_size)
            progress.step += 1
            progress.epoch_loss += value
            for row in due_metrics(state, held_out, config, length, loss=value, lr=lr):
                progress.metrics.append(row)
                log(row | meter.rates() if "lr" in row else row)
            tell(progress.step, value)
            stop = any_of(interruption.signum is not None, processes)
            if stop or _is_due(progress.step, length, compute.save_every):
                _keep(state, folder)
            if stop:
                interruption.end()
            after_step(progress.step)
            meter.resume()
    return _trained(state, optim)


def _mixed(
    made: Tensor,
    labels: Tensor,
    mixed: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    key: tuple[int, int],
    processes: Processes,
) -> tuple[Tensor, Tensor]:
    """A batch on its device: pixels mixed as numbers, token ids as they are; and (b, C) targets.

    `key` names run and step, whose mixing is one of all processes, and whose dropout is each one's own.
    """
    run_seed, step = key
    seed_globals(run_seed, "mixup", step)
    inputs = made.to(processes.device, non_blocking=True)
    inputs = inputs.float() if inputs.dtype == torch.uint8 else inputs
    batch = mixed(inputs, labels.to(processes.device))
    if processes.world > 1:
        seed_globals(run_seed, "dropout", step, processes.rank)
    return batch


def _take_in(model: Network, averages: Averages, step: int) -> None:
    """Averages ask for a state dict only when one is due: it has a cost, of sharded models a large one."""
    if averages.due(step):
        averages.update(model.state_dict(), step)


def _is_due(step: int, length: Length, save_every: int) -> bool:
    """Whether the state after this many steps is kept."""
    return step == length.steps or step % length.steps_per_epoch == 0 or (save_every > 0 and step % save_every == 0)


def _keep(state: State, folder: Path) -> None:
    """Write what a restart needs and what a reader may look at."""
    state.save(folder / "state.pt")
    if state.writes:
        write_jsonl(folder / "metrics.jsonl", state.progress.metrics)


def due_metrics(
    state: State,
    held_out: Callable[[Network], tuple[int, int]] | None,
    config: Experiment,
    length: Length,
    *,
    loss: float,
    lr: float,
) -> Iterator[dict[str, Any]]:
    """The metrics that fall due after a step: a point of the loss curve, an epoch's end, a look at held-out."""
    progress, optim = state.progress, config.optim
    if progress.step % config.tracking.every == 0:
        yield {"step": progress.step, "loss": loss, "lr": lr}
    if progress.step % length.steps_per_epoch == 0:
        epoch = progress.step // length.steps_per_epoch
        yield {"epoch": epoch, "step": progress.step, "loss": progress.epoch_loss / length.steps_per_epoch, "lr": lr}
        progress.epoch_loss = 0.0
    every = optim.evaluate_every
    if held_out is None or not every or (progress.step % every and progress.step != length.steps):
        return
    for kind, weights in {RAW: state.model.state_dict(), **state.averages.weights()}.items():
        with holding(state.model, weights if kind != RAW else {}):
            correct, n = held_out(state.model)
        reshard(state.model)
        yield {"step": progress.step, "weights": kind, "held_out_correct": correct, "held_out_n": n}
        if optim.keep == "best" and (kind not in state.best or correct > state.best[kind].correct):
            copy = {name: tensor.clone() for name, tensor in gathered(weights, keep=state.writes).items()}
            state.best[kind] = Checkpoint(progress.step, correct, n, copy)
    state.model.train()


def kinds_of_weights(state: State) -> dict[str, dict[str, Tensor]]:
    """Whole weights on the CPU by kind: raw, then the averages. All processes must ask; the writing one gets them."""
    kinds = {RAW: state.model.state_dict(), **state.averages.weights()}
    return {kind: gathered(weights, keep=state.writes) for kind, weights in kinds.items()}


def _trained(state: State, optim: Optim) -> Trained:
    if optim.keep == "best":
        best = {k: {"step": c.step, "correct": c.correct, "n": c.n} for k, c in state.best.items()}
        return Trained(True, {kind: checkpoint.weights for kind, checkpoint in state.best.items()}, best)
    return Trained(True, kinds_of_weights(state), {})
