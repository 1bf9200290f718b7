"""All that a restart of a training needs, on disk whole or not at all; and the signals that ask for it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import InterruptedBySignalError, UserError
from configs.slurm import SIGNALS
from finetune.averages import Averages
from finetune.parallel import (
    gathered,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    spread_like,
)
from models.classifier import Network
from store.atomic import replacing


@dataclass
class Progress:
    """How far a training is. Chance is keyed by run, epoch, step and image, so there is no generator state."""

    step: int = 0  # steps taken
    epoch_loss: float = 0.0  # sum over the steps taken of the epoch that is not over
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl


@dataclass(frozen=True)
class Checkpoint:
    """The best weights of one kind so far (the ViT-G protocol, Appendix J.2.3)."""

    step: int  # after how many steps
    correct: int  # of the held-out images
    n: int
    weights: dict[str, Tensor]


@dataclass
class State:
    """A training between two steps."""

    model: Network
    optimizer: torch.optim.Optimizer
    averages: Averages
    scaler: torch.amp.GradScaler
    writes: bool  # whether this process is the one that keeps whole weights and writes them
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Checkpoint] = field(default_factory=dict)  # by kind of weights

    def collect(self) -> dict[str, Any]:
        """Everything, whole, on the CPU; all processes must call it."""
        averages = self.averages.tensors()
        return {
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "averages": {name: gathered(tensors, keep=self.writes) for name, tensors in averages.items()},
            "averaged": self.averages.taken,
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "best": {kind: vars(checkpoint) for kind, checkpoint in self.best.items()},
        }

    def save(self, path: Path) -> None:
        """Write everything; all processes must call it, one writes."""
        state = self.collect()
        if self.writes:
            with replacing(path) as temporary:
                torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a saved state; stay at the beginning where there is none.

        Raises:
            UserError: the file is damaged, or of another training; it is left as it is.
        """
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises anything from EOFError to UnpicklingError for a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"training state {path} is damaged ({reason}): delete the file to start this row anew"
            ) from None
        own = self.averages.tensors()
        try:
            if state["averages"].keys() != own.keys():
                raise KeyError("averages")
            load_model_state(self.model, state["model"])
            load_optimizer_state(self.model, self.optimizer, state["optimizer"])
            for name, tensors in own.items():
                for key, tensor in tensors.items():
                    tensor.copy_(spread_like(state["averages"][name][key], tensor))
            self.averages.taken = state["averaged"]
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
            self.best = {kind: Checkpoint(**values) for kind, values in state["best"].items()}
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"training state {path} is of another training ({type(error).__name__}: {error}): "
                "delete the file to start this row anew"
            ) from None


class Interruption:
    """Whether a signal has asked for an end; training looks between two steps."""

    signum: int | None = None

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Take SIGTERM and SIGUSR1 as a wish while the block lasts; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self) -> None:
        """Raise what the entry point turns into an exit status."""
        raise InterruptedBySignalError(self.signum or signal.SIGTERM)
