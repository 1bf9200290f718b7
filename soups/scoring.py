"""What a model is scored by, and whether the difference of two scores is more than luck."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from soups.errors import UserError
from soups.selection import Goal

if TYPE_CHECKING:
    from torch import Tensor

    from soups.candidates import Candidate

RESAMPLES = 2000
Statistics = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]  # weights -> their batch-norm statistics
Metric = Literal["top1", "macro_f1", "worst_group", "matthews", "accuracy_and_f1"]  # see soups/scorers/metrics.py


@dataclass(frozen=True)
class Scored:
    """A score, and what it is made of where that is known."""

    value: float
    answers: NDArray[Any] | None = None  # (N, ...) what the model answered to each example, or what each adds


@dataclass(frozen=True)
class Learning:
    """What a soup is learned by; see `soups.descent`."""

    module: Any  # the network, with weights that do not matter
    batches: Callable[[int], Any]  # epoch -> batches
    loss: Any  # of soups.descent's kind
    rename: Callable[[str], str | None] = lambda name: name  # a tensor's name in files -> in the network


@dataclass(frozen=True)
class Scorer:
    """How candidates are scored."""

    measure: "Callable[[Candidate], Scored]"
    goal: Goal
    metric: str  # what the number is, for people
    key: str  # names everything that a score depends on beside the weights: data, code, settings
    value: Callable[[NDArray[Any], NDArray[Any]], float] | None = None  # of (N, ...) answers that count (N,) times
    n: int | None = None  # examples
    learning: Callable[[int | None], Learning] | None = None  # batch size -> ...; None where none can be learned
    statistics: "Statistics | None" = None  # of a candidate's batch norms on the examples; None where that cannot be


@dataclass(frozen=True)
class Gain:
    """What the soup adds to the best single model's score; positive is better whatever the goal."""

    mean: float
    low: float | None = None  # of the 95 % interval, resampling examples in pairs; None where answers are not known
    high: float | None = None


def mean_of_answers(answers: NDArray[Any], times: NDArray[Any]) -> float:
    """The mean of (N,) numbers that count (N,) times."""
    return float(answers.astype(np.float64) @ times / times.sum())


def scored(value: Any, name: str) -> Scored:
    """A number, or one number for each example, whose mean is the score; numpy's and torch's are taken too.

    Args:
        value: what the user's function returned.
        name: of the candidate, for messages.

    Raises:
        UserError: it is NaN, or no number.
    """
    if hasattr(value, "detach"):  # a tensor, whose module need not be imported to see it
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    values = np.asarray(value)
    if values.ndim > 1 or values.size == 0 or values.dtype.kind not in "biuf":
        raise UserError(
            f"the score of {name} is a {type(value).__name__}, not a number: return a number, or one for each example"
        )
    values = values.astype(np.float64)
    number = float(values.mean())
    if isnan(number):
        raise UserError(f"the score of {name} is NaN: leave that model out, or mend the score")
    return Scored(number, values if values.ndim and values.size > 1 else None)


def gain_of(scorer: Scorer, soup: Scored, single: Scored) -> Gain:
    """The soup's score minus the single model's, with a percentile interval of a paired bootstrap over examples.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    sign = 1 if scorer.goal == "max" else -1
    mean = sign * (soup.value - single.value)
    if scorer.value is None or soup.answers is None or single.answers is None or len(soup.answers) < 2:
        return Gain(mean)
    n, generator = len(soup.answers), np.random.Generator(np.random.PCG64(0))
    differences = []
    for _ in range(RESAMPLES):
        times = np.bincount(generator.integers(n, size=n), minlength=n)
        differences.append(sign * (scorer.value(soup.answers, times) - scorer.value(single.answers, times)))
    low, high = np.quantile(differences, [0.025, 0.975])
    return Gain(mean, float(low), float(high))


def key_of(*parts: Any) -> str:
    """32 hex digits that name JSON values; a path to a file stands for its content.

    >>> key_of("a", 1) == key_of("a", 1) != key_of("a", 2)
    True
    """
    content = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
        else:
            content.update(json.dumps(part, sort_keys=True, default=str).encode())
        content.update(b"\0")
    return content.hexdigest()
