"""The mean of a model's weights along one training run, kept as float64 sums while it trains.

A sum costs 8 bytes a parameter, whatever the number of steps. It is divided and rounded once: the mean of a run's
checkpoints is that of `soups uniform` of their files. The mean of the last n is made of their files at the end.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from soups.along import factors
from soups.average import rounded
from soups.errors import UserError
from soups.files.checkpoints import BLOCK, SAMPLE
from soups.files.weights import tied_names


@dataclass(frozen=True)
class Schedule:
    """Which weights of a run are averaged, and how.

    Args:
        kind: "uniform", "1-sqrt" or "ema:DECAY", as `soups.along.factors` explains.
        every: so many steps, counted from `start`; or "checkpoint", whenever a checkpoint is saved.
        start: the first step that may be averaged; steps are counted from 1, as trainers do.
        last: the mean of so many checkpoints, the last of the run; `every` is "checkpoint" then.
    """

    kind: str = "uniform"
    every: int | Literal["checkpoint"] = 10
    start: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        factors(self.kind, 0)
        if self.every != "checkpoint" and not (isinstance(self.every, int) and self.every > 0):
            raise UserError(f'every={self.every!r}: write a number of steps, or "checkpoint"')
        if self.start < 0 or (self.last is not None and self.last < 1):
            raise UserError(f"start={self.start}, last={self.last}: start is at least 0, last at least 1")
        if self.last is not None and (self.every != "checkpoint" or self.start):
            raise UserError('last=N is the mean of the last N checkpoints: write every="checkpoint", and no start')

    def due(self, before: int, step: int) -> bool:
        """Whether the weights after `step` are averaged, where the last look was after step `before`."""
        if self.every == "checkpoint" or step < self.start:
            return False
        return (step - self.start) // self.every > (before - self.start) // self.every

    def saved(self, step: int) -> bool:
        """Whether the weights of the checkpoint of a step are averaged."""
        return self.every == "checkpoint" and self.last is None and step >= self.start

    def refuse_lost(self, step: int, where: str) -> None:
        """A UserError where a run resumes after the average had begun, and has none."""
        if self.due(0, step) or self.saved(step):
            raise UserError(
                f"{where} has no running average, which was to begin before step {step}: resume from a checkpoint that "
                f"has one (a process killed while it saves leaves one without), or begin here, with start={step + 1}"
            )

    def refuse_idle(self, steps: int) -> None:
        """A UserError where none of so many steps is averaged."""
        if self.every != "checkpoint" and steps > 0 and not self.due(0, steps):
            raise UserError(f"none of {steps} steps is averaged: start={self.start}, every={self.every}")


def sample_of(state: Mapping[str, Any]) -> str:
    """Tells the weights of one step from those of another: a hash of the first bytes of each tensor of a state dict."""
    running = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, Tensor):
            first = tensor.detach().reshape(-1)[: SAMPLE // tensor.itemsize].cpu()
            running.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            running.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    return running.hexdigest()


@dataclass
class RunningMean:
    """A weighted mean of some states of one model."""

    schedule: Schedule
    taken: int = 0  # number of states
    total: float = 0.0  # of their weights
    sums: dict[str, Tensor] = field(default_factory=dict)  # float64, of tied tensors one

    @property
    def facts(self) -> dict[str, Any]:
        """What is kept beside the sums."""
        return {"schedule": asdict(self.schedule), "taken": self.taken, "total": self.total}

    def restore(self, facts: Mapping[str, Any], sums: Mapping[str, Tensor], where: str) -> None:
        """Continue from what was kept; a UserError where it was begun with other settings."""
        if facts["schedule"] != asdict(self.schedule):
            begun = ", ".join(f"{name}={value!r}" for name, value in facts["schedule"].items())
            raise UserError(f"{where}: its running average was begun with {begun}: resume with the same settings")
        self.taken, self.total, self.sums = facts["taken"], facts["total"], dict(sums)

    @torch.no_grad()
    def update(self, state: Mapping[str, Any]) -> None:
        """Take in the weights of a state dict; what is not floating point is no part of the mean."""
        kept, added = factors(self.schedule.kind, self.taken)
        tensors = {name: tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor)}
        ties = tied_names(tensors)
        floats = {name: t for name, t in tensors.items() if t.is_floating_point() and name not in ties}
        shapes = {name: tensor.shape for name, tensor in self.sums.items()}
        if self.taken and shapes != {name: tensor.shape for name, tensor in floats.items()}:
            raise UserError("the model has other tensors than the one whose running average was begun")
        buffer = torch.empty(BLOCK, dtype=torch.float64)
        for name, tensor in floats.items():
            if isinstance(tensor, DTensor):
                raise UserError(f"tensor {name!r} is sharded: average the checkpoints with `soups uniform` instead")
            place = torch.device("cpu") if tensor.device.type == "mps" else tensor.device  # which has no float64
            if not self.taken:
                self.sums[name] = torch.zeros(tensor.shape, dtype=torch.float64, device=place)
            self.sums[name] = self.sums[name].to(place)  # from a file it is in host memory
            _add(self.sums[name].view(-1), tensor.to(place).reshape(-1), kept, added, buffer)
        self.taken, self.total = self.taken + 1, kept * self.total + added

    def weights(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict with the mean in place of its weights, in their kinds; tied tensors share memory."""
        tensors = {name: tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor)}
        ties, means = tied_names(tensors), {}
        for name, total in self.sums.items():
            means[name] = rounded(total / self.total, tensors[name].dtype).to(tensors[name].device)
            if not (means[name].isfinite() | (means[name] == tensors[name])).all():
                raise UserError(f"the running average of tensor {name!r} holds NaN or infinity, as the training did")
        return {name: means.get(ties.get(name, name), tensor) for name, tensor in state.items()}


def _add(total: Tensor, tensor: Tensor, kept: float, added: float, buffer: Tensor) -> None:
    """total <- kept x total + added x tensor, both flat, in float64."""
    on_host = total.device.type == "cpu"  # a device widens as it adds; on the host torch would make a wide copy
    for start in range(0, len(total), BLOCK if on_host else max(1, len(total))):
        block = total[start : start + BLOCK] if on_host else total
        wide = buffer[: len(block)].copy_(tensor[start : start + BLOCK]) if on_host else tensor
        if kept != 1:
            block.mul_(kept)
        block.add_(wide, alpha=added)
