"""What is wrong with a pool of models, and how often soups of such pools were better than the best of them.

soups doctor run/*.safetensors --scores scores.json --held-out 616
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from soups.checks import looked_through, sound_digest
from soups.conformance import common_layout
from soups.errors import UserError
from soups.files.aligned import differ
from soups.files.checkpoints import Checkpoint
from soups.files.folders import short_names
from soups.files.opening import alike, open_checkpoint
from soups.files.reading import Reading
from soups.geometry import ANOTHER_ORIGIN, Geometry, geometry, medians_of_others
from soups.scores import Given, given_scores

FAR = 3.0  # times the pool's median distance
ALIKE = 0.95  # cosine of task vectors
WEAK = 0.02  # below the best accuracy
# Shares of pools in which soups were better, which `python -m analysis will_it_help` of the repository writes.
TABLE = Path(__file__).with_name("will_it_help.json")


@dataclass(frozen=True)
class Model:
    """One file as the doctor found it."""

    path: Path
    name: str  # the shortest that tells it from the others
    digest: str = ""
    problem: str = ""  # why it cannot be opened or averaged


@dataclass(frozen=True)
class Report:
    """A pool as the doctor found it."""

    models: tuple[Model, ...]
    against: str  # what distances are to: the initialisation, or the mean of the sound models
    geometry: Geometry | None  # of the sound models, in order; None if there are none
    findings: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    will_it_help: tuple[str, ...] = ()

    @property
    def sound(self) -> list[Model]:
        """Models that can be averaged."""
        return [model for model in self.models if not model.problem]


def _fits(checkpoint: Checkpoint, others: Sequence[Checkpoint], reading: Reading | None) -> str:
    """Why a file has not the layout that most have, or an empty string."""
    kinds = Counter(tuple(other.entries.items()) for other in others)
    usual = next(other for other in others if kinds[tuple(other.entries.items())] == max(kinds.values()))
    try:
        common_layout([usual, checkpoint], reading)
    except UserError as error:
        return str(error).removeprefix(f"{checkpoint.path}: ")
    return ""


def _in_order_of(first: Path, path: Path, reading: Reading | None) -> Reading | None:
    """How a model is read, with its classes and tokens in the order of the first one's."""
    return replace(reading or Reading(), like=str(first)) if differ(path, first) else reading


def examine(
    paths: Sequence[Path],
    init: Path | None = None,
    scores: Given = None,
    reading: Reading | None = None,
    held_out: int | None = None,
) -> Report:
    """All that the doctor finds; files are read twice. Without `init` distances are to the mean of the models.

    `scores` are held-out accuracies in [0, 1], measured on so many `held_out` examples.
    """
    if not paths:
        raise UserError("no models to examine")
    paths = list(dict.fromkeys(paths))
    # An experiment calls all files the same, each in a folder of its own.
    names = short_names([path.parent if path.name == "weights.safetensors" else path for path in paths])
    known = {names[i]: score for i, score in given_scores(scores, paths, names).items()}
    for name, score in known.items():
        if not 0 <= score <= 1:
            where = scores if isinstance(scores, (str, Path)) else "scores"
            raise UserError(f"{where}: the score of {name} is {score:g}, and the doctor needs accuracies in [0, 1]")
    if held_out is not None and (held_out < 1 or not known):
        raise UserError(f"--held-out {held_out}: type the number of examples that --scores are measured on, and these")
    with ExitStack() as stack:
        opened: dict[Path, Checkpoint] = {}
        problems: dict[Path, str] = {}
        start = open_checkpoint(init, stack, _in_order_of(paths[0], init, reading)) if init else None
        for path in paths:
            try:
                opened[path] = open_checkpoint(path, stack, _in_order_of(paths[0], path, reading))
            except UserError as error:
                problems[path] = str(error)
        opened = dict(zip(opened, alike(list(opened.values())), strict=True))
        if start:
            sound_digest(start)
        reference = [start] if start else list(opened.values())
        models = []
        for path, name in zip(paths, names, strict=True):
            if path in problems:
                models.append(Model(path, name, problem=problems[path]))
                continue
            digest, infinite = looked_through(opened[path])
            odd = [f"tensor {infinite!r} holds NaN or infinity"] if infinite else []
            odd += filter(None, [_fits(opened[path], reference, reading)])
            models.append(Model(path, name, digest, "; ".join(odd)))
        sound = [opened[model.path] for model in models if not model.problem]
        layout = common_layout([*sound, start] if start else sound, reading) if sound else None
        found = geometry(sound, layout, start) if layout else None
        images = any(len(entry.shape) == 4 for entry in layout.entries.values()) if layout else False
    against, findings = init.name if init else "the mean of the models", _findings(models)
    unrelated = None
    if found is not None:
        # With the initialisation, or without one the median with the other models.
        cosines = found.reference_cosines if init else medians_of_others(found.weight_cosines)
        unrelated = cosines < ANOTHER_ORIGIN
        names = [model.name for model in models if not model.problem]
        findings += _of_geometry(names, found, cosines, against, has_init=init is not None)
    if known:
        findings += _of_scores(known)
    unlike = [] if images else ["no tensor is a convolution of images, and there the models are image classifiers"]
    if unrelated is not None and unrelated.any():
        unlike.append("models are not fine-tuned from the same checkpoint")
    likely = _likely(models, known, held_out, unlike)
    return Report(tuple(models), against, found, tuple(findings), known, tuple(likely))


def _likely(
    models: Sequence[Model], scores: Mapping[str, float], held_out: int | None, unlike: Sequence[str]
) -> list[str]:
    """How often soups of such pools were better than their best model, or what is missing to say it."""
    sound = {model.digest: model.name for model in reversed(models) if not model.problem}  # of duplicates the first
    missing = sorted(name for name in sound.values() if name not in scores)
    if len(sound) < 2:
        return ["not said: a soup needs two different models that can be averaged"]
    if missing:
        asked = "--scores scores.json" if not scores else f"a score of {missing[0]} in --scores"
        return [f"not said: type {asked}, held-out accuracies of all models, and --held-out N, the number of examples"]
    if held_out is None:
        return ["not said: type --held-out N, the number of examples that --scores are measured on"]
    return base_rates(features([scores[name] for name in sound.values()], held_out), unlike)


def _findings(models: Sequence[Model]) -> list[str]:
    """One line for each file that makes a soup worse than its best ingredient, or that is there twice."""
    lines = [f"{m.name}: {m.problem}" for m in models if m.problem]
    first: dict[str, str] = {}
    for model in models:
        same = first.setdefault(model.digest, model.name) if model.digest else model.name
        if same != model.name:
            lines.append(f"{model.name} and {same} are the same model, and count twice")
    return lines


def _of_geometry(
    names: Sequence[str], found: Geometry, cosines: NDArray[np.float64], against: str, *, has_init: bool
) -> list[str]:
    whom = f"with {against}" if has_init else "with the other models (median)"
    lines = [
        f"{name}: not fine-tuned from the same checkpoint; its weights have a cosine of {cosine:.2f} {whom}"
        for name, cosine in zip(names, cosines, strict=True)
        if cosine < ANOTHER_ORIGIN
    ]
    count, middle = len(names), float(np.median(found.distances))
    lines += [
        f"{name} went far: {distance / middle:.1f} times the median distance to {against}; such models, of high "
        "learning rates, often lie behind a barrier"
        for name, distance, cosine in zip(names, found.distances, cosines, strict=True)
        if not cosine < ANOTHER_ORIGIN and count > 2 and distance > FAR * middle > 0
    ]
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


def features(scores: Sequence[float], held_out: int) -> dict[str, float]:
    """What is known of a pool before anything is averaged; the calibration pools have a range of each.

    >>> features([0.5, 0.75, 0.625], 600)
    {'models': 3, 'held-out examples': 600, 'best score': 0.75, 'best minus median score': 0.125}
    """
    best = max(scores)
    return {
        "models": len(scores),
        "held-out examples": held_out,
        "best score": best,
        "best minus median score": best - float(np.median(scores)),
    }


def outside(found: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """What of a pool lies outside the calibration pools, with their range: a phrase for each feature.

    >>> outside({"models": 3, "best score": 0.5}, {"models": (12, 72), "best score": (0.4, 0.7)})
    ['models is 3, there 12 to 72']
    """
    return [
        f"{name} is {round(found[name], 3):g}, there {round(low, 3):g} to {round(high, 3):g}"
        for name, (low, high) in ranges.items()
        if not low <= found[name] <= high
    ]


def base_rates(found: Mapping[str, float], unlike: Sequence[str] = (), table: Path = TABLE) -> list[str]:
    """In what share of the calibration pools soups were better and worse, after how this pool is unlike them."""
    known: dict[str, Any] = json.loads(table.read_text(encoding="utf-8"))
    apart = [*unlike, *outside(found, known["ranges"])]
    lines = [f"not calibrated for pools like yours: {'; '.join(apart)}"] if apart else []
    lines.append(
        f"shares of {len(known['pools'])} pools of {known['kind']} in which a soup differs from the best model by more "
        f"than noise ({known['noise']}), with 95 % intervals that count a pool once:"
    )
    for each in known["soups"]:
        better, worse = (
            f"{100 * p:.0f} % [{100 * low:.0f}, {100 * high:.0f}]" for p, low, high in (each["better"], each["worse"])
        )
        lines.append(f"- {each['soup']} soup, {each['on']}: better {better}, worse {worse}")
    return [*lines, known["note"]]


def show(report: Report, console: Console) -> None:
    """A table of the models, the findings, and how often soups of such pools were better."""
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
        score = report.scores.get(model.name)
        table.add_row(model.name, model.digest[:8], *values, "" if score is None else f"{100 * score:.2f} %")
    console.print(table)
    console.print("why a soup of them may be worse than the best:" if report.findings else "nothing wrong was found")
    for finding in report.findings:
        console.print(f"- {finding}", markup=False, highlight=False, soft_wrap=True)
    console.print("will a soup of them be better than the best?")
    for line in report.will_it_help:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
