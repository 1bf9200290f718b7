"""What models are scored by, and whether the difference of two scores is more than luck."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from math import comb, isfinite, isnan, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from soups.errors import UserError
from soups.selection import Goal

if TYPE_CHECKING:
    from torch import Tensor

    from soups.candidates import Candidate
    from soups.sources import Pool

RESAMPLES = 2000
PERMUTATIONS = 10_000
Statistics = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]  # weights -> their batch-norm statistics
Metric = Literal["top1", "macro_f1", "worst_group", "matthews", "accuracy_and_f1"]  # see soups/scorers/metrics.py
NETWORKS = "write timm:NAME, open_clip:NAME, transformers:FOLDER or function:module:name"


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
class HeldOut:
    """Examples that neither trained the models nor will test the soup; what is None is the scorer's to choose."""

    kind: Literal["images", "texts", "choices", "perplexity"]
    path: Path
    network: str | None = None  # timm:NAME, open_clip:NAME, transformers:FOLDER, function:module:name
    metric: Metric = "top1"  # of images and texts: what is counted
    batch_size: int | None = None  # examples of a forward pass
    image_size: int | None = None  # pixels, where the network does not say
    templates: str = "openai"  # of open_clip without a head: prompts around the class names, or `name` for them alone
    columns: tuple[str, ...] = ("text",)  # of texts: what is read; two are a pair
    label: str = "label"  # of texts: the column of class numbers, or of class names as in the network's config.json
    max_length: int | None = None  # tokens of a text or pair, of a window, of a prompt with a choice
    per_token: bool = False  # of choices: compare mean log-likelihoods of a token, not sums, which favour short choices
    workers: int | None = None  # processes that decode images; None: one for each core, at most 8

    @property
    def library(self) -> str:
        """What `network` says before the colon."""
        return (self.network or "").partition(":")[0]

    @property
    def name(self) -> str | None:
        """What `network` says behind the colon; None: a config beside the models says it."""
        return (self.network or "").partition(":")[2] or None

    def scorer(self, pool: "Pool") -> Scorer:
        """How models of this pool are scored."""
        if not self.path.exists():
            raise UserError(f"--{self.kind} {self.path} does not exist")
        if self.network is not None and self.library not in ("timm", "open_clip", "transformers", "function"):
            raise UserError(f"--network {self.network}: {NETWORKS}")
        if self.library == "function" and (self.name or "").count(":") != 1:
            raise UserError(
                f"--network {self.network}: write function:module:name, as in function:torchvision.models:resnet18"
            )
        if self.kind != "images" and self.library not in ("", "transformers"):
            raise UserError(f"--{self.kind} is read by networks of transformers: write --network transformers:FOLDER")
        # Each loads torch and its library, which take seconds.
        module = import_module(f"soups.scorers.{'images' if self.kind == 'images' else 'language'}")
        made: Scorer = getattr(module, f"of_{self.kind}")(self, pool)
        return made


def mean_of_answers(answers: NDArray[Any], times: NDArray[Any]) -> float:
    """The mean of (N,) numbers that count (N,) times."""
    return float(answers.astype(np.float64) @ times / times.sum())


def scored(value: Any, name: str) -> Scored:
    """What a user's function returned: a number, or one for each example, whose mean is the score."""
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


@dataclass(frozen=True)
class Gain:
    """What a soup adds to another model's score; positive is better whatever the goal. Alone, answers are not known."""

    mean: float
    low: float | None = None  # of the 95 % interval, resampling examples in pairs
    high: float | None = None
    z: float | None = None  # the mean over its standard deviation when a coin swaps the two models on each example
    p: float | None = None  # two-sided, of the same coins
    test: str = ""  # McNemar, which it is for answers of 0 and 1, or permutation


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


def sign_flip_p(effects: NDArray[Any], *, permutations: int = 100_000, seed: int = 0) -> float:
    """The two-sided p-value, in (0, 1], of a sum of effects, when a coin says the sign of each.

    Of differences of paired answers the coin swaps the two models on that example, so for hits it is McNemar's test.

    Args:
        effects: (N,) what each example adds to the difference of two models.
        permutations: how many are drawn. Where no more outcomes than that can come up, all are gone through, with
            their probabilities, and the test is exact; effects of one size are counted, not listed.
        seed: of the draws, with which p is at least 1 / (permutations + 1).

    Source: Good 2005, chapter 3; the count of the observed one among those drawn is Phipson and Smyth 2010, eq. 2.

    >>> sign_flip_p(np.array([1.0, 1.0, 1.0, 0.0]))
    0.25
    """
    sizes, counts = np.unique(np.abs(effects[effects != 0]), return_counts=True)
    # Sums that are equal on paper differ in the last digits; they count as equally extreme.
    to_reach = abs(float(effects.sum())) - 1e-9 * float(sizes @ counts)
    if len(counts) < 2 or prod(int(count) + 1 for count in counts) <= permutations:
        return min(1.0, _chance_of_all(sizes, counts, to_reach))
    return (1 + _drawn_as_extreme(sizes, counts, to_reach, permutations, seed)) / (1 + permutations)


def _chance_of_all(sizes: NDArray[Any], counts: NDArray[Any], to_reach: float) -> float:
    """The chance that counts[v] of each sizes[v], with random signs, add up to at least so far from 0."""
    # Of each number of heads among so many coins.
    chances = [[comb(count, heads) / 2**count for heads in range(count + 1)] for count in counts.tolist()]
    p = 0.0
    for plus in product(*(range(count + 1) for count in counts)):  # how many of each have a plus
        total = sum(size * (2 * k - count) for size, k, count in zip(sizes, plus, counts, strict=True))
        if abs(total) >= to_reach:
            p += prod(chance[k] for chance, k in zip(chances, plus, strict=True))
    return float(p)


def _drawn_as_extreme(sizes: NDArray[Any], counts: NDArray[Any], to_reach: float, draws: int, seed: int) -> int:
    """How many of so many random sums are at least so far from 0; in blocks, so that memory does not grow."""
    generator = np.random.Generator(np.random.PCG64(seed))
    block = max(1, 2**20 // len(counts))
    reached, total, repeated = 0, float(counts @ sizes), counts.max() > 1
    for start in range(0, draws, block):
        shape = (min(block, draws - start), len(counts))
        # Of scores that never repeat each sign is a coin, which is drawn faster than a binomial.
        plus = generator.binomial(counts, 0.5, shape) if repeated else generator.integers(2, size=shape, dtype=np.int8)
        reached += int((np.abs(2 * (plus.astype(np.float64) @ sizes) - total) >= to_reach).sum())
    return reached
