"""A row of a sweep from its settings to done.json, by way of files that survive any interruption."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from configs.chance import seed
from configs.errors import UserError
from configs.schema import Experiment, dump
from configs.slurm import this_job, wait_in_array
from eval.forward import Evaluator, forward
from eval.metrics import correct
from finetune.imported import imported_row
from finetune.loop import RAW, fine_tune, nothing_shown
from finetune.meter import progress
from finetune.rows import draw, identity, row_config, teachers
from finetune.tracking import Log, tracked
from models.classifier import Classifier, Network, pretrained, pretrained_network, set_head
from models.probe import linear_probe
from store.atomic import write_json
from store.processes import Processes, start_processes, sum_over
from store.provenance import provenance
from store.runs import RunFolder, finished, record_config, sole_writer
from store.weights import load_weights, save_weights
from tasks.load import class_names

HEAD = ("head.weight", "head.bias")


def _scored(evaluator: Evaluator, file: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Save weights and score them on held-out."""
    split = evaluator.config.task.held_out
    saved = save_weights(file, weights)
    logits = evaluator.logits(saved, lambda: weights, split)
    return {"digest": saved, "held_out": evaluator.scored(logits, split)}


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
    job = this_job()
    done |= {"slurm": asdict(job)} if job else {}
    write_json(folder / "done.json", done)
    (folder / "state.pt").unlink(missing_ok=True)
    return done


def import_row(config: Experiment, row: int) -> dict[str, Any]:
    """A row with the weights of `sweep.imported`, scored on held-out; skipped where it is done.

    Returns the row's done.json.

    Raises:
        UserError: as `imported_row`; missing data; made before with other settings; being made by another process.
    """
    folder, name = RunFolder.of(config).ingredient(row), identity(config, row)
    with sole_writer(folder):
        done = finished(folder, name)
        if done is not None:
            return done
        started, evaluator = time.monotonic(), Evaluator(config)
        weights, source = imported_row(config, row)
        record_config(folder, dump(row_config(config, row)))
        base = {"identity": name, "status": "done", "row": row, "drawn": draw(config, row)} | source
        return _finish(evaluator, folder, base, started, {config.regularizer.ingredient if row else RAW: dict(weights)})


def initialise(config: Experiment) -> dict[str, Any]:
    """Row 0: the pretrained network with the head that all rows start from; the zero-shot model beside it, if any.

    Skipped where it is done. Returns row 0's done.json.

    Raises:
        UserError: missing or damaged data or weights; made before with other settings; being made by another process.
    """
    if config.sweep.imported is not None:
        return import_row(config, 0)
    run = RunFolder.of(config)
    name = identity(config, 0)
    folder = run.ingredient(0)
    with sole_writer(folder):
        has_zero_shot = config.model.templates is not None
        zero_shot_done, done = finished(run.zero_shot, name), finished(folder, name)
        if done is not None and (zero_shot_done is not None or not has_zero_shot):
            return done
        evaluator = Evaluator(config)
        for split in (config.task.train, config.task.held_out):
            evaluator.split(split)  # what is wrong with them is said before anything is made
        base = {"identity": name, "status": "done", "drawn": {}}
        started = time.monotonic()
        start = pretrained_network(config.model, class_names(config.task)).state_dict()
        if has_zero_shot and zero_shot_done is None:
            record_config(run.zero_shot, dump(config))
            _finish(evaluator, run.zero_shot, base | {"row": None, "head": "zero_shot"}, started, {RAW: start})
        started = time.monotonic()
        evaluator.model.load_state_dict(start)
        record_config(folder, dump(row_config(config, 0)))
        extra = {"probe": _fit_probe(evaluator)} if config.model.head == "linear_probe" else {}
        weights = {name: tensor.cpu().clone() for name, tensor in evaluator.model.state_dict().items()}
        return _finish(evaluator, folder, base | {"row": 0, "head": config.model.head} | extra, started, {RAW: weights})


def _fit_probe(evaluator: Evaluator) -> dict[str, Any]:
    """Put a linear probe in the place of the evaluator's head."""
    config = evaluator.config
    train, held_out = config.task.train, config.task.held_out
    probe = linear_probe(
        (evaluator.features(train), evaluator.split(train).labels),
        (evaluator.features(held_out), evaluator.split(held_out).labels),
        config.task.size,
        config.model.probe_c,
    )
    assert isinstance(evaluator.model, Classifier)  # a prompted language model has no head to be probed
    set_head(evaluator.model, probe.weight, probe.bias)
    return {"c": probe.c, "tried": [{"c": c, "held_out_top1": score} for c, score in probe.tried]}


def _is_done(config: Experiment, row: int) -> bool:
    return finished(RunFolder.of(config).ingredient(row), identity(config, row)) is not None


def wait_for_starts(config: Experiment, row: int) -> None:
    """As a task of a job array, wait for the rows that this one starts from, which other tasks train.

    Raises:
        UserError: such a row was made with other settings, or its task ended without it.
    """
    for needed in (0, *teachers(config, row)) if row else ():
        wait_in_array(partial(_is_done, config, needed), needed, f"row {needed}")


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


def train_row(config: Experiment, row: int, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune one row from row 0's weights, or continue where it stopped; skipped where it is done.

    Started by torchrun, all processes train the row together and the first one writes.

    Args:
        config: of the experiment.
        row: which; 0 makes the initialisation.
        console: where progress is shown, if anywhere.

    Returns the row's done.json.

    Raises:
        UserError: row 0, or a row that this one is distilled from, is not there yet; and whatever `initialise` raises.
        InterruptedBySignalError: a signal came, and the state is saved.
    """
    processes = start_processes()
    if row == 0:
        return initialise(config)
    if config.sweep.imported is not None:
        return import_row(config, row)
    run, name = RunFolder.of(config), identity(config, row)
    folder = run.ingredient(row)
    with sole_writer(folder) if processes.writes else nullcontext():
        done = finished(folder, name)
        if done is not None:
            return done
        start = finished(run.ingredient(0), identity(config, 0))
        if start is None:
            raise UserError(f"row {row} starts from row 0, which is not there: run the same with sweep.index=0 first")
        if not processes.writes:
            return _train(config, row, start["digest"], processes=processes, console=None, log=lambda metrics: None)
        record_config(folder, dump(row_config(config, row)))
        with tracked(config, row, draw(config, row), folder) as log:
            return _train(config, row, start["digest"], processes=processes, console=console, log=log)


def _train(
    config: Experiment, row: int, start: str, *, processes: Processes, console: Console | None, log: Log
) -> dict[str, Any]:
    """Train a row that is not done from row 0's weights, whose digest is `start`."""
    settings, run = row_config(config, row), RunFolder.of(config)
    folder, began = run.ingredient(row), time.monotonic()
    first = load_weights(run.ingredient(0) / "weights.safetensors", start)
    evaluator = Evaluator(settings)
    evaluator.model.load_state_dict(first | _own_head(config, settings, row))
    own = row if settings.optim.seed is None else f"seed{settings.optim.seed}"
    run_seed = seed(config.sweep.seed, own, "run")
    show = nothing_shown if console is None else partial(progress, title=f"row {row}", console=console)
    trained = fine_tune(
        evaluator.model,
        evaluator.inputs(settings.task.train),
        settings,
        run_seed=run_seed,
        folder=folder,
        processes=processes,
        teacher=_teacher(config, row, processes.device),
        held_out=partial(_held_out, evaluator, processes),
        log=log,
        show=show,
    )
    done = {
        "identity": identity(config, row),
        "status": "done" if trained.finite else "diverged",
        "row": row,
        "drawn": draw(config, row),
        "seed": run_seed,
        "start": start,
        "best": trained.best,
    }
    if not processes.writes:
        return done
    for weights in trained.weights.values() if settings.task != config.task else ():
        weights.update({name: first[name] for name in HEAD})
    # A model of its own: the trained one may be sharded, or have the head of another task.
    reported = replace(settings, task=config.task)  # type: ignore[type-var]  # mypy does not know pydantic's
    return _finish(Evaluator(reported), folder, done, began, trained.weights)


def _own_head(config: Experiment, settings: Experiment, row: int) -> dict[str, Tensor]:
    """The zero-shot head of a row that learns a task of its own; nothing where it learns the experiment's.

    Such a row is saved with the head of the experiment's task, from which it saw no image (Appendix E).

    Raises:
        UserError: heads that are trained or have no class names to be made from.
    """
    if settings.task == config.task:
        return {}
    if config.model.head != "zero_shot" or config.model.train_head:
        raise UserError(f"row {row} learns a task of its own: set model.head=zero_shot model.train_head=false")
    weights = pretrained(settings.model, class_names(settings.task)).state_dict()
    return {name: weights[name] for name in HEAD}


def _held_out(evaluator: Evaluator, processes: Processes, model: Network) -> tuple[int, int]:
    """How many held-out images a model gets right, of how many; each process looks at its share of them."""
    split = evaluator.config.task.held_out
    labels = evaluator.split(split).labels
    own = torch.arange(processes.rank, len(labels), processes.world)
    # All look at as many images, since sharded models are gathered by all at once; an extra one is not counted.
    rows = torch.cat([own, own.new_zeros(-(-len(labels) // processes.world) - len(own))])
    logits = forward(model, evaluator.batches(split, rows), evaluator.config.compute.precision)
    right = correct(logits, labels[rows])[: len(own)].sum()
    return int(sum_over(right.to(processes.device)).item()), len(labels)
