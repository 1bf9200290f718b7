"""Weights & Biases: the curves of a row while it trains, beside its metrics.jsonl."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from configs.errors import InterruptedBySignalError, UserError
from configs.schema import Experiment, dump
from store.runs import digest_of

INIT_SECONDS = 60  # to reach W&B, before a row trains
FINISH_SECONDS = 120  # to send what is left, after it; the rest stays in the run's folder for `wandb sync`

Log = Callable[[dict[str, Any]], None]


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
    """Yield what takes each row of metrics while a row trains; it does nothing where nothing is tracked.

    A row is a run of W&B, the experiment is its group. W&B's own files stand in folder/wandb. A failure after the
    start is said once on stderr and ends the tracking, never the training.

    Args:
        config: of the experiment or of the row.
        row: which.
        drawn: what is the row's own, by dotted field name; columns of W&B's table.
        folder: the row's, which nobody else writes to.

    Raises:
        UserError: W&B cannot be reached, or nobody is logged in.
    """
    if config.tracking.kind == "none":
        yield lambda metrics: None
        return
    run: Any = _start(config, row, drawn, folder)
    broken: list[Exception] = []

    def tell(send: Callable[[], None]) -> None:
        # Anything: the service is another process, whose end or silence shows as many kinds of error.
        try:
            if not broken:
                send()
        except Exception as error:
            broken.append(error)
            print(f"row {row}: W&B failed ({error}); training goes on without it", file=sys.stderr)

    status = 1
    try:
        yield lambda metrics: tell(lambda: run.log(curves(metrics)))
        status = 0
    except InterruptedBySignalError:
        tell(run.mark_preempting)
        raise
    finally:
        tell(lambda: run.finish(status))
        if broken:
            _forget()


def _start(config: Experiment, row: int, drawn: Mapping[str, Any], folder: Path) -> Any:
    """The run, with its curves over the training step."""
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"W&B cannot track row {row} ({reason}): run `wandb login` on a machine with internet, "
            "or set tracking.mode=offline and send the run later with `wandb sync`"
        ) from None
    return run


def _forget() -> None:
    """Let the next run of this process start a service of its own."""
    import wandb  # noqa: PLC0415

    with suppress(Exception):
        wandb.teardown(exit_code=1)
