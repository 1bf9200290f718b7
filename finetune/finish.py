"""How a model's folder ends: weights on disk, then scores on held-out by all processes, and done.json last."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import Experiment
from configs.slurm import this_job
from eval.forward import Evaluator
from soups.files.atomic import write_json
from soups.files.weights import save_weights
from store.processes import Processes, first_decides
from store.provenance import provenance
from store.runs import DONE, RAW, TRAINED, finished, sole_writer


@contextmanager
def sole_writers(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold a folder for the processes that write it together, of which the first has the lock; raises in all."""
    with ExitStack() as held:
        first_decides(lambda: held.enter_context(sole_writer(folder)), processes)
        yield


def save_trained(
    config: Experiment, folder: Path, base: dict[str, Any], started: float, kinds: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """Write a model's weights, then trained.json, from which a restart goes on without training again; returns that.

    `base` is what done.json says beside weights and scores, `started` when this process began, by the monotonic clock.
    Of the state dicts in `kinds` the row's ingredient becomes weights.safetensors; a diverged model has none.
    """
    ingredient = config.regularizer.ingredient if base["row"] else RAW
    digests = {kind: save_weights(_file(folder, kind, ingredient), weights) for kind, weights in kinds.items()}
    trained = base | {
        "ingredient": ingredient,
        "digests": digests,
        "seconds": base.get("seconds", 0.0) + time.monotonic() - started,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    job = this_job()
    trained |= {"slurm": asdict(job)} if job else {}
    write_json(folder / TRAINED, trained)
    (folder / "state.pt").unlink(missing_ok=True)
    return trained


def _file(folder: Path, kind: str, ingredient: str) -> Path:
    return folder / f"{'weights' if kind == ingredient else kind}.safetensors"


def score(config: Experiment, folder: Path, trained: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """Score a model's weights on held-out, by all processes together, and write done.json last, which is returned.

    A diverged model, or one with NaN among its logits, has no score: its row counts as tried, and recipes leave it out.
    """
    started, split, ingredient = time.monotonic(), config.task.held_out, trained["ingredient"]
    evaluator = Evaluator(config, processes)
    n = len(evaluator.split(split).labels)
    scores: dict[str, dict[str, Any]] = {}
    for kind, digest in trained["digests"].items():
        logits = evaluator.logits_of_file(digest, _file(folder, kind, ingredient), split)
        if logits.isnan().any():  # the weights are numbers, but too large to compute with
            scores, trained = {}, trained | {"status": "diverged"}
            break
        scores[kind] = {"digest": digest, "held_out": evaluator.scored(logits, split)}
    done = {name: value for name, value in trained.items() if name != "digests"}
    nothing = {"digest": None, "held_out": {"split": split, "correct": 0, "n": n}}
    done |= scores.pop(ingredient, nothing) | {"variants": scores}
    done["seconds"] = round(done["seconds"] + time.monotonic() - started, 2)

    def save() -> dict[str, Any]:
        write_json(folder / DONE, done)
        (folder / TRAINED).unlink(missing_ok=True)
        return done

    return first_decides(save, processes)


def complete(
    config: Experiment, folder: Path, name: str, make: Callable[[], dict[str, Any]], processes: Processes
) -> dict[str, Any]:
    """Return the done.json of a model with this identity, after what is missing: `make` its weights, score them.

    All processes must call it; `make` returns trained.json.
    """

    def found(record: str) -> dict[str, Any] | None:
        return first_decides(lambda: finished(folder, name, record), processes)

    done = found(DONE)
    return done if done is not None else score(config, folder, found(TRAINED) or make(), processes)
