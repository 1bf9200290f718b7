"""A row of a sweep from its settings to done.json, by way of files that survive any interruption."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.chance import seed
from configs.errors import UserError
from configs.schema import Experiment, dump
from eval.forward import Evaluator, extract_features
from finetune.loop import RAW, fine_tune
from finetune.parallel import start_processes
from finetune.rows import draw, identity, row_config
from models.classifier import set_head
from models.probe import linear_probe
from store.atomic import write_json
from store.provenance import provenance
from store.runs import RunFolder, finished, record_config, sole_writer
from store.weights import load_weights, save_weights


def _scored(evaluator: Evaluator, file: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Save weights and score them on held-out."""
    split = evaluator.config.task.held_out
    digest = save_weights(file, weights)
    count = evaluator.count(evaluator.logits(digest, lambda: weights, split), split)
    return {"digest": digest, "held_out": {"split": split, "correct": count.correct, "n": count.n}}


def _finish(
    evaluator: Evaluator, folder: Path, done: dict[str, Any], started: float, kinds: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """Save and score the row's weights, and write done.json last.

    `kinds` are state dicts by kind: the one that is the row's ingredient becomes weights.safetensors, the others stand
    beside it under their own names. A diverged model has none: its row counts as tried, scores nothing, and recipes
    leave it out.
    """
    config = evaluator.config
    ingredient = config.regularizer.ingredient if done["row"] else RAW
    split = config.task.held_out
    scores: dict[str, Any] = {
        "digest": None,
        "held_out": {"split": split, "correct": 0, "n": len(evaluator.split(split).labels)},
    }
    if done["status"] == "done":
        scores = _scored(evaluator, folder / "weights.safetensors", kinds[ingredient])
    others = {kind: weights for kind, weights in kinds.items() if kind != ingredient}
    variants = {kind: _scored(evaluator, folder / f"{kind}.safetensors", weights) for kind, weights in others.items()}
    done |= scores | {
        "ingredient": ingredient,
        "variants": variants,
        "seconds": round(time.monotonic() - started, 2),
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    write_json(folder / "done.json", done)
    (folder / "state.pt").unlink(missing_ok=True)
    return done


def initialise(config: Experiment) -> dict[str, Any]:
    """Row 0: the pretrained tower with the head that all other rows start from; the zero-shot model beside it.

    Skipped where it is done. Returns row 0's done.json.

    Raises:
        UserError: missing or damaged data or weights; made before with other settings; being made by another process.
    """
    run = RunFolder.of(config)
    name = identity(config, 0)
    folder = run.ingredient(0)
    with sole_writer(folder):
        zero_shot_done, done = finished(run.zero_shot, name), finished(folder, name)
        if done is not None and zero_shot_done is not None:
            return done
        evaluator = Evaluator(config)
        base = {"identity": name, "status": "done", "drawn": {}}
        started = time.monotonic()
        if zero_shot_done is None:
            record_config(run.zero_shot, dump(config))
            zero_shot_done = _finish(
                evaluator, run.zero_shot, base | {"row": None, "head": "zero_shot"}, started, _raw(evaluator)
            )
        started = time.monotonic()
        zero_shot = load_weights(run.zero_shot / "weights.safetensors", zero_shot_done["digest"])
        evaluator.model.load_state_dict(zero_shot)
        record_config(folder, dump(row_config(config, 0)))
        extra: dict[str, Any] = {}
        if config.model.head == "linear_probe":
            extra["probe"] = _fit_probe(evaluator)
        return _finish(
            evaluator, folder, base | {"row": 0, "head": config.model.head} | extra, started, _raw(evaluator)
        )


def _raw(evaluator: Evaluator) -> dict[str, dict[str, Tensor]]:
    """The weights of the evaluator's model."""
    return {RAW: {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}}


def _fit_probe(evaluator: Evaluator) -> dict[str, Any]:
    """Put a linear probe in the place of the evaluator's head."""
    config = evaluator.config
    train, held_out = (evaluator.split(name) for name in (config.task.train, config.task.held_out))
    probe = linear_probe(
        (extract_features(evaluator.model, train.images), train.labels),
        (extract_features(evaluator.model, held_out.images), held_out.labels),
        evaluator.model.head.out_features,
        config.model.probe_c,
    )
    set_head(evaluator.model, probe.weight, probe.bias)
    return {"c": probe.c, "tried": [{"c": c, "held_out_top1": score} for c, score in probe.tried]}


def teachers(config: Experiment, row: int) -> tuple[int, ...]:
    """The rows that must be trained before this one, since it is distilled from them."""
    distill = row_config(config, row).regularizer.distill if row else None
    return distill.rows if distill is not None else ()


def _teacher(config: Experiment, row: int, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """The mean logits of a row's teachers, or None where it has none.

    Raises:
        UserError: a teacher is not trained yet, or diverged.
    """
    rows = teachers(config, row)
    if not rows:
        return None
    run, models = RunFolder.of(config), []
    for number in rows:
        done = finished(run.ingredient(number), identity(config, number))
        if done is None or done["status"] != "done":
            raise UserError(f"row {row} is distilled from row {number}, which is not trained: train that one first")
        model = Evaluator(config).model
        model.load_state_dict(load_weights(run.ingredient(number) / "weights.safetensors", done["digest"]))
        models.append(model.to(device).eval())

    @torch.no_grad()
    def mean_logits(images: Tensor) -> Tensor:
        return torch.stack([model(images) for model in models]).mean(dim=0)

    return mean_logits


def train_row(config: Experiment, row: int) -> dict[str, Any]:
    """Fine-tune one row from row 0's weights, or continue where it stopped; skipped where it is done.

    Started by torchrun, all processes train the row together and the first one writes.

    Returns the row's done.json.

    Raises:
        UserError: row 0, or a row that this one is distilled from, is not there yet; and whatever `initialise` raises.
        InterruptedBySignalError: a signal came, and the state is saved.
    """
    processes = start_processes()
    if row == 0:
        return initialise(config)
    run, name = RunFolder.of(config), identity(config, row)
    folder = run.ingredient(row)
    with sole_writer(folder) if processes.writes else nullcontext():
        done = finished(folder, name)
        if done is not None:
            return done
        start = finished(run.ingredient(0), identity(config, 0))
        if start is None:
            raise UserError(f"row {row} starts from row 0, which is not there: run the same with sweep.index=0 first")
        settings = row_config(config, row)
        if processes.writes:
            record_config(folder, dump(settings))
        evaluator = Evaluator(settings)
        evaluator.model.load_state_dict(load_weights(run.ingredient(0) / "weights.safetensors", start["digest"]))
        own = row if settings.optim.seed is None else f"seed{settings.optim.seed}"
        run_seed = seed(config.sweep.seed, own, "run")
        started = time.monotonic()
        trained = fine_tune(
            evaluator.model,
            evaluator.split(config.task.train),
            settings,
            run_seed=run_seed,
            folder=folder,
            processes=processes,
            teacher=_teacher(config, row, processes.device),
            held_out=partial(_held_out, Evaluator(settings)),
        )
        done = {
            "identity": name,
            "status": "done" if trained.finite else "diverged",
            "row": row,
            "drawn": draw(config, row),
            "seed": run_seed,
            "start": start["digest"],
            "best": trained.best,
        }
        # A model of its own: the trained one may be sharded.
        return _finish(Evaluator(settings), folder, done, started, trained.weights) if processes.writes else done


def _held_out(evaluator: Evaluator, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many held-out images weights get right, of how many."""
    split = evaluator.config.task.held_out
    count = evaluator.count(evaluator.fresh_logits(weights, split), split)
    return count.correct, count.n
