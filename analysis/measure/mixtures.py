"""Means and other mixtures of a pool's models: what they answer, on disk, for figures that need hundreds of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import torch
from rich import get_console
from torch import Tensor

from analysis.measure.methods import SHIFT_MEAN, Method, columns_of, logits_of_model, method_of_answers, titled
from analysis.tables.cells import measured
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.pool import evaluate_all
from soups.average import Loader
from soups.files.atomic import digest_of
from soups.files.weights import Weights, digest
from soups.recipes import mean_of
from store.arrays import cached_array
from store.rows import row_config
from store.runs import Ingredient
from store.workers import spread

T = TypeVar("T")


@dataclass(frozen=True)
class Mixture:
    """Weights that are put together only where what they answer is not on disk; they can be sent to a worker."""

    key: str  # names them
    load: Loader


def mean_mixture(members: Sequence[Ingredient], load: Loader | None = None) -> Mixture:
    """The equal-weight mean of some models, in whatever order; `load` where it is at hand in another way."""
    key = digest_of({"mean of": sorted(each.digest for each in members)})
    return Mixture(key, load or partial(mean_of, [each.load for each in members]))


def mean_logits(
    evaluator: Evaluator, members: Sequence[Ingredient], betas: Sequence[float] | None = None
) -> Callable[[str], Tensor]:
    """Split -> (N, C) float64 mean of members' cached logits, each times its beta where there are some."""
    each = [logits_of_model(member, evaluator) for member in members]

    def logits(split: str) -> Tensor:
        scaled = (beta * one(split).double() for one, beta in zip(each, betas or [1.0] * len(members), strict=True))
        return torch.as_tensor(sum(scaled)) / len(members)

    return logits


def kept_logits(evaluator: Evaluator, weights: Weights) -> Callable[[str], Tensor]:
    """Split -> (N, C) logits of weights that are at hand, kept under their digest."""
    name = digest(weights)
    return lambda split: evaluator.logits(name, lambda: weights, split)


def answers(evaluator: Evaluator, mixture: Mixture, split: str) -> Tensor:
    """(N,) class ids that a mixture predicts on a split, from disk or by a forward pass.

    Class ids are kept and logits are not, which take hundreds of megabytes for each mixture on ImageNet.
    """

    def compute() -> Tensor:
        return evaluator.predicted(evaluator.fresh_logits(mixture.load(), split), split).float().unsqueeze(1)

    path = evaluator.place("answers", split, mixture.key)
    return cached_array(path, (len(evaluator.split(split)), 1), compute).squeeze(1).long()


def method_of_mixture(name: str, mixture: Mixture, evaluator: Evaluator) -> Method:
    """A method from a mixture of weights, which are put together once where any of its answers is missing."""
    once = Mixture(mixture.key, lru_cache(maxsize=1)(mixture.load))
    return method_of_answers(name, 1, partial(answers, evaluator, once), evaluator)


def _answer(config: Experiment, mixtures: Sequence[Mixture]) -> str:
    evaluator = Evaluator(config)
    for each in mixtures:
        method_of_mixture("", each, evaluator)
    return f"{len(mixtures)} mixtures: answered"


def do_missing(
    config: Experiment,
    title: str,
    units: Sequence[T],
    call: Callable[[Sequence[T]], str],
    is_done: Callable[[T], bool],
    *,
    calls: Sequence[Callable[[], str]] = (),
) -> None:
    """Let the cluster's worker processes do the units that are not on disk yet; {} in `title` is how many these are.

    `call` is picklable, does some units and returns a line; `calls` are done instead, where units follow from one
    another.
    """
    missing, workers = [unit for unit in units if not is_done(unit)], config.cluster.workers
    if missing:
        spread(
            title.format(len(missing)),
            calls or [partial(call, missing[i::workers]) for i in range(workers) if missing[i::workers]],
            workers=workers,
            threads=config.cluster.threads,
            units=len(missing),
            done_units=lambda: sum(map(is_done, missing)),
            report=str,
            console=get_console(),
        )


def measure_mixtures(
    config: Experiment, title: str, mixtures: Sequence[Mixture], calls: Sequence[Callable[[], str]] = ()
) -> Evaluator:
    """Evaluate mixtures on every test and shift split, as `do_missing`; returns what `method_of_mixture` reads with."""
    evaluator = Evaluator(config)

    def is_done(each: Mixture) -> bool:
        return all(evaluator.place("answers", split, each.key).exists() for split in config.task.reported)

    distinct = list({each.key: each for each in mixtures}.values())
    do_missing(config, f"evaluating {{}} {title}", distinct, partial(_answer, config), is_done, calls=calls)
    return evaluator


def drawn_columns(config: Experiment) -> dict[str, tuple[str, ...]]:
    """The columns that curves are drawn in, with the splits of each: test, and the mean of shifts if there are any."""
    columns = columns_of(config)
    return {name: columns[name] for name in (config.task.test, SHIFT_MEAN) if name in columns}


def axis_labels(config: Experiment) -> dict[str, str]:
    """What the axis of each drawn column says, with what is measured and its unit.

    >>> from configs.schema import load
    >>> axis_labels(load("demo_tiny"))["shift_mean"], axis_labels(load("figureg2_cifar10"))["shift_mean"]
    ('Mean of 5 shifts, top-1 accuracy (%)', 'CIFAR-10.1, top-1 accuracy (%)')
    """
    shifts = config.task.shifts
    mean = config.task.split_title(shifts[0]) if len(shifts) == 1 else f"mean of {len(shifts)} shifts"
    names = {config.task.test: f"{titled(config.task.name)} test", SHIFT_MEAN: titled(mean)}
    found = {}
    for column, splits in drawn_columns(config).items():
        metric = measured(config.task, splits)
        found[column] = f"{names[column]}, {metric[:1].lower()}{metric[1:]} (%)"
    return found


@dataclass(frozen=True)
class Pair:
    """Two models of a pool."""

    first: Ingredient
    second: Ingredient

    @property
    def mean(self) -> Mixture:
        """The weights half way between them."""
        return mean_mixture((self.first, self.second))

    def larger_lr(self, config: Experiment) -> float:
        """The larger of the peak learning rates of their rows."""
        return max(row_config(config, each.row).optim.lr for each in (self.first, self.second))


def evaluate_models(config: Experiment, pairs: Sequence[Pair]) -> None:
    """Evaluate the models of pairs on every split; what is on disk is kept."""
    members = {each.row: each.folder for pair in pairs for each in (pair.first, pair.second)}
    evaluate_all(config, [members[row] for row in sorted(members)], get_console())


def measure_midpoints(config: Experiment, pairs: Sequence[Pair]) -> Evaluator:
    """Evaluate the models of all pairs, and each pair's mean, as `measure_mixtures`."""
    evaluate_models(config, pairs)
    return measure_mixtures(config, "means of two models", [pair.mean for pair in pairs])
