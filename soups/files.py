"""The weighted mean of weight files, streamed: any number of models in the memory of a few blocks.

What happens to a tensor depends on its kind:

- floating point (parameters and buffers): the weighted mean, summed in float64 and rounded once to the output's kind;
- integer and boolean: must be equal in all models, and is kept; of batch counters (`num_batches_tracked`) the largest;
- tied (one tensor under several names): counted once, and stays tied. safetensors cannot hold a tensor under two
  names, so the soup has it under one and records the others in its metadata, as safetensors.torch.save_model drops
  them; torch.save'd ingredients are tied where they share memory, safetensors where their metadata says so;
- batch-norm statistics (`running_mean`, `running_var`): averaged, or kept from one file (`keep_from`). Both are
  approximations; `soups.batch_norm.recompute_batch_norm` measures them anew on data;
- NaN and infinity, float8 and complex numbers, and models that do not fit together are refused by file and tensor.

The order in which ingredients are named changes no bit. Sums of rounded numbers depend on their order, so they are
summed in an order of their own: by a hash of each tensor's first bytes, then, where that is equal, by the digest of the
whole content, then by weight.
"""

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from soups.conformance import Layout, common_layout
from store.checkpoints import BLOCK, Checkpoint, Entry, content_digest, digest_file, hash_tensor, opened, sample
from store.dtypes import FLOATS, STORED, OutputDtype, round_once, widen
from store.streamed import StreamedFile, streamed

COUNTER = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var")
FORMAT: Literal[1] = 1  # of `Record`
NO_DIGEST = "0" * 32

Mixing = Sequence[float] | Mapping[str, Sequence[float]]  # one weight a model, or for every tensor one weight a model


@dataclass(frozen=True)
class Ingredient:
    """A file's part in a soup, as the soup's metadata records it."""

    file: str  # its name, without folders
    digest: str  # of its content: store.checkpoints.content_digest
    weight: float | None  # its share, the sum over ingredients is 1; None where every tensor has weights of its own
    keeps_batch_norm: bool = False  # the batch-norm statistics are this file's


@dataclass(frozen=True)
class Record:
    """All that is needed to cook a soup again; JSON, under "soup" in its metadata."""

    format: Literal[1]
    ingredients: tuple[Ingredient, ...]
    weights: list[float] | dict[str, list[float]]  # as given, in the order of `ingredients`
    dtype: OutputDtype
    tied: dict[str, str]
    note: dict[str, Any]  # the recipe, its decisions, versions


@dataclass(frozen=True)
class FileSoup:
    """A soup that was written."""

    path: Path
    layout: Layout
    ingredients: tuple[Ingredient, ...]
    unwrapped: dict[str, str]  # file name -> the key under which its state dict was found


@dataclass(frozen=True)
class _Part:
    """An open ingredient."""

    checkpoint: Checkpoint
    name: str
    weights: Mapping[str, float] | float
    keeps: bool
    digests: dict[str, str]  # of its tensors, as they are read

    def weight(self, tensor: str) -> float:
        return self.weights if isinstance(self.weights, float) else self.weights[tensor]


def _checked(weights: Sequence[float], models: int, where: str) -> list[float]:
    """Weights as they are given: dividing the sum once by theirs is rounded less than dividing each."""
    if len(weights) != models:
        raise UserError(f"weights{where}: need one per model, got {len(weights)} for {models}")
    values = [float(weight) for weight in weights]
    total = math.fsum(values)
    if not all(math.isfinite(v) and v >= 0 for v in values) or total <= 0:
        raise UserError(f"weights{where}: need finite numbers of at least 0 whose sum is above 0, got {values}")
    return values


def _parts(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    weights: Mixing | None,
    keep_from: int | None,
    layout: Layout,
) -> list[_Part]:
    """The ingredients in the order in which they are summed."""
    count = len(checkpoints)
    shares: list[Mapping[str, float] | float]
    if isinstance(weights, Mapping):
        odd = sorted(weights.keys() ^ layout.entries.keys())
        if odd:
            raise UserError(f"weights: need a list for every tensor and nothing else, but see {odd[0]!r}")
        rows = {name: _checked(row, count, f" of {name!r}") for name, row in weights.items()}
        shares = [{name: row[i] for name, row in rows.items()} for i in range(count)]
    else:
        shares = list(_checked([1.0] * count if weights is None else weights, count, ""))
    samples = [sample(checkpoint) for checkpoint in checkpoints]
    keys = []
    for i, checkpoint in enumerate(checkpoints):
        share = shares[i]
        weight = [share] if isinstance(share, float) else [share[name] for name in layout.entries]
        full = digest_file(checkpoint) if samples.count(samples[i]) > 1 else ""
        keys.append((samples[i], full, weight, names[i], i == keep_from))
    order = sorted(range(count), key=keys.__getitem__)
    return [_Part(checkpoints[i], names[i], shares[i], i == keep_from, {}) for i in order]


class _Buffers(threading.local):
    """What one thread computes in: 6 MiB."""

    def __init__(self) -> None:
        self.stored = np.empty(8 * BLOCK, np.uint8)
        self.total = np.empty(BLOCK, np.float64)
        self.term = np.empty(BLOCK, np.float64)


@dataclass(frozen=True)
class _Job:
    """What all tensors of one soup have in common."""

    parts: list[_Part]
    out: StreamedFile
    entries: dict[str, Entry]  # of the soup
    buffers: _Buffers


@dataclass(frozen=True)
class _Mix:
    """One tensor of one soup, and the running hashes of its bytes in each file."""

    job: _Job
    name: str
    entry: Entry  # in the ingredients
    hashes: list[Any]

    def stored(self, start: int, count: int) -> Iterator[tuple[_Part, NDArray]]:
        """The same elements of each file in turn, in one reused buffer."""
        dtype = STORED[self.entry.dtype]
        buffer = self.job.buffers.stored[: count * dtype.itemsize].view(dtype)
        for part, running in zip(self.job.parts, self.hashes, strict=True):
            part.checkpoint.read(self.name, start, buffer)
            running.update(buffer.data)
            yield part, buffer

    def refuse_infinite(self, start: int, count: int) -> None:
        """Say which file is to blame for a sum that is not finite."""
        for part, stored in self.stored(start, count):
            if not np.isfinite(widen(stored, self.entry.dtype)).all():
                raise UserError(f"{part.checkpoint.path}: tensor {self.name!r} holds NaN or infinity")
        raise UserError(f"tensor {self.name!r}: the sum over the models is past what float64 can hold")

    def weight(self, part: _Part) -> float:
        """Of a file in this tensor's mean."""
        if self.name.endswith(STATISTICS) and any(other.keeps for other in self.job.parts):
            return float(part.keeps)
        return part.weight(self.name)

    def mean(self, start: int, count: int) -> NDArray:
        """The weighted mean of `count` elements, in the soup's kind."""
        total, term = self.job.buffers.total[:count], self.job.buffers.term[:count]
        total.fill(0)
        with np.errstate(over="ignore", invalid="ignore"):
            for part, stored in self.stored(start, count):
                values, weight = widen(stored, self.entry.dtype), self.weight(part)
                if weight == 1:
                    np.add(total, values, out=total)
                else:
                    np.multiply(values, weight, out=term, dtype=np.float64)
                    np.add(total, term, out=total)
            total /= math.fsum(map(self.weight, self.job.parts))
        if not np.isfinite(total).all():
            self.refuse_infinite(start, count)
        dtype = self.job.entries[self.name].dtype
        rounded = round_once(total, dtype)
        if not np.isfinite(widen(rounded, dtype)).all():
            raise UserError(f"tensor {self.name!r}: {np.abs(total).max():.3g} is past what {dtype} can hold")
        return rounded

    def equal(self, start: int, count: int) -> NDArray:
        """Integers that are equal in all files, or for batch counters the largest."""
        kept: NDArray = np.empty(0)
        for i, (part, stored) in enumerate(self.stored(start, count)):
            if i == 0:
                kept = stored.copy()
            elif self.name.endswith(COUNTER):
                np.maximum(kept, stored, out=kept)
            elif not np.array_equal(kept, stored):
                raise UserError(
                    f"{part.checkpoint.path}: integer tensor {self.name!r} differs from that of "
                    f"{self.job.parts[0].checkpoint.path}, and has no meaningful average"
                )
        return kept


def _mix_tensor(job: _Job, name: str) -> None:
    first = job.parts[0].checkpoint
    mix = _Mix(job, name, first.entries[first.own(name)], [hash_tensor() for _ in job.parts])
    block = mix.mean if mix.entry.dtype in FLOATS else mix.equal
    for start in range(0, mix.entry.size, BLOCK):
        job.out.write(name, start, block(start, min(BLOCK, mix.entry.size - start)))
    for part, running in zip(job.parts, mix.hashes, strict=True):
        part.digests[part.checkpoint.own(name)] = running.hexdigest()


def _recorded(parts: Sequence[_Part]) -> tuple[Ingredient, ...]:
    """Each part; its digest is zeros until all of its tensors were read."""
    total = math.fsum(part.weights for part in parts if isinstance(part.weights, float))
    found = []
    for part in parts:
        complete = part.digests.keys() == part.checkpoint.entries.keys()
        digest = content_digest(part.checkpoint, part.digests) if complete else NO_DIGEST
        share = part.weights / total if isinstance(part.weights, float) else None
        found.append(Ingredient(part.name, digest, share, part.keeps))
    return tuple(found)


def _record(parts: Sequence[_Part], layout: Layout, dtype: OutputDtype, note: Mapping[str, Any]) -> dict[str, str]:
    """The soup's metadata: its record, a hash of that, and the "format" that transformers ask for."""
    weights: list[float] | dict[str, list[float]]
    if all(isinstance(part.weights, float) for part in parts):
        weights = [part.weight("") for part in parts]
    else:
        weights = {name: [part.weight(name) for part in parts] for name in layout.entries}
    record = Record(FORMAT, _recorded(parts), weights, dtype, layout.ties, dict(note))
    text = json.dumps(asdict(record), sort_keys=True)
    return {"format": "pt", "soup": text, "soup_check": check_of(text)}


def check_of(record: str) -> str:
    """Tells a damaged record, whose names and notes no cooking again could prove wrong."""
    return hashlib.blake2b(record.encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """What the soup's bytes could depend on."""
    return {"numpy": version("numpy")}


def average_files(
    paths: Sequence[Path],
    out: Path,
    *,
    weights: Mixing | None = None,
    dtype: OutputDtype = "keep",
    keep_from: int | None = None,
    threads: int = 2,
    note: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> FileSoup:
    """Write the weighted mean of K weight files; the policy per kind of tensor stands at the top of this module.

    Every file is read once, in blocks of 2**18 elements, and hashed on the way. Memory: 8 MiB a thread, whatever K is.

    Args:
        paths: K files: .safetensors, an index of shards or its folder, or state dicts of torch.save.
        out: a .safetensors file; its metadata records ingredients, digests, weights and `note`.
        weights: of the models, at least 0, in any scale; equal if None. A mapping has a list for each tensor of the
            soup (by the name under which a tied one is kept), as a learned soup by layer needs.
        dtype: of the floating-point tensors written; "keep" is the ingredients'.
        keep_from: index of the file whose batch-norm statistics are kept, instead of averaging them.
        threads: that read and add; the result does not depend on them.
        note: JSON values to record beside, such as the recipe and its decisions.
        names: to record for the files; by default their own, without folders.

    Raises:
        UserError: a bad file, models that do not fit together, NaN or infinity, bad weights, or a full disk.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: a soup is written as .safetensors")
    with opened(paths) as checkpoints:
        layout = common_layout(checkpoints)
        parts = _parts(checkpoints, names or [path.name for path in paths], weights, keep_from, layout)
        entries = {
            name: Entry(dtype, entry.shape) if dtype != "keep" and entry.dtype in FLOATS else entry
            for name, entry in layout.entries.items()
        }
        facts = {"versions": versions()} | dict(note or {})
        with streamed(out, entries, lambda: _record(parts, layout, dtype, facts)) as file:
            job = _Job(parts, file, entries, _Buffers())
            largest_first = sorted(entries, key=lambda name: -entries[name].size)
            with ThreadPoolExecutor(threads) as pool:
                futures = [pool.submit(_mix_tensor, job, name) for name in largest_first]
                try:
                    for future in futures:
                        future.result()
                finally:
                    pool.shutdown(cancel_futures=True)
        unwrapped = {part.name: part.checkpoint.unwrapped for part in parts if part.checkpoint.unwrapped}
        return FileSoup(out, layout, _recorded(parts), unwrapped)
