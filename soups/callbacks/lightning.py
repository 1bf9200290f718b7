"""The average along a run of Lightning."""

import warnings
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from soups.along import in_time_order
from soups.api import weighted
from soups.errors import UserError
from soups.running import RunningMean, Schedule

library: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning")
WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}  # strategies with which each process has all of the model


class LightningAverage(library.Callback):
    """Averages the weights of a run: `Trainer(callbacks=[LightningAverage(every=10, start=500)])`.

    When training ends, the average is in `out`, which `load_from_checkpoint` loads; average.ckpt in `default_root_dir`
    if left out. Checkpoints have the sums, 8 bytes a parameter, from which `fit(ckpt_path=...)` continues: killed and
    resumed, a run has the average of an undisturbed one, to the bit. `kind`, `every`, `start` and `last` are those of
    `soups.running.Schedule`. With `last=N` nothing is kept but the checkpoints of the first ModelCheckpoint's folder,
    which are averaged at the end, by the numbers in their names and without last.ckpt; keep them: save_top_k=-1.

    Raises:
        UserError: before the first step, settings that average no step, models that are sharded, and a checkpoint
            to resume from that has no average.
    """

    def __init__(
        self,
        kind: str = "uniform",
        *,
        every: Any = 10,
        start: int = 0,
        last: int | None = None,
        out: str | Path | None = None,
    ):
        self.schedule, self.out = Schedule(kind, every, start, last), out
        self.mean, self.step, self.saved = RunningMean(self.schedule), 0, 0  # steps: of the last look, the last save

    @property
    def state_key(self) -> str:
        """Tells several averages of one run apart."""
        return f"soups.{type(self).__name__}{self.schedule}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be averaged, before a checkpoint is loaded; a second `fit` goes on with the average."""
        kind = type(trainer.strategy)
        if not WHOLE & {each.__name__ for each in kind.__mro__}:
            raise UserError(
                f"{kind.__name__} may shard the model: average its checkpoints with `soups uniform` instead"
            )
        if stage == "fit" and trainer.global_step == 0:
            self.schedule.refuse_idle(trainer.max_steps)
            self.mean = RunningMean(self.schedule)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or continue from the checkpoint that was loaded."""
        self.step = self.saved = trainer.global_step
        if self.step and trainer.is_global_zero and not self.mean.taken:
            self.schedule.refuse_lost(self.step, str(trainer.ckpt_path or "the run that is continued"))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Take in the weights after a step that is averaged; batches whose gradients are accumulated are no steps."""
        before, self.step = self.step, trainer.global_step
        if trainer.is_global_zero and self.schedule.due(before, self.step):
            self.mean.update(pl_module.state_dict())

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the sums into the checkpoint; in lists, so that nobody takes them for weights of another network."""
        before, self.saved = self.saved, trainer.global_step
        if trainer.is_global_zero and self.saved > before and self.schedule.saved(self.saved):
            self.mean.update(pl_module.state_dict())
        sums = {"names": list(self.mean.sums), "sums": list(self.mean.sums.values())}
        checkpoint[self.state_key] = {**self.mean.facts, **sums}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Continue with the sums of a checkpoint."""
        kept = checkpoint.get(self.state_key)
        if kept is not None and trainer.is_global_zero:
            self.mean.restore(kept, dict(zip(kept["names"], kept["sums"], strict=True)), str(trainer.ckpt_path))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the average; the module keeps the weights that it was trained to."""
        out = Path(self.out or Path(trainer.default_root_dir) / "average.ckpt")
        weights = self._weights(trainer, pl_module) if trainer.is_global_zero else None
        if not trainer.strategy.broadcast(weights is not None):
            warnings.warn(f"there is no average for {out}: no checkpoint was saved", stacklevel=2)
            return
        trained = {name: deepcopy(value) for name, value in pl_module.state_dict().items()}
        new = out.with_name(f".{out.stem}.new.ckpt")
        try:
            pl_module.load_state_dict(weights or trained)
            trainer.save_checkpoint(new, weights_only=True)
        finally:
            pl_module.load_state_dict(trained)
        if trainer.is_global_zero:
            new.replace(out)

    def _weights(self, trainer: Any, pl_module: Any) -> dict[str, Any] | None:
        """The average as a state dict of the module; None where nothing is averaged."""
        if self.schedule.last is None:
            return self.mean.weights(pl_module.state_dict()) if self.mean.taken else None
        folder = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or "")
        files = in_time_order([path for path in folder.glob("*.ckpt") if not path.name.startswith(("last", "."))])
        files = files[-self.schedule.last :]
        if 0 < len(files) < self.schedule.last:
            warnings.warn(f"{folder} has but {len(files)} checkpoints: save_top_k=-1 keeps all", stacklevel=2)
        with TemporaryDirectory() as place:
            made = Path(place) / "average.ckpt"  # with the names that the files have
            if files:
                weighted(files, self.schedule.kind, key="state_dict", allow_unrelated=True).save(made)
            return torch.load(made, weights_only=True)["state_dict"] if files else None
