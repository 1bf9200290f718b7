"""The average along a run of transformers' Trainer."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from soups.api import weighted
from soups.errors import UserError
from soups.files.atomic import replacing
from soups.files.folders import natural
from soups.files.weights import save_weights
from soups.running import RunningMean, Schedule, sample_of

AVERAGE = "average"  # a folder in output_dir and in each checkpoint
SUMS = "running_sums.safetensors"  # in the folder of a checkpoint


class TrainerAverage(TrainerCallback):
    """Averages the weights of a run: `Trainer(..., callbacks=[TrainerAverage(every=10, start=500)])`.

    When training ends, the average is in `output_dir/average`, a folder that `from_pretrained` loads. Each checkpoint
    has the average so far in its own folder `average`, with the sums, 12 bytes for a float32 parameter in all, from
    which `resume_from_checkpoint` continues: killed and resumed, a run has the average of an undisturbed one, to the
    bit. With `last=N` nothing is kept but the checkpoints, which are averaged at the end. Settings are those of
    `soups.running.Schedule`. Of several processes that each hold the whole model (DDP) the first keeps the average.

    Raises:
        UserError: before the first step, settings that average no step, models that are sharded, adapters, and
            a checkpoint to resume from that has no average, or one of other weights.
    """

    def __init__(self, kind: str = "uniform", *, every: Any = 10, start: int = 0, last: int | None = None):
        self.schedule = Schedule(kind, every, start, last)
        self.mean, self.saved = RunningMean(self.schedule), list[Path]()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin, or continue from the checkpoint that the Trainer resumes from."""
        self._refuse(args, state, model)
        self.mean, self.saved = RunningMean(self.schedule), []
        if state.global_step:
            folder = Path(args.output_dir)
            found = sorted(folder.glob("checkpoint-*"), key=lambda path: natural(path.name))
            self.saved = [path for path in found if _step(path) <= state.global_step]
            checkpoint = folder / f"checkpoint-{state.global_step}"
            file = checkpoint / AVERAGE / SUMS
            if not file.exists():
                self.schedule.refuse_lost(state.global_step, str(checkpoint))
            elif self.schedule.last is None:
                self._continue(file, model, keep=state.is_world_process_zero)

    def _refuse(self, args: Any, state: Any, model: Any) -> None:
        """Before the first step, what cannot be averaged."""
        if args.fsdp or args.deepspeed:
            raise UserError("FSDP and DeepSpeed shard the model: average its checkpoints with `soups uniform` instead")
        if hasattr(model, "peft_config"):
            raise UserError(
                "the mean of LoRA factors is not that of updates: type `soups lora checkpoint-* --last N --out DIR`"
            )
        if state.is_hyper_param_search:
            raise UserError("a search of hyperparameters has a run for each trial: average the best one's alone")
        limit, last = args.save_total_limit, self.schedule.last
        if last is not None and limit is not None and limit <= last:
            raise UserError(f"last={last} and save_total_limit={limit}: keep {last + 1}, since one may be the best")
        self.schedule.refuse_idle(state.max_steps)

    def _continue(self, file: Path, model: Any, *, keep: bool) -> None:
        """Go on with the sums of a checkpoint; where others keep them, only look whether all of them would do so."""
        try:
            with safe_open(file, "pt") as stored:
                sums = {name: stored.get_tensor(name) for name in stored.keys()} if keep else {}  # noqa: SIM118
                facts = json.loads(stored.metadata()["running"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}): resume from another checkpoint") from None
        mean = RunningMean(self.schedule)
        mean.restore(facts, sums, str(file))
        if facts.get("beside") not in (None, sample_of(model.state_dict())):  # None: of an earlier version
            raise UserError(
                f"{file} was saved beside other weights than this checkpoint has now (a process killed while it saves "
                "over an older checkpoint leaves that): resume from another one"
            )
        self.mean = mean if keep else self.mean

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take in the weights after a step that is averaged; the first process alone."""
        if state.is_world_process_zero and self.schedule.due(state.global_step - 1, state.global_step):
            self.mean.update(model.state_dict())

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put the average so far and its sums into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero:
            return
        if folder not in self.saved:  # the end of an epoch may save a step again
            self.saved.append(folder)
            if self.schedule.saved(state.global_step):
                self.mean.update(model.state_dict())
        if self.mean.taken:
            self._write(folder / AVERAGE, model, kwargs.get("processing_class"), sums=True)

    def _write(self, out: Path, model: Any, tokenizer: Any, *, sums: bool) -> None:
        weights = self.mean.weights(model.state_dict())
        with replacing(out, folder=True) as folder:
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(folder, state_dict=weights)
            else:  # a module of torch, whose checkpoints have its weights alone
                save_weights(folder / "model.safetensors", weights)
            if hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(folder)
            if sums:
                facts = {**self.mean.facts, "beside": sample_of(model.state_dict())}
                save_file(self.mean.sums, folder / SUMS, {"running": json.dumps(facts)})
            shutil.rmtree(out, ignore_errors=True)  # of an earlier run

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write output_dir/average."""
        if not state.is_world_process_zero:
            return
        out, last = Path(args.output_dir) / AVERAGE, self.schedule.last
        if self.mean.taken:
            self._write(out, model, kwargs.get("processing_class"), sums=False)
        files = self.saved[-last:] if last else []
        if files:
            new = out.with_name(f".{AVERAGE}-new")
            shutil.rmtree(new, ignore_errors=True)
            weighted(files, self.schedule.kind, allow_unrelated=True).save(new)
            shutil.rmtree(out, ignore_errors=True)
            new.rename(out)
        if len(files) < (last or 0) or not (files or self.mean.taken):
            what = f"of {len(files)} checkpoints, which are all there are" if files else "none: no checkpoint was saved"
            warnings.warn(f"the average in {out} is {what}", stacklevel=2)


def _step(checkpoint: Path) -> float:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else float("inf")
