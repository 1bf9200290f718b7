"""The log of a training: speed, time left and share of the hardware's peak; progress on the terminal; curves at W&B."""

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import InterruptedBySignalError, UserError
from configs.schema import Experiment, dump
from soups.errors import first_line
from soups.files.atomic import digest_of
from store.runs import score_of

WINDOW = 100  # steps that "now" means
LOG_SECONDS = 30.0  # between two lines where there is no terminal
BACKWARD_TOO = 3  # the backward pass costs two forward passes: gradients of inputs and of weights
INIT_SECONDS = 60  # to reach W&B, before a row trains
FINISH_SECONDS = 120  # to send what is left, after it; the rest stays in the run's folder for `wandb sync`

Log = Callable[[dict[str, Any]], None]

# FLOP/s without sparsity, by words of the device's name; the first that fits. fp32 means without TF32. These are the
# vendors' figures from memory: check one in the data sheet before publishing an MFU.
PEAKS: dict[tuple[str, ...], dict[str, float]] = {
    ("V100", "PCIE"): {"fp32": 14.0e12, "fp16": 112e12},
    ("V100",): {"fp32": 15.7e12, "fp16": 125e12},
    ("T4",): {"fp32": 8.1e12, "fp16": 65e12},
    ("A100",): {"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12},
    ("A30",): {"fp32": 10.3e12, "bf16": 165e12, "fp16": 165e12},
    ("A40",): {"fp32": 37.4e12, "bf16": 149.7e12, "fp16": 149.7e12},
    ("A10",): {"fp32": 31.2e12, "bf16": 125e12, "fp16": 125e12},
    ("A10G",): {"fp32": 35e12, "bf16": 70e12, "fp16": 70e12},
    ("RTX", "A6000"): {"fp32": 38.7e12, "bf16": 154.8e12, "fp16": 154.8e12},
    ("RTX", "3090"): {"fp32": 35.6e12, "bf16": 71e12, "fp16": 71e12},
    ("RTX", "4090"): {"fp32": 82.6e12, "bf16": 165.2e12, "fp16": 165.2e12},
    ("L4",): {"fp32": 30.3e12, "bf16": 121e12, "fp16": 121e12},
    ("L40",): {"fp32": 90.5e12, "bf16": 181e12, "fp16": 181e12},
    ("L40S",): {"fp32": 91.6e12, "bf16": 362e12, "fp16": 362e12},
    ("H100", "PCIE"): {"fp32": 51.2e12, "bf16": 756e12, "fp16": 756e12},
    ("H100", "NVL"): {"fp32": 60e12, "bf16": 835.5e12, "fp16": 835.5e12},
    ("H100",): {"fp32": 66.9e12, "bf16": 989.4e12, "fp16": 989.4e12},
    ("H200", "NVL"): {"fp32": 60e12, "bf16": 835.5e12, "fp16": 835.5e12},
    ("H200",): {"fp32": 66.9e12, "bf16": 989.4e12, "fp16": 989.4e12},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of one device by its vendor, dense, in fp32, bf16 or fp16; None where that is not known.

    The name is that of torch.cuda.get_device_name. Convolutions in fp32 may run in TF32, and then beat this figure.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16") / 1e12
    989.4
    """
    words = set(re.split(r"[\s-]+", device_name.upper()))
    return next((peaks.get(precision) for named, peaks in PEAKS.items() if words.issuperset(named)), None)


def training_flops(model: nn.Module, example: Tensor) -> int | None:
    """FLOPs of training on an example: three times those of its forward pass, a multiplication and an addition being 2.

    None where the network needs values to know what to do: it sees tensors without any, of the example's shape. Matrix
    products, convolutions and attention count; what is computed again to save memory does not, and frozen parts count.
    The model is one before it is sharded or compiled.

    Source: Chowdhery et al. 2022 (PaLM), Appendix B.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    try:
        # Fake tensors, since transformers knows that their masks have no values to read.
        with FakeTensorMode(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
            # Two examples, since batch norms in training refuse one.
            inputs = torch.empty(2, *example.shape[1:], dtype=example.dtype)
            functional_call(model, shapes, (inputs,))
    except Exception:  # any kind: this number is only shown
        return None
    return BACKWARD_TOO * counter.get_total_flops() // 2


@dataclass
class Meter:
    """Examples a second, model FLOPs utilisation and the time that is left, from the times at which steps end.

    The first step sets the clock: it waits for the first batch, for compilation and for the choice of kernels.
    """

    total: int  # steps of the whole training
    first: int = 0  # steps taken before this process
    flops: float | None = None  # to train on an example
    peak: float | None = None  # FLOP/s of all devices together
    clock: Callable[[], float] = time.monotonic  # seconds
    taken: int = field(default=0, init=False)  # steps by this process
    _since: float | None = field(default=None, init=False)  # when the step that is going on began
    _paused: float = field(default=0.0, init=False)  # seconds of all pauses
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)

    def step(self, examples: int) -> None:
        """A step ended; `examples` of all processes were in it."""
        now = self.clock()
        if self._since is not None:
            self._recent.append((now - self._since, examples))
        self._since = now
        self.taken += 1

    def resume(self) -> None:
        """Leave out the time since the last step, which went into, say, an evaluation on held-out."""
        now = self.clock()
        if self._since is not None:
            self._paused += now - self._since
            self._since = now

    @property
    def examples_per_second(self) -> float | None:
        """Over the last steps, without pauses; None before there are two."""
        seconds = sum(took for took, _ in self._recent)
        return sum(examples for _, examples in self._recent) / seconds if seconds > 0 else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, a share of 1."""
        if self.examples_per_second is None or self.flops is None or self.peak is None:
            return None
        return self.examples_per_second * self.flops / self.peak

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the last steps, with pauses as often and as long as they were so far."""
        if not self._recent:
            return None
        a_step = sum(took for took, _ in self._recent) / len(self._recent) + self._paused / self.taken
        return a_step * (self.total - self.first - self.taken)

    def rates(self) -> dict[str, float]:
        """examples_per_second and mfu, as far as they are known."""
        known = {"examples_per_second": self.examples_per_second, "mfu": self.mfu}
        return {name: value for name, value in known.items() if value is not None}

    def described(self, loss: float) -> str:
        """The loss and all that is known, on one line."""
        parts = [f"loss {loss:.4g}"]
        if self.examples_per_second is not None:
            parts.append(f"{self.examples_per_second:,.0f} examples/s")
        if self.mfu is not None:
            parts.append(f"MFU {100 * self.mfu:.1f} %")
        if self.seconds_left is not None:
            parts.append(f"{timedelta(seconds=round(self.seconds_left))} left")
        return ", ".join(parts)


@contextmanager
def show_progress(meter: Meter, title: str, console: Console | None) -> Iterator[Callable[[int, float], None]]:
    """Yield a function to call with the number of steps taken and the loss after each step.

    On a terminal it moves a bar, elsewhere it prints a line every 30 seconds and one at the end.
    """
    if console is None:
        yield lambda step, loss: None
        return
    started = printed = meter.clock()
    unprinted: tuple[int, float] | None = None

    def elapsed() -> timedelta:
        return timedelta(seconds=round(meter.clock() - started))

    if console.is_terminal:
        # Only the bar gives way where the terminal is narrow, since it says no more than the counts.
        columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", "{task.fields[described]}")
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=meter.total, completed=meter.first, described="")
            yield lambda step, loss: bar.update(task, completed=step, described=f"{elapsed()}, {meter.described(loss)}")
        return

    def print_line(step: int, loss: float) -> None:
        text = f"{title}: step {step} of {meter.total} after {elapsed()}, {meter.described(loss)}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def after_step(step: int, loss: float) -> None:
        nonlocal printed, unprinted
        unprinted = (step, loss)
        if meter.clock() - printed >= LOG_SECONDS:
            print_line(step, loss)
            printed, unprinted = meter.clock(), None

    try:
        yield after_step
    finally:
        if unprinted is not None:
            print_line(*unprinted)


def untracked(metrics: dict[str, Any]) -> None:
    """Send the metrics nowhere."""


def run_id(config: Experiment, row: int) -> str:
    """32 hex digits, the same whenever this row is started again, so that its curves continue."""
    return digest_of([config.name, str(config.paths.runs.resolve()), row])


def curves(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl as points of named curves over "step"; a value of None is left out.

    >>> curves({"step": 3, "loss": 0.5, "lr": 0.1, "mfu": None})
    {'step': 3, 'train/loss': 0.5, 'train/lr': 0.1}
    >>> curves({"epoch": 1, "step": 3, "loss": 0.5, "lr": 0.1})
    {'step': 3, 'train/epoch': 1, 'train/epoch_loss': 0.5, 'train/lr': 0.1}
    >>> curves({"step": 3, "weights": "ema_0.999", "held_out_correct": 3, "held_out_n": 4})
    {'step': 3, 'held_out/ema_0.999': 0.75}
    """
    values = {name: value for name, value in metrics.items() if value is not None}
    points = {"step": values.pop("step")}
    if "weights" in values:
        return points | {f"held_out/{values['weights']}": values["held_out_correct"] / values["held_out_n"]}
    names = {"loss": "epoch_loss"} if "epoch" in values else {}
    return points | {f"train/{names.get(name, name)}": value for name, value in values.items()}


@contextmanager
def tracked(config: Experiment, row: int, drawn: Mapping[str, Any], folder: Path) -> Iterator[Log]:
    """Yield a function that sends a row of metrics to W&B, and does nothing where nothing is tracked.

    A row is a run of W&B with the row's own settings and what it has `drawn`, the experiment its group. What is logged
    last, the row's done.json, becomes the summary. A failure after the start is said once and ends the tracking alone.

    Raises:
        UserError: W&B cannot be reached, or nobody is logged in.
    """
    if config.tracking.kind == "none":
        yield untracked
        return
    run, is_broken, status = _start(config, row, drawn, folder), False, 1

    def send(metrics: dict[str, Any]) -> None:
        if "status" in metrics:
            run.summary.update(scores(metrics))
        else:
            run.log(curves(metrics))

    def attempt(call: Callable[..., None], *arguments: Any) -> None:
        nonlocal is_broken
        try:
            if not is_broken:
                call(*arguments)
        except Exception as error:  # any kind: the service is another process, which may end or fall silent
            is_broken = True
            print(f"row {row}: W&B failed ({error}); training goes on without it", file=sys.stderr)

    try:
        yield partial(attempt, send)
        status = 0
    except InterruptedBySignalError:
        attempt(run.mark_preempting)
        raise
    finally:
        attempt(run.finish, status)
        if is_broken:
            _forget()


def scores(done: Mapping[str, Any]) -> dict[str, Any]:
    """The scores in a row's done.json, as columns of W&B's table of runs.

    >>> scores({"status": "done", "ingredient": "raw", "held_out": {"correct": 3, "n": 4}, "seconds": 9.5,
    ...         "variants": {"swa": {"held_out": {"correct": 1, "n": 4, "score": 0.2}}}})
    {'status': 'done', 'seconds': 9.5, 'final/held_out/raw': 0.75, 'final/held_out/swa': 0.2}
    """
    found = {"status": done["status"], "seconds": done["seconds"]}
    if done["status"] != "done":
        return found
    kinds = {done["ingredient"]: done} | done["variants"]
    return found | {f"final/held_out/{kind}": score_of(each["held_out"]) for kind, each in kinds.items()}


def _start(config: Experiment, row: int, drawn: Mapping[str, Any], folder: Path) -> Any:
    import wandb  # noqa: PLC0415  # takes a second, and only some experiments use it

    tracking = config.tracking
    quiet = {"silent": True, "console": "off"}  # no lines between ours, and no copy of ours at W&B
    settings = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS, "disable_code": True}
    try:
        wandb.setup(wandb.Settings(**quiet))
        # It would ask on a terminal, which nobody may be looking at, and go on without tracking.
        if tracking.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.errors.UsageError("nobody is logged in")
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            mode=tracking.mode,
            group=config.name,
            name=f"row {row:03d}",
            id=run_id(config, row),
            resume="allow",
            config=dump(config) | {"drawn": dict(drawn)},
            dir=folder,
            save_code=False,
            settings=wandb.Settings(**quiet, **settings),
        )
        # W&B counts calls of log; after a restart, or with several points at a step, only our own count is right.
        run.define_metric("step", hidden=True)
        for curve in ("train/*", "held_out/*"):
            run.define_metric(curve, step_metric="step")
    except Exception as error:
        _forget()
        raise UserError(
            f"W&B cannot track row {row} ({first_line(error)}): run `wandb login` on a machine with internet, "
            "or set tracking.mode=offline and send the run later (docs/training.md)"
        ) from None
    return run


def _forget() -> None:
    """Let the next run of this process start a service of its own."""
    import wandb  # noqa: PLC0415

    with suppress(Exception):
        wandb.teardown(exit_code=1)
