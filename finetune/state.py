"""All that a restart of a training needs, on disk whole or not at all; and the signals that ask for it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from configs.errors import InterruptedBySignalError, UserError
from configs.slurm import SIGNALS
from finetune.averages import Averages
from finetune.dist import gathered, spread
from models.classifier import Network
from soups.errors import first_line
from soups.files.atomic import replacing
from store.processes import Processes, first_decides

Place = tuple[str, ...]  # names a tensor in the file: what training changes, and its names there


@dataclass
class Progress:
    """How far a training is. Chance is keyed by run, epoch, step and image, so there is no generator state."""

    step: int = 0  # steps taken
    epoch_loss: float = 0.0  # sum over the steps taken of the epoch that is not over
    seconds: float = 0.0  # that all processes so far have trained, until the last of them saved
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl


@dataclass(frozen=True)
class Checkpoint:
    """The best weights of one kind so far (the ViT-G protocol, Appendix J.2.3)."""

    step: int  # after how many steps
    correct: int  # right answers on held-out
    n: int
    weights: dict[str, Tensor]  # whole, on the first process alone


@dataclass
class State:
    """A training between two steps."""

    model: Network
    optimizer: torch.optim.Optimizer
    averages: Averages
    scaler: torch.amp.GradScaler
    processes: Processes  # the first one writes and reads whole tensors, the others have their parts
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Checkpoint] = field(default_factory=dict)  # by kind of weights
    earlier: float = 0.0  # seconds of the processes before this one
    saved: float = field(default_factory=time.monotonic)  # when `progress.seconds` was last brought up to date

    def tensors(self) -> dict[Place, Tensor]:
        """All tensors that training changes, by their place in the file, as this process has them; all must ask."""
        found: dict[Place, Tensor] = {("model", name): tensor for name, tensor in self.model.state_dict().items()}
        optimizer: Any = get_optimizer_state_dict(self.model, self.optimizer)["state"]
        for name, moments in optimizer.items():
            for key, each in moments.items():
                if isinstance(each, Tensor):  # not a momentum of None
                    found["optimizer", name, key] = each
        for kind, average in self.averages.tensors().items():
            for name, tensor in average.items():
                found["averages", kind, name] = tensor
        return found

    def save(self, path: Path) -> None:
        """Write everything; all processes must call it, one writes, and the others wait until it has."""
        now = time.monotonic()
        self.progress.seconds += now - self.saved
        self.saved = now
        state = {
            "tensors": gathered(self.tensors(), keep=self.processes.is_main),
            "averaged": self.averages.taken,
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "best": {kind: vars(checkpoint) for kind, checkpoint in self.best.items()},
        }
        first_decides(lambda: _write(path, state), self.processes)

    def load(self, path: Path) -> None:
        """Continue from a saved state, if there is one; the first process reads, all must call it.

        Raises:
            UserError: the file is damaged, or of another training; it is left as it is.
        """
        state: dict[str, Any] = {}
        if not first_decides(lambda: _read_into(state, path), self.processes):
            return
        targets = self.tensors()
        rest = first_decides(lambda: _checked(path, state, targets), self.processes)
        parameters = dict(self.model.named_parameters())
        for *_, name in rest["unused"]:  # by the forward pass, so that the optimiser has seen no gradient of it
            del self.optimizer.state[parameters[name]]
        known = {place: tensor for place, tensor in targets.items() if place[:-1] not in rest["unused"]}
        spread(state.get("tensors", {}), known, self.processes)
        self.averages.taken = rest["averaged"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(rest["scaler"])
        self.progress = Progress(**rest["progress"])
        self.earlier = self.progress.seconds
        for kind, values in rest["best"].items():
            weights = state["best"][kind]["weights"] if self.processes.is_main else {}
            self.best[kind] = Checkpoint(weights={name: tensor.clone() for name, tensor in weights.items()}, **values)


def _write(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _read_into(state: dict[str, Any], path: Path) -> bool:
    """Whether there is a saved state; its tensors stay on the disk until they are read."""
    if not path.exists():
        return False
    try:
        state |= torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError for a damaged file
        raise UserError(
            f"training state {path} is damaged ({first_line(error)}): delete the file to start this row anew"
        ) from None
    return True


def _checked(path: Path, state: dict[str, Any], targets: dict[Place, Tensor]) -> dict[str, Any]:
    """All that a saved state holds beside the tensors in `targets`, and the places of parameters without moments."""
    try:
        saved = state["tensors"]
        with_moments = {place[:-1] for place in saved}
        unused = {place[:-1] for place in targets if place[0] == "optimizer"} - with_moments
        needed = {place: tensor for place, tensor in targets.items() if place[:-1] not in unused}
        for place in sorted(saved.keys() ^ needed.keys()):
            raise ValueError(f"{' '.join(place)} is {'new' if place in needed else 'unknown'}")
        for place, tensor in needed.items():
            if saved[place].shape != tensor.shape:
                raise ValueError(f"{' '.join(place)} is {tuple(saved[place].shape)}, not {tuple(tensor.shape)}")
        best = {
            kind: {name: value for name, value in checkpoint.items() if name != "weights"}
            for kind, checkpoint in state["best"].items()
        }
        Progress(**state["progress"])
        return {name: state[name] for name in ("averaged", "scaler", "progress")} | {"best": best, "unused": unused}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"training state {path} is of another training ({type(error).__name__}: {error}): "
            "delete the file to start this row anew"
        ) from None


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGUSR1, which ask for an end, while the block lasts; only the main thread can."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, lambda signum, frame: came.append(signum)) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_if(came: list[int]) -> None:
    """Raise the error that the entry point turns into an exit status, if a signal came."""
    if came:
        raise InterruptedBySignalError(came[-1])
