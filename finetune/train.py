"""A row of a sweep from its settings to done.json, by way of files that survive any interruption."""

import time
from pathlib import Path
from typing import Any

import torch

from configs.chance import seed
from configs.errors import UserError
from configs.schema import Experiment, dump
from eval.forward import Count, Evaluator, extract_features
from finetune.loop import fine_tune
from finetune.rows import draw, identity, row_config
from models.classifier import set_head
from models.probe import linear_probe
from store.atomic import write_json
from store.provenance import provenance
from store.runs import RunFolder, finished, record_config, sole_writer
from store.weights import load_weights, save_weights


def _finish(evaluator: Evaluator, folder: Path, done: dict[str, Any], started: float) -> dict[str, Any]:
    """Save the evaluator's model, score it on held-out, and write done.json last.

    A diverged model leaves no weights: its row counts as tried, scores nothing, and recipes leave it out.
    """
    split = evaluator.config.task.held_out
    digest, count = None, Count(0, len(evaluator.split(split).labels))
    if done["status"] == "done":
        weights = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}
        digest = save_weights(folder / "weights.safetensors", weights)
        count = evaluator.count(evaluator.logits(digest, lambda: weights, split), split)
    done |= {
        "digest": digest,
        "held_out": {"split": split, "correct": count.correct, "n": count.n},
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
            zero_shot_done = _finish(evaluator, run.zero_shot, base | {"row": None, "head": "zero_shot"}, started)
        started = time.monotonic()
        zero_shot = load_weights(run.zero_shot / "weights.safetensors", zero_shot_done["digest"])
        evaluator.model.load_state_dict(zero_shot)
        record_config(folder, dump(row_config(config, 0)))
        extra: dict[str, Any] = {}
        if config.model.head == "linear_probe":
            extra["probe"] = _fit_probe(evaluator)
        return _finish(evaluator, folder, base | {"row": 0, "head": config.model.head} | extra, started)


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


def train_row(config: Experiment, row: int) -> dict[str, Any]:
    """Fine-tune one row from row 0's weights, or continue where it stopped; skipped where it is done.

    Returns the row's done.json.

    Raises:
        UserError: row 0 is not there yet; and whatever `initialise` raises.
    """
    if row == 0:
        return initialise(config)
    run, name = RunFolder.of(config), identity(config, row)
    folder = run.ingredient(row)
    with sole_writer(folder):
        done = finished(folder, name)
        if done is not None:
            return done
        start = finished(run.ingredient(0), identity(config, 0))
        if start is None:
            raise UserError(f"row {row} starts from row 0, which is not there: run the same with sweep.index=0 first")
        settings = row_config(config, row)
        record_config(folder, dump(settings))
        evaluator = Evaluator(settings)
        evaluator.model.load_state_dict(load_weights(run.ingredient(0) / "weights.safetensors", start["digest"]))
        run_seed = seed(config.sweep.seed, row, "run")
        started = time.monotonic()
        finite = fine_tune(
            evaluator.model,
            evaluator.split(config.task.train),
            settings.optim,
            settings.augment,
            size=config.model.image_size,
            run_seed=run_seed,
            folder=folder,
        )
        done = {
            "identity": name,
            "status": "done" if finite else "diverged",
            "row": row,
            "drawn": draw(config, row),
            "seed": run_seed,
            "start": start["digest"],
        }
        return _finish(evaluator, folder, done, started)
