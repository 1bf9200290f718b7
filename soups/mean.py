"""The weighted mean of models, block by block: any number of them, in files or in memory, in a few blocks' memory.

What happens to a tensor depends on its kind:

- floating point (parameters and buffers): the weighted mean, summed in float64 and rounded once to the output's kind;
  where models have several kinds, the narrowest that holds all of them;
- integer and boolean: must be equal in all models, and is kept; of counters (`num_batches_tracked`) the largest;
- tied (one tensor under several names): counted once. It is written under each name that a file holds, since a
  network that asks for all of them is loaded strictly; names that no file holds are recorded in the soup's metadata;
- batch-norm statistics (`running_mean`, ...): averaged, or those of one file; `soups.batch_norm` measures them anew;
- NaN, infinities that are not the same in all models, float8 and complex numbers, and models that do not fit together
  are refused by file and tensor.

The order in which files are named changes no bit. Sums of rounded numbers depend on their order, so they are summed in
an order of their own: by a hash of each tensor's first bytes, then, where that is equal, by the digest of the whole
content, then by weight.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from soups.conformance import LEAVE_OUT, Layout, common_layout
from soups.errors import UserError
from soups.files.checkpoints import (
    BLOCK,
    Checkpoint,
    Entry,
    content_digest,
    digest_file,
    hash_tensor,
    sample,
    streamed,
    tensor_digests,
)
from soups.files.dtypes import FLOATS, STORED, OutputDtype, round_once, widen
from soups.files.folders import short_names
from soups.files.opening import opened
from soups.files.reading import COUNTERS, Reading
from soups.record import FORMAT, Ingredient, Record, versions

STATISTICS = ("running_mean", "running_var")

Mixing = Sequence[float] | Mapping[str, Sequence[float]]  # one weight a model, or for every tensor one weight a model


@dataclass(frozen=True)
class Term:
    """A model in a sum."""

    checkpoint: Checkpoint
    weights: Mapping[str, float] | float = 1.0  # of each tensor or of all, in any scale
    name: str = ""
    keeps: bool = False  # the batch-norm statistics are this one's
    digests: dict[str, str] | None = None  # of its tensors as they are read, where wanted

    def weight(self, tensor: str) -> float:
        """Of this model in the mean of a tensor."""
        return self.weights if isinstance(self.weights, float) else self.weights[tensor]

    def kind(self, tensor: str) -> str:
        """Of a tensor's numbers in this model."""
        return self.checkpoint.entry(tensor).dtype


@dataclass(frozen=True)
class FileSoup:
    """A soup that was written."""

    path: Path
    layout: Layout
    ingredients: tuple[Ingredient, ...]
    lines: list[str]

    def remarks(self) -> list[str]:
        """What a reader would not guess about how it was made, a line each."""
        return self.lines


class _Buffers(threading.local):
    """What one thread computes in: 6 MiB."""

    def __init__(self) -> None:
        self.stored = np.empty(8 * BLOCK, np.uint8)
        self.total = np.empty(BLOCK, np.float64)
        self.term = np.empty(BLOCK, np.float64)


@dataclass(frozen=True)
class Mean:
    """The weighted mean of some models, tensor by tensor and block by block."""

    terms: Sequence[Term]  # in the order in which they are summed
    layout: Layout
    dtype: OutputDtype | Mapping[str, str] = "keep"  # of the floats that come out; a mapping has each tensor's
    total: float | None = None  # what sums are divided by; that of the weights if None
    first: int = 0  # index of the model whose tensors stand in for those that are not averaged
    format: Literal[1, 2] = FORMAT
    buffers: _Buffers = field(default_factory=_Buffers)

    def entry(self, name: str) -> Entry:
        """What a tensor of the mean is."""
        entry = self.layout.entries[name]
        if entry.dtype not in FLOATS or self.dtype == "keep":
            return entry
        return Entry(self.dtype if isinstance(self.dtype, str) else self.dtype[name], entry.shape)

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """Where each block of a tensor begins, and its elements, which are good until the next is asked for."""
        entry = self.layout.entries[name]
        hashes = [hash_tensor() for _ in self.terms]
        for start in range(0, entry.size, BLOCK):
            count = min(BLOCK, entry.size - start)
            if name in self.layout.kept:
                ((_, stored),) = self._stored(name, start, count, [self.terms[self.first]], None)
                kind = self.terms[self.first].kind(name)
                yield start, self._rounded(name, widen(stored, kind)) if kind in FLOATS else stored
            else:
                yield start, (self._mean if entry.dtype in FLOATS else self._equal)(name, start, count, hashes)
        if name not in self.layout.kept:
            for term, running in zip(self.terms, hashes, strict=True):
                if term.digests is not None:
                    term.digests[term.checkpoint.own(name)] = running.hexdigest()

    def _stored(
        self, name: str, start: int, count: int, terms: Sequence[Term], hashes: Sequence[Any] | None
    ) -> Iterator[tuple[Term, NDArray[Any]]]:
        """The same elements of each model in turn, in one reused buffer."""
        for i, term in enumerate(terms):
            kind = STORED[term.kind(name)]
            buffer = self.buffers.stored[: count * kind.itemsize].view(kind)
            term.checkpoint.read(name, start, buffer)
            if hashes is not None and term.digests is not None:
                hashes[i].update(buffer.data)
            yield term, buffer

    def weight(self, term: Term, name: str) -> float:
        """Of a model in a tensor's mean."""
        if name.endswith(STATISTICS) and any(other.keeps for other in self.terms):
            return float(term.keeps)
        return term.weight(name)

    def _mean(self, name: str, start: int, count: int, hashes: Sequence[Any]) -> NDArray[Any]:
        """The weighted mean of `count` elements, in the soup's kind."""
        total, product = self.buffers.total[:count], self.buffers.term[:count]
        with np.errstate(over="ignore", invalid="ignore"):
            for i, (term, stored) in enumerate(self._stored(name, start, count, self.terms, hashes)):
                values, weight = widen(stored, term.kind(name)), self.weight(term, name)
                if i == 0:
                    np.multiply(values, weight, out=total, dtype=np.float64)
                elif weight == 1:
                    np.add(total, values, out=total)
                else:
                    np.multiply(values, weight, out=product, dtype=np.float64)
                    np.add(total, product, out=total)
            total /= self.total or math.fsum(self.weight(term, name) for term in self.terms)
        if self.format == 1:
            total += 0.0  # its sums began with 0, and had no -0
        if not np.isfinite(total).all():
            self._keep_infinities(name, start, total)
        return self._rounded(name, total)

    def _rounded(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        kind = self.entry(name).dtype
        rounded = round_once(values.astype(np.float64, copy=False), kind)
        finite = np.isfinite(widen(rounded, kind))
        if not finite.all() and np.isfinite(values[~finite]).any():
            largest = np.abs(values[np.isfinite(values)]).max()
            raise UserError(f"tensor {name!r}: {largest:.3g} is past what {kind} can hold")
        return rounded

    def _keep_infinities(self, name: str, start: int, total: NDArray[Any]) -> None:
        """Put infinities that all models have in the same place into the mean, as a mask's; refuse all others."""
        first: NDArray[Any] | None = None
        for term, stored in self._stored(name, start, len(total), self.terms, None):
            values = widen(stored, term.kind(name)).astype(np.float64)
            infinities = np.where(np.isinf(values), values, 0)
            first = infinities if first is None else first
            if np.isnan(values).any() or not np.array_equal(infinities, first):
                culprit = next(
                    other
                    for other, block in self._stored(name, start, len(total), self.terms, None)
                    if not np.isfinite(widen(block, other.kind(name))).all()
                )
                raise UserError(f"{culprit.checkpoint.path}: tensor {name!r} holds NaN or infinity")
        assert first is not None  # there is a model
        total[np.isinf(first)] = first[np.isinf(first)]
        if not np.isfinite(total[first == 0]).all():
            raise UserError(f"tensor {name!r}: the sum over the models is past what float64 can hold")

    def _equal(self, name: str, start: int, count: int, hashes: Sequence[Any]) -> NDArray[Any]:
        """Integers that are equal in all models, or for counters the largest."""
        kept: NDArray[Any] = np.empty(0)
        for i, (term, stored) in enumerate(self._stored(name, start, count, self.terms, hashes)):
            if i == 0:
                kept = stored.copy()
            elif name.endswith(COUNTERS):
                np.maximum(kept, stored, out=kept)
            elif not np.array_equal(kept, stored):
                raise UserError(
                    f"{term.checkpoint.path}: integer tensor {name!r} differs from that of "
                    f"{self.terms[0].checkpoint.path}, and has no meaningful average"
                    + (f" ({LEAVE_OUT})" if term.digests is not None else "")
                )
        return kept


def _terms(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    weights: Mixing | None,
    keep_from: int | None,
    layout: Layout,
) -> tuple[list[Term], list[int]]:
    """The models in the order in which they are summed, and their indices as they were named.

    Weights are as they were given: dividing the sum once by theirs is rounded less than dividing each.
    """
    terms, keys = [], []
    for i, (checkpoint, content) in enumerate(zip(checkpoints, _contents(checkpoints), strict=True)):
        share: Mapping[str, float] | float
        if isinstance(weights, Mapping):
            odd = sorted(weights.keys() ^ layout.entries.keys())
            if odd:
                raise UserError(f"weights: need a list for every tensor and nothing else, but see {odd[0]!r}")
            share = {name: float(row[i]) for name, row in weights.items()}
            row = [share[name] for name in layout.entries]
        else:
            share = 1.0 if weights is None else float(weights[i])
            row = [share]
        terms.append(Term(checkpoint, share, names[i], i == keep_from, {}))
        keys.append((*content, row, names[i], i == keep_from))
    order = sorted(range(len(terms)), key=keys.__getitem__)
    return [terms[i] for i in order], order


def _contents(checkpoints: Sequence[Checkpoint]) -> list[tuple[str, str]]:
    """For each model a hash of its tensors' first bytes and, where models that agree in that are several files, one
    of everything in it.
    """
    samples = [sample(checkpoint) for checkpoint in checkpoints]
    status = [checkpoint.path.stat() for checkpoint in checkpoints]  # the same for two names of one file
    files = [(s.st_dev, s.st_ino, c.unwrapped) for s, c in zip(status, checkpoints, strict=True)]
    distinct = Counter(first for first, _ in set(zip(samples, files, strict=True)))
    digests: dict[Any, str] = {}
    for first, file, checkpoint in zip(samples, files, checkpoints, strict=True):
        if distinct[first] > 1 and file not in digests:
            digests[file] = digest_file(checkpoint)
    return [(first, digests.get(file, "")) for first, file in zip(samples, files, strict=True)]


def _record(mean: Mean, reading: Reading | None, dtype: OutputDtype, note: Mapping[str, Any]) -> Record:
    """What is known of the soup; an ingredient's digest is zeros until all of its tensors were read."""
    shares = [term.weights for term in mean.terms if isinstance(term.weights, float)]
    weights = shares or {name: [term.weight(name) for term in mean.terms] for name in mean.layout.entries}
    ingredients = []
    for term in mean.terms:
        digests = term.digests or {}
        complete = digests.keys() == term.checkpoint.entries.keys()
        digest = content_digest(term.checkpoint, digests) if complete else "0" * 32
        share = term.weight("") / math.fsum(shares) if shares else None
        ingredients.append(Ingredient(term.name, digest, share, term.keeps))
    ties, kept = mean.layout.ties, mean.layout.kept or mean.layout.dropped
    first = mean.first if kept else None
    return Record(mean.format, tuple(ingredients), weights, dtype, ties, dict(note), reading or Reading(), first)


def average_files(
    sources: Sequence[Path],
    out: Path,
    *,
    weights: Mixing | None = None,
    dtype: OutputDtype = "keep",
    keep_from: int | None = None,
    threads: int = 2,
    note: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    reading: Reading | None = None,
    first: int = 0,
    sync: bool = True,
    merging: Callable[[Mean, Sequence[int]], Mean] | None = None,
    format: Literal[1, 2] = FORMAT,  # as the record calls it
) -> FileSoup:
    """Write the weighted mean of K weight files; the policy per kind of tensor stands at the top of this module.

    Every file is read once, in blocks of 2**18 elements, and hashed on the way. Memory: 8 MiB a thread, whatever K is.

    Args:
        sources: K files of any kind that `open_checkpoint` reads.
        out: a .safetensors file; its metadata is the `Record`, with `note` and `names`, by default as `short_names`.
        weights: finite, in any scale, with a sum above 0; equal if None. A mapping has a list for each tensor of the
            soup, by the name under which a tied one is kept.
        dtype: of the floating-point tensors written; "keep" is the ingredients'.
        keep_from: index of the file whose batch-norm statistics are kept, instead of averaging them.
        first: index of the file whose tensors stand in for those that are not averaged.
        merging: what takes the place of the mean of models in this order; see `soups.merging`.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: a soup is written as .safetensors")
    with opened(sources, reading) as checkpoints:
        layout = common_layout(checkpoints, reading or Reading(), first)
        terms, order = _terms(checkpoints, names or short_names(sources), weights, keep_from, layout)
        mean = Mean(terms, layout, dtype, first=order.index(first), format=format)
        mean = mean if merging is None else merging(mean, order)
        written = {name: [name] if format == 1 else layout.names_of(name) for name in layout.entries}
        entries = {other: mean.entry(name) for name, others in written.items() for other in others}
        facts = {"versions": versions()} | dict(note or {})

        def record() -> Record:
            return _record(mean, reading, dtype, facts)

        with streamed(out, entries, lambda: record().metadata(), sync=sync) as write:

            def mix(name: str) -> None:
                for start, block in mean.blocks(name):
                    for other in written[name]:
                        write(other, start, block)

            def hash_rest(term: Term) -> None:
                assert term.digests is not None
                rest = term.checkpoint.entries.keys() - term.digests.keys()
                term.digests.update(tensor_digests(term.checkpoint, rest))

            largest_first = sorted(layout.entries, key=lambda name: -layout.entries[name].size)
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(mix, largest_first))  # where one fails, those that have not begun are left out
                list(pool.map(hash_rest, terms))  # copies of tied tensors, and what is not averaged
        ingredients = record().ingredients
        return FileSoup(out, layout, ingredients, _remarks(mean, ingredients))


def _remarks(mean: Mean, ingredients: Sequence[Ingredient]) -> list[str]:
    """What a reader would not guess about how a soup was made, a line each."""
    lines, layout, checkpoints = [], mean.layout, {term.name: term.checkpoint for term in mean.terms}
    reads = {file: checkpoint.unwrapped for file, checkpoint in checkpoints.items()}
    leaves = {file: ", ".join(checkpoint.dropped) for file, checkpoint in checkpoints.items()}
    for what, texts in (("reads", reads), ("leaves out", leaves)):
        for text in filter(None, dict.fromkeys(texts.values())):
            files = [file for file in texts if texts[file] == text]
            lines.append(f"{what} {text} of {files[0] if len(files) == 1 else f'{len(files)} files'}")
    seen: dict[str, str] = {}
    for ingredient in ingredients:
        same = seen.setdefault(ingredient.digest, ingredient.file)
        if same != ingredient.file:
            lines.append(f"{ingredient.file} and {same} are the same model, which counts twice")
    lines += [f"{name} is not averaged: it is the first model's" for name in layout.kept]
    lines += [f"{name} is dropped: the first model does not have it" for name in layout.dropped]
    averaged = {name: entry.dtype for name, entry in layout.entries.items() if name not in layout.kept}
    if mean.dtype == "keep" and any(term.kind(name) != kind for name, kind in averaged.items() for term in mean.terms):
        floats = {entry.dtype for entry in layout.entries.values()}.intersection(FLOATS)
        lines.append(f"files have several kinds of numbers; the soup is {' and '.join(sorted(floats))}")
    return lines
