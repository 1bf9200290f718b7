"""What rows start from (row 0, released checkpoints, other heads, teachers), and how all end, with done.json last."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.registered import ROOT
from configs.schema import Experiment, dump
from configs.slurm import this_job, wait_in_array
from eval.forward import Evaluator
from finetune.state import end_if, interruptions
from models.classifier import Classifier, pretrained, pretrained_network, set_head
from models.probe import linear_probe
from models.released import convert
from soups.files.atomic import digest_of, read_json, write_json
from soups.files.weights import load_weights, save_weights
from store.processes import Processes, first_decides, start_processes
from store.provenance import provenance
from store.rows import draw, identity, require_head, row_config, teachers
from store.runs import DONE, RAW, TRAINED, WEIGHTS, RunFolder, done_row, finished, sole_writer
from tasks.load import class_names

HEAD = ("head.weight", "head.bias")


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
    seconds = base.get("seconds", 0.0) + time.monotonic() - started
    trained = base | {"ingredient": ingredient, "digests": digests, "seconds": seconds}
    trained |= {"threads": torch.get_num_threads(), "provenance": provenance()}
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


def initialise(config: Experiment) -> dict[str, Any]:
    """Row 0: the pretrained network with the head that all rows start from; the zero-shot model beside it, if any.

    Of several processes the first makes it, and all compute features and score it; returns its done.json.
    """
    if config.sweep.imported is not None:
        return import_row(config, 0)
    processes, run, name = start_processes(), RunFolder.of(config), identity(config, 0)
    base, folder = {"identity": name, "status": "done", "drawn": {}}, run.ingredient(0)
    is_probed, splits = config.model.head == "linear_probe", (config.task.train, config.task.held_out)

    @cache
    def start() -> dict[str, Tensor]:
        for split in splits:
            Evaluator(config).split(split)  # damaged data are refused before anything is made
        return pretrained_network(config.model, class_names(config.task), config.task.answers).state_dict()

    def make_zero_shot() -> dict[str, Any]:
        started = time.monotonic()
        write_json(run.zero_shot / "config.json", dump(config))
        return save_trained(config, run.zero_shot, base | {"row": None, "head": "zero_shot"}, started, {RAW: start()})

    def make_row_0() -> dict[str, Any]:
        started = time.monotonic()
        weights, probe = _fit_probe(config, start()) if is_probed else (start(), {})
        write_json(folder / "config.json", dump(row_config(config, 0)))
        facts = base | {"row": 0, "head": config.model.head, "data": _digests(config)} | probe
        return save_trained(config, folder, facts, started, {RAW: weights})

    def row_0() -> dict[str, Any]:
        if is_probed and processes.world > 1:
            evaluator = Evaluator(config, processes)
            evaluator.load_on_all(start)
            for split in splits:
                evaluator.fill_features(split)
        return first_decides(make_row_0, processes)

    with sole_writers(folder, processes):
        if config.model.templates is not None:
            complete(config, run.zero_shot, name, partial(first_decides, make_zero_shot, processes), processes)
        done = complete(config, folder, name, row_0, processes)
    refuse_other_data(config, done)
    return done


def _fit_probe(config: Experiment, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights with a linear probe in the place of their head, and what row 0's done.json says of it."""
    evaluator = Evaluator(config)
    evaluator.model.load_state_dict(start)
    splits = (config.task.train, config.task.held_out)
    # Relative, so that a run may be moved.
    places = [str(evaluator.features_place(split).relative_to(evaluator.run.root)) for split in splits]
    train, held_out = ((evaluator.features(split), evaluator.split(split).labels) for split in splits)
    with interruptions() as came:
        probe = linear_probe(
            train,
            held_out,
            config.task.size,
            config.model.probe_c,
            evaluator.run.root / "probe" / digest_of(places),
            loss=config.model.probe_loss,
            device=evaluator.processes.device,
            check=partial(end_if, came),
        )
    assert isinstance(evaluator.model, Classifier)  # a prompted language model has no head to be probed
    set_head(evaluator.model, probe.weight, probe.bias)
    weights = {name: tensor.cpu().clone() for name, tensor in evaluator.model.state_dict().items()}
    return weights, {"probe": {"c": probe.c, "tried": [{"c": c, "held_out_top1": score} for c, score in probe.tried]}}


def _digests(config: Experiment) -> dict[str, str]:
    return {split: Evaluator(config).split(split).digest for split in (config.task.train, config.task.held_out)}


def refuse_other_data(config: Experiment, row_0: dict[str, Any]) -> None:
    """Raise a `UserError` where the data set is elsewhere and not the one row 0, by its done.json, was made from."""
    folder = RunFolder.of(config).ingredient(0)
    if Path(read_json(folder / "config.json")["task"]["folder"]) == config.task.folder:
        return
    if row_0["data"] != _digests(config):
        raise UserError(
            f"{folder} was made from other examples than those of task.folder={config.task.folder}: give this "
            "experiment another name, e.g. name=demo_mine, or delete that folder"
        )


def _released_file(config: Experiment, row: int) -> Path:
    assert config.sweep.imported is not None
    path = ROOT / config.sweep.imported / f"model_{row}.pt"
    if not path.exists():
        raise UserError(
            f"{path} is missing: python -m soups.experiment.released download --folder {config.sweep.imported}"
        )
    return path


def check_imports(config: Experiment) -> None:
    """Refuse, before anything is done, an import that lacks a checkpoint or the list of held-out images."""
    for row in range(config.sweep.size + 1) if config.sweep.imported is not None else ():
        _released_file(config, row)
    index = config.task.held_out_index
    if config.sweep.imported is not None and index is not None and not (ROOT / index).exists():
        raise UserError(
            f"task.held_out_index={index} is missing: python -m soups.experiment.released download brings it"
        )


def import_row(config: Experiment, row: int) -> dict[str, Any]:
    """A row whose weights are a released checkpoint, scored on held-out; returns its done.json."""
    processes, started, model = start_processes(), time.monotonic(), config.model
    folder, name = RunFolder.of(config).ingredient(row), identity(config, row)

    def convert_file() -> dict[str, Any]:
        if (model.kind, model.name, model.normalize) != ("open_clip", "ViT-B-32-quickgelu", True):
            raise UserError("sweep.imported: the released checkpoints are of model=clip_vit_b32, of no other network")
        path = _released_file(config, row)
        weights, dropped = convert(path)
        write_json(folder / "config.json", dump(row_config(config, row)))
        source = {"imported": {"file": path.name, "bytes": path.stat().st_size, "dropped": sorted(dropped)}}
        base = {"identity": name, "status": "done", "row": row, "drawn": draw(config, row)} | source
        kind = config.regularizer.ingredient if row else RAW
        return save_trained(config, folder, base, started, {kind: dict(weights)})

    with sole_writers(folder, processes):
        return complete(config, folder, name, partial(first_decides, convert_file, processes), processes)


def wait_for_starts(config: Experiment, row: int, processes: Processes) -> None:
    """Wait for the rows that this one starts from, which other tasks of the job array train; the first process asks."""

    def wait() -> None:
        for needed in (0, *teachers(config, row)) if row else ():
            wait_in_array(lambda: done_row(config, needed) is not None, needed, f"row {needed}")  # noqa: B023 - at once

    first_decides(wait, processes)


def teacher_of(config: Experiment, row: int, processes: Processes) -> Callable[[Tensor], Tensor] | None:
    """The mean logits of a row's teachers, or None where it has none; a UserError where one is not trained."""
    rows = teachers(config, row)
    if not rows:
        return None
    run, models = RunFolder.of(config), []

    def weights_of(number: int) -> dict[str, Tensor]:
        done = done_row(config, number)
        if done is None or done["status"] != "done":
            raise UserError(f"row {row} is distilled from row {number}, which is not trained: train that one first")
        return load_weights(run.ingredient(number) / WEIGHTS, done["digest"])

    for number in rows:
        evaluator = Evaluator(config, processes)
        evaluator.load_on_all(partial(weights_of, number))
        models.append(evaluator.model.eval())

    @torch.no_grad()
    def mean_logits(inputs: Tensor) -> Tensor:
        return torch.stack([model(inputs) for model in models]).mean(dim=0)

    return mean_logits


def other_head(config: Experiment, settings: Experiment, row: int) -> dict[str, Tensor]:
    """The head that a row starts with in the place of row 0's, if any.

    A row that learns a task of its own has the zero-shot head of that task, and is saved with the head of the
    experiment's, from which it saw no image (Appendix E). `model.head_of` takes the head of another run's row 0, such
    as a linear probe at another resolution (Appendix J.2.3).
    """
    if settings.model.head_of is None:
        if settings.task == config.task:
            return {}
        if config.model.head != "zero_shot" or config.model.train_head:
            raise UserError(f"row {row} learns a task of its own: set model.head=zero_shot model.train_head=false")
        weights = pretrained(settings.model, class_names(settings.task)).state_dict()
        return {name: weights[name] for name in HEAD}
    run = settings.model.head_of
    require_head(config, run)
    other, own = (RunFolder(config.paths.runs / name).ingredient(0) for name in (run, config.name))
    head, replaced = (
        load_weights(folder / WEIGHTS, read_json(folder / "done.json")["digest"]) for folder in (other, own)
    )
    for name in HEAD:
        if head[name].shape != replaced[name].shape:
            sizes = f"{tuple(head[name].shape)} and {tuple(replaced[name].shape)}"
            raise UserError(f"model.head_of={run}: {name} of {other} and of {own} are of shapes {sizes}")
    return {name: head[name] for name in HEAD}
