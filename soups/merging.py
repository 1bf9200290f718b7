"""What becomes of the models' changes from one initialisation, block by block: task arithmetic, TIES and DARE.

Batch-norm statistics are no task vectors: they are the mean of the models'.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soups.files.checkpoints import BLOCK, sample
from soups.files.dtypes import FLOATS, widen
from soups.mean import STATISTICS, Mean

SMALLEST_SUM = 1e-7  # of magnitudes, of which a share is taken
Floats = NDArray[np.float64]
Changes = Callable[[], Iterable[Floats]]
Numbered = Iterable[tuple[int, Floats]]  # blocks of changes with the number of the model
# What is added to the initialisation at some elements of a tensor: of its name, the number of the first element, and a
# function that gives each model's (n,) difference to the initialisation in turn; it may be asked several times, and an
# array is good until the next one.
Rule = Callable[[str, int, Changes], Floats]


@dataclass(frozen=True)
class Kept:
    """Which of a model's changes are kept: those above a magnitude, and some of those that are equal to it."""

    least: float  # the magnitude, as float32
    equals: int  # how many of those that are equal make the share exact
    last: float = np.inf  # the number of the last element that is kept of those that are equal

    def trim(self, start: int, change: Floats) -> Floats:
        """The changes of elements from number `start` on, zero where they are not kept."""
        sizes, least = np.abs(change).astype(np.float32), np.float32(self.least)
        equals = (sizes == least) & (np.arange(start, start + len(change)) <= self.last)
        return np.where((sizes > least) | equals, change, 0)


def smallest_kept(changes: Callable[[], Numbered], densities: Sequence[float]) -> tuple[Kept, ...]:
    """For each model the magnitude from which on a share of its numbers lies; at least one number is kept.

    Magnitudes are ranked as float32, by two readings that count the upper and then the lower half of their bits, so
    that memory does not depend on how many there are. `densities` are in (0, 1].

    >>> smallest_kept(lambda: [(0, np.array([1.0, -4.0])), (0, np.array([3.0, 2.0]))], [0.5])
    (Kept(least=3.0, equals=1, last=inf),)
    """
    counts = np.zeros((len(densities), 1 << 16), dtype=np.int64)
    for i, block in changes():
        counts[i] += np.bincount(_bits(block) >> np.uint32(16), minlength=1 << 16)
    wanted = [max(1, int(density * row.sum())) for density, row in zip(densities, counts, strict=True)]
    upper, left = _from_the_top(counts, wanted)
    counts[:] = 0
    for i, block in changes():
        bits = _bits(block)
        inside = bits[bits >> np.uint32(16) == upper[i]]
        counts[i] += np.bincount(inside & np.uint32(0xFFFF), minlength=1 << 16)
    lower, equals = _from_the_top(counts, left)
    found = np.array([high << 16 | low for high, low in zip(upper, lower, strict=True)], dtype=np.uint32)
    return tuple(map(Kept, found.view(np.float32).tolist(), equals))


def _from_the_top(counts: NDArray[np.int64], wanted: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each row of counts the last index from which on there are as many as wanted, and how many it is to give."""
    at = [int(np.flatnonzero(row[::-1].cumsum()[::-1] >= n)[-1]) for row, n in zip(counts, wanted, strict=True)]
    return at, [n - int(row[i + 1 :].sum()) for row, n, i in zip(counts, wanted, at, strict=True)]


def _bits(block: Floats) -> NDArray[np.uint32]:
    """Magnitudes as float32, whose bits are ordered as they are."""
    return np.abs(block).astype(np.float32).view(np.uint32)


def exactly_kept(changes: Callable[[], Numbered], densities: Sequence[float]) -> tuple[Kept, ...]:
    """The same with no more numbers than the share: of those equal to the magnitude the first; reads three times.

    >>> [kept] = exactly_kept(lambda: [(0, np.array([2.0, -2.0])), (0, np.array([3.0, 2.0]))], [0.5])
    >>> kept.trim(0, np.array([2.0, -2.0, 3.0, 2.0])).tolist()
    [2.0, 0.0, 3.0, 0.0]
    """
    found = list(smallest_kept(changes, densities))
    read, seen = [0] * len(found), [0] * len(found)
    for i, block in changes():
        equals = np.flatnonzero(np.abs(block).astype(np.float32) == np.float32(found[i].least))
        missing = found[i].equals - seen[i]
        if 0 < missing <= len(equals):
            found[i] = replace(found[i], last=read[i] + int(equals[missing - 1]))
        read[i], seen[i] = read[i] + len(block), seen[i] + len(equals)
    return tuple(found)


@dataclass(frozen=True)
class Ties:
    """Trim, elect a sign, average what agrees with it.

    Source: Yadav et al. 2023, Algorithm 1. Where the trimmed changes sum to zero nothing is added; the authors' code
    takes the sign of the majority of all elements there.
    """

    kept: Callable[[str], Sequence[Kept]]  # name of a tensor -> what is kept of each model
    scale: float = 1.0  # lambda of the paper
    weights: Sequence[float] | None = None  # of the models; equal if None
    zero: float = 0.0  # sign that is elected where the sum is zero
    normalize: bool = True  # divide by the weights of what agrees

    def __call__(self, name: str, start: int, changes: Changes) -> Floats:
        """The mean of those trimmed changes whose sign is that of their sum."""
        sign: Floats = np.sign(sum(change for _, change in self._trimmed(name, start, changes)))
        sign[sign == 0] = self.zero
        total, count = np.zeros_like(sign), np.zeros_like(sign)
        for weight, change in self._trimmed(name, start, changes):
            agrees = np.sign(change) * sign > 0
            total += np.where(agrees, change, 0)
            count += weight * agrees
        merged: Floats = self.scale * total
        return merged / np.where(count == 0, 1, count) if self.normalize else merged

    def _trimmed(self, name: str, start: int, changes: Changes) -> Iterator[tuple[float, Floats]]:
        kept = self.kept(name)
        for weight, each, change in zip(self.weights or [1.0] * len(kept), kept, changes(), strict=True):
            yield weight, weight * each.trim(start, change)


@dataclass(frozen=True)
class Scaled:
    """The weighted sum of the changes, or of those that chance leaves, by the seed, the model's key, the tensor's name
    and the place in it alone.

    Source: Ilharco et al. 2023, Section 2, whose negative scales take a task away; with `drops` Yu et al. 2024, eq. 3.
    """

    scales: Sequence[float]  # what each model's change is multiplied by
    keys: Sequence[str] = ()  # name each model, where something is dropped
    drops: Sequence[float] = ()  # p of the paper for each model, in [0, 1); nothing is dropped if empty
    seed: int = 0
    divisors: Callable[[str], Sequence[float]] | None = None  # of a tensor, what is left is divided by; 1 - p if None

    def __call__(self, name: str, start: int, changes: Changes) -> Floats:
        """The weighted sum of what is left of the changes."""
        divisors = [1 - drop for drop in self.drops] if self.divisors is None else self.divisors(name)
        total: Floats | None = None
        for i, (scale, change) in enumerate(zip(self.scales, changes(), strict=True)):
            left = self.left(i, name, start, change) if self.drops else change
            left *= scale / divisors[i] if self.drops else scale
            total = left.copy() if total is None else np.add(total, left, out=total)
        assert total is not None  # there is at least one model
        return total

    def left(self, i: int, name: str, start: int, change: Floats) -> Floats:
        """What chance leaves of a model's changes from number `start` on; zero where they are dropped."""
        key = f"{self.seed}/{self.keys[i]}/{name}/{start}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
        kept = np.random.Generator(np.random.Philox(seed)).random(len(change)) >= self.drops[i]
        return np.where(kept, change, 0)


def left_of_sums(rule: Scaled, changes: Callable[[str], Numbered], name: str) -> list[float]:
    """For each model the sum of magnitudes of what is left of a tensor's changes, as a share of that of all."""
    before, after, read = [0.0] * len(rule.scales), [0.0] * len(rule.scales), [0] * len(rule.scales)
    for i, block in changes(name):
        before[i] += float(np.abs(block).sum())
        after[i] += float(np.abs(rule.left(i, name, read[i], block)).sum())
        read[i] += len(block)
    return [a / b if min(a, b) >= SMALLEST_SUM else 1.0 for a, b in zip(after, before, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Merged(Mean):
    """The initialisation plus what a rule makes of the other models' changes from it, block by block."""

    rule: Rule
    origin: int  # index of the initialisation in `terms`

    def changes(
        self, name: str, start: int, count: int, hashes: Sequence[Any] | None = None
    ) -> Iterator[tuple[int, Floats]]:
        """Number and (n,) float64 difference to the initialisation of each other model, in the order of `terms`."""
        ((term, stored),) = self._stored(name, start, count, [self.terms[self.origin]], None)
        origin = widen(stored, term.kind(name)).astype(np.float64)
        number, change = 0, self.buffers.term[:count]
        for i, (term, stored) in enumerate(self._stored(name, start, count, self.terms, hashes)):
            if i != self.origin:
                yield number, np.subtract(widen(stored, term.kind(name)), origin, out=change)
                number += 1

    def all_changes(self, *names: str) -> Iterator[tuple[int, Floats]]:
        """Those of some tensors; of all that are merged if none is named."""
        for name, entry in self.layout.entries.items():
            merged = entry.dtype in FLOATS and name not in self.layout.kept and not name.endswith(STATISTICS)
            for start in range(0, entry.size, BLOCK) if merged and (not names or name in names) else ():
                yield from self.changes(name, start, min(BLOCK, entry.size - start))

    def _mean(self, name: str, start: int, count: int, hashes: Sequence[Any]) -> NDArray[Any]:
        if name.endswith(STATISTICS):
            return super()._mean(name, start, count, hashes)
        strange = np.zeros(count, dtype=bool)
        readings = iter([hashes])  # of the first alone

        def changes() -> Iterator[Floats]:
            for _, change in self.changes(name, start, count, next(readings, None)):
                finite = np.isfinite(change)
                if not finite.all():
                    np.logical_or(strange, ~finite, out=strange)
                yield change

        with np.errstate(over="ignore", invalid="ignore"):
            total = self.rule(name, start, changes)
            ((term, stored),) = self._stored(name, start, count, [self.terms[self.origin]], None)
            total = widen(stored, term.kind(name)) + total
        total[strange] = np.nan
        if not np.isfinite(total).all():
            self._keep_infinities(name, start, total)
        return self._rounded(name, total)


@dataclass(frozen=True)
class Merging:
    """What `average_files` needs to know of a recipe on task vectors; its first source is the initialisation.

    It is called when the files are open, since some rules read them first. A soup's note has its fields.
    """

    recipe: str  # arithmetic, ties, dare
    scales: Mapping[str, float]  # name of a model -> what its change is multiplied by; of ties all are the same
    density: float | Mapping[str, float] = 1.0  # share of the changes that is kept, in (0, 1]; or of each model
    seed: int = 0  # of dare
    weights: Mapping[str, float] = field(default_factory=dict)  # of ties; equal if empty
    per: str = "model"  # of ties: what is ranked together, the changes of a "model" or of a "tensor"
    normalize: bool = True  # of ties
    rescale: str = "density"  # of dare: what is left is divided by the density; or "l1" or "none"

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> "Merging":
        """The merging that a soup's note speaks of."""
        return cls(**{each.name: note[each.name] for each in fields(cls) if each.name in note})

    def __call__(self, mean: Mean, order: Sequence[int]) -> Merged:
        """The merging in place of a mean whose terms are the sources in this order."""
        origin = order.index(0)
        others = [term for i, term in enumerate(mean.terms) if i != origin]
        scales = [self.scales[term.name] for term in others]
        given = self.density
        densities = [given[term.name] if isinstance(given, Mapping) else given for term in others]
        drops = [1 - density for density in densities] if self.recipe == "dare" and min(densities) < 1 else []
        keys = [sample(term.checkpoint) for term in others] if drops else []
        rule = Scaled(scales, keys, drops, self.seed)
        merged = Merged(**vars(mean), rule=rule, origin=origin)
        if self.recipe == "ties":
            weights = [self.weights[term.name] for term in others] if self.weights else None
            if self.per == "model":
                kept = smallest_kept(merged.all_changes, densities)
                return replace(merged, rule=Ties(lambda _: kept, scales[0], weights, normalize=self.normalize))
            exact = cache(lambda name: exactly_kept(lambda: merged.all_changes(name), densities))
            return replace(merged, rule=Ties(exact, scales[0], weights, 1.0, self.normalize))
        if self.rescale == "none":
            rule = replace(rule, divisors=lambda _: [1.0] * len(others))
        elif self.rescale == "l1" and drops:
            rule = replace(rule, divisors=cache(partial(left_of_sums, rule, merged.all_changes)))
        return replace(merged, rule=rule)


def undivided(mean: Mean, _: Sequence[int]) -> Mean:
    """The weighted sum in place of a mean."""
    return replace(mean, total=1.0)
