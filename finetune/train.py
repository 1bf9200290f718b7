"""Fine-tune one row of a sweep, read from top to bottom: set-up, resume, the loop, evaluation, the end.

Killed at any time, the same command goes on: state.pt holds a training between two steps; trained.json says that the
weights are on disk and only their scores are missing; done.json comes last.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from configs.errors import InterruptedBySignalError, UserError
from configs.schema import Experiment, dump
from configs.training import Optim
from eval.forward import Evaluator, forward, largest_input
from eval.metrics import correct
from finetune.averages import Averages, holding, local_part
from finetune.data import TrainingBatches, mixed_batch, mixing
from finetune.dist import DTYPES, DivergedError, LateLosses, gathered, reshard, wrap
from finetune.length import Length, refuse_unequal_shares
from finetune.log import Log, Meter, peak_flops, show_progress, tracked, training_flops, untracked
from finetune.optim import Objective, backward_with_sam, build, learning_rate
from finetune.start import complete, import_row, initialise, other_head, refuse_other_data, save_trained, teacher_of
from finetune.state import Checkpoint, State, interruptions
from models.classifier import Network, architecture
from models.tokens import TokenSplit
from soups.chance import seed
from soups.files.atomic import write_json, write_jsonl
from soups.files.weights import load_weights
from store.processes import Processes, any_of, first_decides, start_processes, sum_over, use_kernels
from store.rows import draw, identity, require_trainable, row_config
from store.runs import RAW, WEIGHTS, RunFolder, done_row, finished, sole_writer
from tasks.prefetch import prefetch
from tasks.resized import with_copies
from tasks.split import ImageSplit

ONE_PROCESS = Processes(0, 1, torch.device("cpu"))


def train_row(config: Experiment, row: int, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune one row, or continue where it stopped; skipped where it is done. Returns its done.json.

    All processes train and score it together; the first one reads, decides and writes. Row 0 makes the initialisation.

    Raises:
        InterruptedBySignalError: a signal came, and the state is saved.
    """
    processes, run = start_processes(), RunFolder.of(config)
    first_decides(lambda: require_trainable(config), processes)
    if row == 0:
        return initialise(config)
    if config.sweep.imported is not None:
        return import_row(config, row)
    settings, folder, name = row_config(config, row), run.ingredient(row), identity(config, row)
    # A row that learns a task of its own is scored on the experiment's.
    scored = replace(settings, task=config.task)  # type: ignore[type-var]  # mypy does not know pydantic's

    def begin() -> str:
        row_0 = done_row(config, 0)
        if row_0 is None:
            raise UserError(f"row {row} starts from row 0, which is not there: run the same with sweep.index=0 first")
        refuse_other_data(config, row_0)
        write_json(folder / "config.json", dump(settings))
        return row_0["digest"]

    def train(start: str, log: Log) -> dict[str, Any]:
        began, evaluator = time.monotonic(), Evaluator(evaluation_settings(settings, processes), processes)
        # Shards come from the first process: the others need no memory for whole weights.
        has_memory = processes.is_main or settings.compute.strategy != "fsdp"
        with nullcontext() if has_memory else torch.device("meta"):
            model = architecture(settings.model, settings.task.size, settings.task.answers)
        evaluator.model = model
        initial: dict[str, Tensor] = {}  # like the next, of the first process alone
        head: dict[str, Tensor] = {}

        def load() -> None:
            initial.update(load_weights(run.ingredient(0) / WEIGHTS, start))
            head.update(other_head(config, settings, row))
            model.load_state_dict(initial | head)

        first_decides(load, processes)
        stream = row if settings.optim.seed is None else f"seed{settings.optim.seed}"
        run_seed = seed(config.sweep.seed, stream, "run")
        trained = fine_tune(
            model,
            evaluator.inputs(settings.task.train),
            settings,
            run_seed=run_seed,
            folder=folder,
            processes=processes,
            teacher=teacher_of(config, row, processes),
            held_out=partial(held_out_correct, evaluator, processes),
            log=log,
            console=console if processes.is_main else None,
            title=f"row {row}",
        )
        for weights in trained.weights.values() if settings.task != config.task else ():
            weights.update({key: initial[key] for key in head})
        status = "done" if trained.finite else "diverged"
        base = {"identity": name, "status": status, "row": row, "drawn": draw(config, row)}
        base |= {"seed": run_seed, "start": start, "best": trained.best, "seconds": trained.earlier}
        return first_decides(lambda: save_trained(settings, folder, base, began, trained.weights), processes)

    with ExitStack() as held:
        first_decides(lambda: held.enter_context(sole_writer(folder)), processes)
        done = first_decides(lambda: finished(folder, name), processes)
        if done is not None:
            return done
        start = first_decides(begin, processes)
        logs: list[Log] = [untracked]
        track = tracked(settings, row, draw(config, row), folder)
        first_decides(lambda: logs.append(held.enter_context(track)), processes)
        done = complete(scored, folder, name, partial(train, start, logs[-1]), processes)
        logs[-1](done)
        return done


@dataclass(frozen=True)
class Trained:
    """The end of a training."""

    finite: bool  # False: the loss stopped being a number, which ended it at once
    weights: dict[str, dict[str, Tensor]]  # by kind: raw, ema_<decay>, swa; none where it diverged
    best: dict[str, dict[str, int]]  # by kind, where the best was kept: step, correct, n
    earlier: float  # seconds that earlier processes trained before this one went on


def fine_tune(  # noqa: PLR0912, PLR0915 - a training, from top to bottom
    model: Network,
    train: ImageSplit | TokenSplit,
    config: Experiment,
    *,
    run_seed: int,
    folder: Path,
    processes: Processes = ONE_PROCESS,
    teacher: Callable[[Tensor], Tensor] | None = None,
    held_out: Callable[[Network], tuple[int, int] | None] | None = None,
    log: Log = untracked,
    console: Console | None = None,
    title: str = "",
    after_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train `model` in place, from folder/state.pt where there is one.

    Args:
        model: with its initial weights; parameters without gradient stay as they are.
        train: the training images or texts; the last incomplete batch of an epoch is dropped.
        run_seed: seed of the data order, augmentation and mixup.
        folder: for state.pt, at the end of every epoch and every `compute.save_every` steps, and metrics.jsonl.
        teacher: (b, ...) inputs to the (b, C) logits of the ensemble that is distilled.
        held_out: the model to how many held-out examples it gets right, of how many; None where logits are no numbers.
        after_step: called with the number of steps taken, after what belongs to them is on disk.

    Raises:
        InterruptedBySignalError: SIGTERM or SIGUSR1 came, and the state is saved.
    """
    # Set-up: data, model, optimiser.
    optim, compute, device = config.optim, config.compute, processes.device
    refuse_unequal_shares(optim, processes.world)
    length = Length.of(optim, len(train))
    use_kernels(compute, device)
    peak = peak_flops(torch.cuda.get_device_name(device), compute.precision) if device.type == "cuda" else None
    flops = training_flops(model, largest_input(config.model, training=True)) if peak else None
    meter = Meter(length.steps, flops=flops, peak=peak * processes.world if peak else None)
    network = wrap(model, compute, processes)
    trainable = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler(device.type, enabled=compute.precision == "fp16")
    averages = Averages(model.state_dict(), config.regularizer, length.steps)
    autocast = None if compute.precision == "fp32" else DTYPES[compute.precision]
    objective = Objective(network, optim, compute.micro_batch, autocast, scaler, config.regularizer.distill, teacher)
    mix = mixing(optim, model.num_classes)

    # Resume.
    state = State(model, build(optim, model), averages, scaler, processes)
    state.load(folder / "state.pt")
    progress = state.progress
    first = meter.first = progress.step
    examples = train if isinstance(train, TokenSplit) else with_copies(train, compute)
    batches = TrainingBatches(examples, config, length, run_seed, processes, model.subtracted)
    losses = LateLosses()
    model.train()

    def record(row: dict[str, Any]) -> None:
        progress.metrics.append(row)
        log(row | meter.rates() if "lr" in row else row)

    try:
        with interruptions() as came, show_progress(meter, title, console) as show_step:
            steps = range(first, length.steps)
            prefetched = prefetch(batches.__getitem__, steps, batches.workers, batches.bytes_each)
            for step, batch in zip(steps, prefetched, strict=True):
                # One step.
                lr = learning_rate(optim, step, length.steps)
                for group in state.optimizer.param_groups:
                    group["lr"] = lr
                labels = train.labels[batches.indices(step)]
                inputs_and_targets = mixed_batch(batch, labels, mix, run_seed=run_seed, step=step, processes=processes)
                loss = backward_with_sam(objective, inputs_and_targets, processes, model, config.regularizer.sam)
                scaler.unscale_(state.optimizer)
                if optim.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trainable, optim.clip_norm)
                scaler.step(state.optimizer)
                scaler.update()
                if averages.due(step):  # asked first, since a state dict of a sharded model is costly
                    averages.update(model.state_dict(), step)
                losses.add(loss, stop=bool(came))
                meter.step(optim.batch_size)

                # Its loss: a step that is logged, evaluated or saved waits for it; else the one before is there by now.
                taken = step + 1
                is_last, ends_epoch = taken == length.steps, taken % length.steps_per_epoch == 0
                is_logged = is_every(config.tracking.every, taken)
                is_evaluated = optim.evaluate_every > 0 and (is_last or is_every(optim.evaluate_every, taken))
                is_saved = is_last or ends_epoch or is_every(compute.save_every, taken)
                read = losses.read(newest=is_logged or is_evaluated or is_saved)
                stop = any(asked for _, asked in read)
                read += losses.read(newest=True) if stop else []
                for value, _ in read:
                    progress.step += 1
                    progress.epoch_loss += value
                    show_step(progress.step, value)

                # Metrics, and what a restart needs.
                if is_logged:
                    record({"step": taken, "loss": value, "lr": lr})
                if ends_epoch:
                    mean_loss = progress.epoch_loss / length.steps_per_epoch
                    record({"epoch": taken // length.steps_per_epoch, "step": taken, "loss": mean_loss, "lr": lr})
                    progress.epoch_loss = 0.0
                if is_evaluated and held_out is not None:
                    for row in evaluations(state, held_out, optim):
                        record(row)
                if stop or is_saved:
                    state.save(folder / "state.pt")
                    first_decides(lambda: write_jsonl(folder / "metrics.jsonl", progress.metrics), processes)
                if stop:
                    raise InterruptedBySignalError(came[-1] if came else signal.SIGTERM)
                after_step(taken)
                meter.resume()

        # The end: the last weights and their averages, or the best, whole and on the CPU of the first process.
        kinds = {RAW: model.state_dict(), **averages.weights()}
        tensors = (local_part(tensor) for weights in kinds.values() for tensor in weights.values())
        if any_of(not all(bool(tensor.isfinite().all()) for tensor in tensors), processes):  # which no loss has seen
            raise DivergedError
        if optim.keep == "best":
            best = {k: {"step": c.step, "correct": c.correct, "n": c.n} for k, c in state.best.items()}
            return Trained(True, {kind: kept.weights for kind, kept in state.best.items()}, best, state.earlier)
        whole = {kind: gathered(weights, keep=processes.is_main) for kind, weights in kinds.items()}
        return Trained(True, whole, {}, state.earlier)
    except DivergedError:
        return Trained(False, {}, {}, state.earlier)


def is_every(interval: int, step: int) -> bool:
    """Whether something that happens every so many steps, or never where that is 0, happens after this one."""
    return interval > 0 and step % interval == 0


def evaluations(
    state: State, held_out: Callable[[Network], tuple[int, int] | None], optim: Optim
) -> Iterator[dict[str, Any]]:
    """Evaluate the weights and their averages on held-out; with `optim.keep=best`, copy the best so far."""
    step = state.progress.step
    for kind, weights in {RAW: state.model.state_dict(), **state.averages.weights()}.items():
        with holding(state.model, weights if kind != RAW else {}):
            found = held_out(state.model)
        reshard(state.model)
        if found is None:
            raise DivergedError
        right, n = found
        yield {"step": step, "weights": kind, "held_out_correct": right, "held_out_n": n}
        if optim.keep == "best" and (kind not in state.best or right > state.best[kind].correct):
            whole = gathered(weights, keep=state.processes.is_main)
            copy = {name: tensor.clone() for name, tensor in whole.items()}
            state.best[kind] = Checkpoint(step, right, n, copy)
    state.model.train()


def evaluation_settings(settings: Experiment, processes: Processes) -> Experiment:
    """The settings by which a row is evaluated on held-out while it trains.

    Sharded over processes, a pass gathers weights, and one that tried how many examples fit would leave the others
    waiting where its memory ends first. So as many are evaluated at once as are trained on, which fit with all that a
    backward pass needs; fewer, where images are larger than in training.
    """
    compute, model = settings.compute, settings.model
    if compute.strategy != "fsdp" or compute.eval_batch is not None:
        return settings
    trained = compute.micro_batch or settings.optim.batch_size // processes.world
    larger = 1.0 if model.is_reader else max(1.0, (model.evaluated_at / model.image_size) ** 4)  # attention's memory
    fits = max(1, int(trained / larger))
    return replace(settings, compute=replace(compute, eval_batch=fits))  # type: ignore[type-var]  # see `scored`


def held_out_correct(evaluator: Evaluator, processes: Processes, model: Network) -> tuple[int, int] | None:
    """How many held-out images a model gets right, of how many; None in all processes where a logit is not a number."""
    split = evaluator.config.task.held_out
    labels = evaluator.split(split).labels
    own = torch.arange(processes.rank, len(labels), processes.world)
    # All evaluate as many images, since sharded models are gathered by all at once; an extra one is not counted.
    rows = torch.cat([own, own.new_zeros(-(-len(labels) // processes.world) - len(own))])
    logits = forward(model, evaluator.batches(split, rows), evaluator.config.compute.evaluates_in)
    lost = bool(logits.isnan().any())
    right = 0 if lost else int(correct(logits, labels[rows])[: len(own)].sum())
    both = sum_over(torch.tensor([right, int(lost)], device=processes.device))
    return None if both[1] else (int(both[0]), len(labels))
