"""What is wrong with a pool of models:  python -m soups.doctor run/*.safetensors [--init FILE] [--scores scores.json]
Or with an experiment's:                python -m soups.doctor --experiment demo [--barriers]

Duplicates, NaNs, models that do not fit together, distances to the initialisation, angles between task vectors, models
of another origin, and why their soup may be worse than the best of them. Reads each file twice and writes nothing.
scores.json is {"a.safetensors": 0.81, ...}: held-out accuracies in [0, 1].
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.cli import one_line_errors
from configs.errors import UserError
from soups.conformance import common_layout
from soups.geometry import ANOTHER_ORIGIN, Geometry, geometry, medians_of_others
from store.checkpoints import BLOCK, Checkpoint, content_digest, hash_tensor, open_checkpoint
from store.dtypes import FLOATS, widen

FAR = 3.0  # times the pool's median distance
ALIKE = 0.95  # cosine of task vectors
WEAK = 0.02  # below the best accuracy


@dataclass(frozen=True)
class Model:
    """One file as the doctor found it."""

    path: Path
    digest: str = ""
    infinite: str = ""  # the first tensor with NaN or infinity
    problem: str = ""  # why it cannot be opened, or does not fit to the others

    @property
    def sound(self) -> bool:
        """Whether it can be averaged."""
        return not (self.infinite or self.problem)


@dataclass(frozen=True)
class Report:
    """A pool as the doctor found it."""

    models: tuple[Model, ...]
    against: str  # what distances are to: the initialisation, or the mean of the sound models
    geometry: Geometry | None  # of the sound models, in order; None if there are none
    findings: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def sound(self) -> list[Model]:
        """Models that can be averaged."""
        return [model for model in self.models if model.sound]


def named(path: Path) -> str:
    """What a file is called here: its own name, or its folder's where an experiment calls all files the same."""
    return path.parent.name if path.name == "weights.safetensors" else path.name


def _read(checkpoint: Checkpoint) -> tuple[str, str]:
    """Digest, and the first tensor with NaN or infinity."""
    buffer, tensors, infinite = np.empty(8 * BLOCK, np.uint8), {}, ""
    for name, entry in checkpoint.entries.items():
        running = hash_tensor()
        for block in checkpoint.blocks(name, buffer):
            running.update(block.data)
            if entry.dtype in FLOATS and not infinite and not np.isfinite(widen(block, entry.dtype)).all():
                infinite = name
        tensors[name] = running.hexdigest()
    return content_digest(checkpoint, tensors), infinite


def _fits(checkpoint: Checkpoint, others: Sequence[Checkpoint]) -> str:
    """Why a file has not the layout that most have, or an empty string."""
    kinds = Counter(tuple(other.entries.items()) for other in others)
    usual = next(other for other in others if kinds[tuple(other.entries.items())] == max(kinds.values()))
    try:
        common_layout([usual, checkpoint])
    except UserError as error:
        return str(error).removeprefix(f"{checkpoint.path}: ")
    return ""


def examine(paths: Sequence[Path], init: Path | None = None, scores: Mapping[str, float] | None = None) -> Report:
    """All that the doctor finds.

    Args:
        paths: of the models.
        init: the initialisation; without it, distances are to the mean of the models.
        scores: held-out accuracies in [0, 1] by file name.

    Raises:
        UserError: no models; a bad initialisation; scores for files that are not there.
    """
    if not paths:
        raise UserError("no models to examine")
    unknown = sorted((scores or {}).keys() - {named(path) for path in paths})
    if unknown:
        raise UserError(f"scores: there is no model {unknown[0]!r} in the pool")
    with ExitStack() as stack:
        opened: dict[Path, Checkpoint] = {}
        problems: dict[Path, str] = {}
        for path in dict.fromkeys(paths):
            try:
                opened[path] = open_checkpoint(path, stack)
            except UserError as error:
                problems[path] = str(error)
        start = open_checkpoint(init, stack) if init else None
        if start and (infinite := _read(start)[1]):
            raise UserError(f"{init}: tensor {infinite!r} holds NaN or infinity")
        reference = [start] if start else list(opened.values())
        models = []
        for path in dict.fromkeys(paths):
            if path in problems:
                models.append(Model(path, problem=problems[path]))
            else:
                digest, infinite = _read(opened[path])
                models.append(Model(path, digest, infinite, _fits(opened[path], reference)))
        sound = [opened[model.path] for model in models if model.sound]
        layout = common_layout([*sound, start] if start else sound) if sound else None
        found = geometry(sound, layout, start) if layout else None
    against = init.name if init else "the mean of the models"
    findings = tuple(_findings(models, found, against, scores or {}, has_init=init is not None))
    return Report(tuple(models), against, found, findings, scores or {})


def _findings(
    models: Sequence[Model], found: Geometry | None, against: str, scores: Mapping[str, float], *, has_init: bool
) -> list[str]:
    """One line for each thing that makes a soup worse than its best ingredient."""
    lines = [f"{named(m.path)}: {m.problem}" for m in models if m.problem]
    lines += [f"{named(m.path)}: tensor {m.infinite!r} holds NaN or infinity" for m in models if m.infinite]
    first: dict[str, str] = {}
    for model in models:
        same = first.setdefault(model.digest, named(model.path)) if model.digest else named(model.path)
        if same != named(model.path):
            lines.append(f"{named(model.path)} and {same} are the same model, and count twice")
    sound = [named(model.path) for model in models if model.sound]
    if found is not None:
        lines += _of_geometry(sound, found, against, has_init=has_init)
    if scores:
        lines += _of_scores(scores)
    return lines


def _of_geometry(names: Sequence[str], found: Geometry, against: str, *, has_init: bool) -> list[str]:
    lines = []
    count = len(names)
    kin = found.reference_cosines if has_init else medians_of_others(found.weight_cosines)
    strangers = kin < ANOTHER_ORIGIN
    whom = f"with {against}" if has_init else "with the other models (median)"
    for name, cosine, strange in zip(names, kin, strangers, strict=True):
        if strange:
            lines.append(f"{name} started elsewhere: its weights have a cosine of {cosine:.2f} {whom}; leave it out")
    middle = float(np.median(found.distances))
    for name, distance, strange in zip(names, found.distances, strangers, strict=True):
        if not strange and count > 2 and distance > FAR * middle > 0:
            lines.append(
                f"{name} went far: {distance / middle:.1f} times the median distance to {against}; such models, of "
                "high learning rates, often lie behind a barrier"
            )
    angles = found.task_cosines[np.triu_indices(count, 1)]
    if has_init and len(angles) and np.nanmedian(angles) > ALIKE:
        lines.append(f"the models are nearly the same (median cosine {np.nanmedian(angles):.3f}): little to gain")
    return lines


def _of_scores(scores: Mapping[str, float]) -> list[str]:
    best = max(scores, key=lambda name: scores[name])
    weak = sorted(name for name, score in scores.items() if score < scores[best] - WEAK)
    if not weak:
        return []
    return [
        f"{len(weak)} of {len(scores)} models are more than {100 * WEAK:.0f} points below {best} "
        f"({100 * scores[best]:.1f} %): {', '.join(weak[:8])}{', ...' if len(weak) > 8 else ''}; a uniform soup counts "
        "them in full, a greedy one leaves out those that lower it"
    ]


def show(report: Report, console: Console) -> None:
    """A table of the models and the findings."""
    table = Table(title=f"distances and angles to {report.against}")
    for column in ("model", "digest", "distance", "relative", "cosine to others", "held-out"):
        table.add_column(column, justify="left" if column in ("model", "digest") else "right", overflow="fold")
    place = {model.path: i for i, model in enumerate(report.sound)}
    for model in report.models:
        values = ["", "", ""]
        if report.geometry is not None and model.path in place:
            i, found = place[model.path], report.geometry
            others = np.delete(found.task_cosines[i], i)
            values = [f"{found.distances[i]:.4g}", f"{found.relative[i]:.4f}"]
            values.append(f"{others.min():.2f} to {others.max():.2f}" if len(others) else "")
        score = report.scores.get(named(model.path))
        table.add_row(named(model.path), model.digest[:8], *values, "" if score is None else f"{100 * score:.2f} %")
    console.print(table)
    console.print("why a soup of them may be worse than the best:" if report.findings else "nothing wrong was found")
    for finding in report.findings:
        console.print(f"- {finding}", markup=False, highlight=False, soft_wrap=True)


def read_scores(path: Path) -> dict[str, float]:
    """Held-out accuracies by file name.

    Raises:
        UserError: missing, or not a dict of numbers in [0, 1].
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        if all(0 <= score <= 1 for score in scores.values()):
            return {name: float(score) for name, score in scores.items()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, TypeError, AttributeError):
        pass
    raise UserError(f'{path}: need accuracies in [0, 1] by file name, as in {{"a.safetensors": 0.81}}')


def examine_experiment(experiment: str, runs: Path, *, barriers: bool, console: Console) -> None:
    """The pool of a finished sweep: files, initialisation and held-out accuracies are known, and the network too.

    Raises:
        UserError: rows are missing.
    """
    # Imported here, since a pool of files needs no torch, which takes seconds.
    from configs.schema import load  # noqa: PLC0415
    from eval.forward import Evaluator  # noqa: PLC0415
    from soups.barriers import midpoint_barriers  # noqa: PLC0415
    from soups.pool import usable_pool  # noqa: PLC0415

    config = load(experiment, f"paths.runs={runs}")
    start, *tuned = usable_pool(config)
    scores = {i.folder.name: i.held_out_score for i in tuned}
    files = [i.folder / "weights.safetensors" for i in tuned]
    show(examine(files, start.folder / "weights.safetensors", scores), console)
    if not barriers:
        return
    evaluator, split = Evaluator(config), config.task.held_out
    count = len(tuned) * (len(tuned) + 1) // 2
    console.print(f"midpoints of all pairs, {count} evaluations on {split} ...")
    for barrier in midpoint_barriers(
        [i.load for i in tuned], lambda weights: evaluator.score(evaluator.fresh_logits(weights, split), split)
    )[:10]:
        pair = f"rows {tuned[barrier.first].row} and {tuned[barrier.second].row}"
        height = 100 * barrier.height
        console.print(
            f"- {pair}: the midpoint is {abs(height):.1f} points {'below' if height > 0 else 'above'} their mean"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="*", help="weight files, folders or indices of shards")
    parser.add_argument("--init", type=Path, help="the weights that the models were fine-tuned from")
    parser.add_argument("--scores", type=Path, help="JSON of held-out accuracies by file name")
    parser.add_argument("--experiment", help="examine the rows of a finished sweep instead")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are")
    parser.add_argument("--barriers", action="store_true", help="of an experiment: accuracy half way between all pairs")
    arguments = parser.parse_args()

    def work() -> None:
        if arguments.experiment and (arguments.paths or arguments.init or arguments.scores):
            raise UserError("--experiment brings its own files, initialisation and scores: name it alone")
        if arguments.barriers and not arguments.experiment:
            raise UserError("--barriers needs a network and held-out images, which --experiment NAME has")
        if arguments.experiment:
            examine_experiment(arguments.experiment, arguments.runs, barriers=arguments.barriers, console=Console())
            return
        scores = read_scores(arguments.scores) if arguments.scores else {}
        show(examine(arguments.paths, arguments.init, scores), Console())

    one_line_errors(work)


if __name__ == "__main__":
    main()
