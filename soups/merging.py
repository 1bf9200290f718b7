"""What becomes of the models' changes from one initialisation: task arithmetic, TIES and DARE.

Each is a function of the same elements of all models, so files are read block by block and memory does not grow with
the number or the size of models. Batch-norm statistics are no task vectors: they are the mean of the models'.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soups.files.checkpoints import BLOCK, sample
from soups.files.dtypes import FLOATS, widen
from soups.mean import STATISTICS, Mean

Floats = NDArray[np.float64]
Changes = Callable[[], Iterable[Floats]]


# What is added to the initialisation at some elements of a tensor: of its name, the number of the first element, and a
# function that gives each model's (n,) difference to the initialisation in turn; it may be asked several times, and an
# array is good until the next one.
Rule = Callable[[str, int, Changes], Floats]


def smallest_kept(
    changes: Callable[[], Iterable[tuple[int, Floats]]], models: int, density: float
) -> tuple[float, ...]:
    """For each model the magnitude from which on a share `density` of its numbers lies; at least one number is kept.

    Magnitudes are ranked as float32, by two readings that count the upper and then the lower half of their bits, so
    that memory does not depend on how many there are. Equal magnitudes are kept together.

    Args:
        changes: gives all numbers of all models, in blocks with the number of the model; called twice.
        models: how many.
        density: in (0, 1].

    >>> smallest_kept(lambda: [(0, np.array([1.0, -4.0])), (0, np.array([3.0, 2.0]))], 1, 0.5)
    (3.0,)
    """
    counts = np.zeros((models, 1 << 16), dtype=np.int64)
    for i, block in changes():
        counts[i] += np.bincount(_bits(block) >> np.uint32(16), minlength=1 << 16)
    wanted = [max(1, int(density * row.sum())) for row in counts]
    upper = [_last_with(row, keep) for row, keep in zip(counts, wanted, strict=True)]
    left = [keep - int(row[half + 1 :].sum()) for row, keep, half in zip(counts, wanted, upper, strict=True)]
    counts[:] = 0
    for i, block in changes():
        bits = _bits(block)
        inside = bits[bits >> np.uint32(16) == upper[i]]
        counts[i] += np.bincount(inside & np.uint32(0xFFFF), minlength=1 << 16)
    lower = [_last_with(row, keep) for row, keep in zip(counts, left, strict=True)]
    found = np.array([high << 16 | low for high, low in zip(upper, lower, strict=True)], dtype=np.uint32)
    return tuple(found.view(np.float32).tolist())


def _last_with(counts: NDArray[np.int64], keep: int) -> int:
    """The largest index from which on there are `keep` counts."""
    return int(np.flatnonzero(counts[::-1].cumsum()[::-1] >= keep)[-1])


def _bits(block: Floats) -> NDArray[np.uint32]:
    """Magnitudes as float32, whose bits are ordered as they are."""
    return np.abs(block).astype(np.float32).view(np.uint32)


@dataclass(frozen=True)
class Ties:
    """Trim, elect a sign, average what agrees with it.

    Source: Yadav et al. 2023, Algorithm 1. Where the trimmed changes sum to zero nothing is added; the authors' code
    takes the sign of the majority of all elements there.
    """

    thresholds: tuple[float, ...]  # of each model, from `smallest_kept` over all of its tensors
    scale: float = 1.0  # lambda of the paper

    def __call__(self, name: str, start: int, changes: Changes) -> Floats:
        """The mean of those trimmed changes whose sign is that of their sum."""
        sign: Floats = np.sign(sum(self._trimmed(changes)))
        total: Floats = np.zeros_like(sign)
        count: Floats = np.zeros_like(sign)
        for change in self._trimmed(changes):
            agrees = np.sign(change) * sign > 0
            total += np.where(agrees, change, 0)
            count += agrees
        merged: Floats = self.scale * total / np.maximum(count, 1)
        return merged

    def _trimmed(self, changes: Changes) -> Iterator[Floats]:
        for change, threshold in zip(changes(), self.thresholds, strict=True):
            yield np.where(np.abs(change).astype(np.float32) >= np.float32(threshold), change, 0)


@dataclass(frozen=True)
class Scaled:
    """The weighted sum of the changes; with `drop` of those that chance leaves, rescaled to the same expectation.

    Which are dropped depends on the seed, the model's key, the tensor's name and the place in it, and on nothing else:
    neither on the other models nor on their order.

    Source: Ilharco et al. 2023, Section 2, whose negative scales take a task away; with `drop` Yu et al. 2024,
    equation 3.
    """

    scales: tuple[float, ...]  # what each model's change is multiplied by
    keys: tuple[str, ...] = ()  # name each model, where something is dropped
    drop: float = 0.0  # p of the paper, in [0, 1)
    seed: int = 0

    def __call__(self, name: str, start: int, changes: Changes) -> Floats:
        """The weighted sum of what is left of the changes."""
        total: Floats | None = None
        for i, (scale, change) in enumerate(zip(self.scales, changes(), strict=True)):
            term = scale * change if self.drop == 0 else self._thinned(f"{self.keys[i]}/{name}/{start}", scale, change)
            total = term if total is None else total + term
        assert total is not None  # there is at least one model
        return total

    def _thinned(self, key: str, scale: float, change: Floats) -> Floats:
        seed = int.from_bytes(hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=16).digest(), "little")
        kept = np.random.Generator(np.random.Philox(seed)).random(len(change)) >= self.drop
        return np.where(kept, change, 0) * (scale / (1 - self.drop))


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
        origin = widen(stored, self._kind(term, name)).astype(np.float64)
        number = 0
        for i, (term, stored) in enumerate(self._stored(name, start, count, self.terms, hashes)):
            if i != self.origin:
                yield number, widen(stored, self._kind(term, name)) - origin
                number += 1

    def all_changes(self) -> Iterator[tuple[int, Floats]]:
        """Those of all tensors that are merged."""
        for name, entry in self.layout.entries.items():
            if entry.dtype in FLOATS and name not in self.layout.kept and not name.endswith(STATISTICS):
                for start in range(0, entry.size, BLOCK):
                    yield from self.changes(name, start, min(BLOCK, entry.size - start))

    def _mean(self, name: str, start: int, count: int, hashes: Sequence[Any]) -> NDArray[Any]:
        if name.endswith(STATISTICS):
            return super()._mean(name, start, count, hashes)
        strange = np.zeros(count, dtype=bool)
        readings = iter([hashes])  # of the first alone

        def changes() -> Iterator[Floats]:
            for _, change in self.changes(name, start, count, next(readings, None)):
                np.logical_or(strange, ~np.isfinite(change), out=strange)
                yield change

        with np.errstate(over="ignore", invalid="ignore"):
            total = self.rule(name, start, changes)
            ((term, stored),) = self._stored(name, start, count, [self.terms[self.origin]], None)
            total = widen(stored, self._kind(term, name)) + total
        total[strange] = np.nan
        if not np.isfinite(total).all():
            self._keep_infinities(name, start, total)
        return self._rounded(name, total)


@dataclass(frozen=True)
class Merging:
    """What `average_files` needs to know of a recipe on task vectors; its first source is the initialisation.

    It is called when the files are open, since some rules read them first.
    """

    recipe: str  # arithmetic, ties or dare
    scales: Mapping[str, float]  # name of a model -> what its change is multiplied by; of ties all are the same
    density: float = 1.0  # share of the changes that is kept, in (0, 1]
    seed: int = 0  # of dare

    def __call__(self, mean: Mean, order: Sequence[int]) -> Merged:
        """The merging in place of a mean whose terms are the sources in this order."""
        origin = order.index(0)
        others = [term for i, term in enumerate(mean.terms) if i != origin]
        scales = tuple(self.scales[term.name] for term in others)
        drop = 1 - self.density if self.recipe == "dare" else 0.0
        keys = tuple(sample(term.checkpoint) for term in others) if drop else ()
        rule: Rule = Scaled(scales, keys, drop, self.seed)
        merged = Merged(**vars(mean), rule=rule, origin=origin)
        if self.recipe != "ties":
            return merged
        thresholds = smallest_kept(merged.all_changes, len(others), self.density)
        return replace(merged, rule=Ties(thresholds, scales[0]))
