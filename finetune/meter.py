"""How fast a training is, how long it will take, and what share of the hardware it uses."""

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

WINDOW = 100  # steps that "now" means
LOG_SECONDS = 30.0  # between two lines where there is no terminal
BACKWARD_TOO = 3  # the backward pass costs two forward passes: gradients of inputs and of weights

# FLOP/s without sparsity, by words of the device's name; the first that fits. fp32 means without TF32. From memory of
# the vendors' data sheets, which were not opened for this table: check a figure there before publishing an MFU.
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
    """FLOP/s of one device by its vendor, dense; None where it is not known or the device has not that precision.

    Convolutions in fp32 may run in TF32, as cuDNN does unless told not to, and then beat this figure.

    Args:
        device_name: as torch.cuda.get_device_name says it.
        precision: fp32, bf16 or fp16.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16") / 1e12
    989.4
    """
    words = set(re.split(r"[\s-]+", device_name.upper()))
    return next((peaks.get(precision) for named, peaks in PEAKS.items() if words.issuperset(named)), None)


def training_flops(model: nn.Module, example: Tensor) -> int | None:
    """FLOPs of training on an example: three times those of its forward pass, a multiplication and an addition being 2.

    Nothing is computed: the network sees tensors that have a shape and no values. Matrix products, convolutions and
    attention count; what is computed again to save memory does not, nor do frozen parts count less.

    Args:
        model: before it is sharded or compiled. It stays as it is.
        example: (1, 3, S, S) or (1, L), of which only shape and type count.

    Returns:
        None where the network needs values to know what to do.

    Source: Chowdhery et al. 2022 (PaLM), Appendix B.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    try:
        # Fake tensors: of these transformers knows that a mask has no values to look at.
        with FakeTensorMode(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
            # Two examples, since batch norms in training refuse one.
            inputs = torch.empty(2, *example.shape[1:], dtype=example.dtype)
            functional_call(model, shapes, (inputs,))
    except Exception:  # of whatever kind: this is a number to look at
        return None
    return BACKWARD_TOO * counter.get_total_flops() // 2


@dataclass
class Meter:
    """Told of each step, it knows examples a second, the share of the peak, and the time that is left.

    The first step sets the clock: it waits for the first batch, for compilation and for the choice of kernels.
    """

    total: int  # steps of the whole training
    first: int = 0  # steps taken before this process
    flops: float | None = None  # of training on an image
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
        """What was done since the last step was no training but, say, a look at held-out."""
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
        """What is known of examples_per_second and mfu, by these names."""
        known = {"examples_per_second": self.examples_per_second, "mfu": self.mfu}
        return {name: value for name, value in known.items() if value is not None}


@contextmanager
def progress(meter: Meter, title: str, console: Console) -> Iterator[Callable[[int, float], None]]:
    """Yield what is told the number of steps taken and the loss after each step.

    On a terminal this is a bar, elsewhere a line every 30 seconds and one at the end.
    """
    started = meter.clock()

    def elapsed() -> str:
        return _clock_time(meter.clock() - started)

    def told(loss: float) -> str:
        parts = [f"loss {loss:.4g}"]
        if meter.examples_per_second is not None:
            parts.append(f"{meter.examples_per_second:,.0f} examples/s")
        if meter.mfu is not None:
            parts.append(f"MFU {100 * meter.mfu:.1f} %")
        if meter.seconds_left is not None:
            parts.append(f"{_clock_time(meter.seconds_left)} left")
        return ", ".join(parts)

    if console.is_terminal:
        # Only the bar gives way where the terminal is narrow, since it says no more than the counts.
        columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", "{task.fields[told]}")
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=meter.total, completed=meter.first, told="")
            yield lambda step, loss: bar.update(task, completed=step, told=f"{elapsed()}, {told(loss)}")
        return

    printed, line = started, None

    def tell(step: int, loss: float) -> None:
        nonlocal printed, line
        line = (step, loss)
        if meter.clock() - printed >= LOG_SECONDS:
            show(*line)
            printed, line = meter.clock(), None

    def show(step: int, loss: float) -> None:
        text = f"{title}: step {step} of {meter.total} after {elapsed()}, {told(loss)}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    try:
        yield tell
    finally:
        if line is not None:
            show(*line)


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
