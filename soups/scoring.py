"""What a model is scored by, and whether the difference of two scores is more than luck."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, isnan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from soups.errors import UserError
from soups.paired import sign_flip_p
from soups.selection import Goal

if TYPE_CHECKING:
    from torch import Tensor

    from soups.candidates import Candidate

RESAMPLES = 2000
PERMUTATIONS = 10_000
Statistics = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]  # weights -> their batch-norm statistics
Metric = Literal["top1", "macro_f1", "worst_group", "matthews", "accuracy_and_f1"]  # see soups/scorers/metrics.py


@dataclass(frozen=True)
class Scored:
    """A score, and what it is made of where that is known."""

    value: float
    answers: NDArray[Any] | None = None  # (N, ...) what the model answered to each example, or what each adds
    examples: str = ""  # names the examples, where the score says which they are


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
    """What a soup adds to another model's score; positive is better whatever the goal. Alone, answers are not known."""

    mean: float
    low: float | None = None  # of the 95 % interval, resampling examples in pairs
    high: float | None = None
    z: float | None = None  # the mean over its standard deviation when a coin swaps the two models on each example
    p: float | None = None  # two-sided, of the same coins
    test: str = ""  # McNemar, which it is for answers of 0 and 1, or permutation


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
        what = f"an array {values.shape}" if values.ndim else f"a {type(value).__name__}"
        raise UserError(f"the score of {name} is {what}, not a number: return a number, or one for each example")
    values = values.astype(np.float64)
    number = float(values.mean())
    if isnan(number):
        raise UserError(f"the score of {name} is NaN: leave that model out, or mend the score")
    return Scored(number, values if values.ndim and values.size > 1 else None)


def gain_of(scorer: Scorer, soup: Scored, single: Scored) -> Gain:
    """The soup's score minus the other model's, with a percentile interval of a paired bootstrap over examples, and p.

    Source: Efron and Tibshirani 1993, chapters 13 and 15; McNemar 1947.
    """
    sign = 1 if scorer.goal == "max" else -1
    mean, ours, theirs, value = sign * (soup.value - single.value) + 0.0, soup.answers, single.answers, scorer.value
    if value is None or ours is None or theirs is None or len(ours) < 2 or not isfinite(mean):
        return Gain(mean)
    n, generator = len(ours), np.random.Generator(np.random.PCG64(0))
    if value is mean_of_answers:
        effects = sign * (ours.astype(np.float64) - theirs.astype(np.float64))
        draws = [float(effects[generator.integers(n, size=n)].mean()) for _ in range(RESAMPLES)]
        spread, p = sqrt(float(effects @ effects)) / n, sign_flip_p(effects, permutations=PERMUTATIONS)
        test = "McNemar" if np.isin([ours, theirs], (0, 1)).all() else "permutation"
    else:
        draws, swapped, once = [], [], np.ones(n)
        for _ in range(RESAMPLES):
            times = np.bincount(generator.integers(n, size=n), minlength=n)
            draws.append(sign * (value(ours, times) - value(theirs, times)))
            coins = generator.integers(2, size=(n, *[1] * (ours.ndim - 1))) == 1
            swapped.append(value(np.where(coins, theirs, ours), once) - value(np.where(coins, ours, theirs), once))
        as_extreme = np.abs(swapped) >= abs(mean) * (1 - 1e-9)
        spread, p = sqrt(float(np.square(swapped).mean())), float((1 + as_extreme.sum()) / (1 + RESAMPLES))
        test = "permutation"
    low, high = np.quantile(draws, [0.025, 0.975])
    return Gain(mean, float(low), float(high), mean / spread if spread else 0.0, p, test)


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
