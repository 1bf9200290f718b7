"""Scores of the models of a pool and of their mixtures: given, found in the journal, or computed by all processes."""

import base64
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, isnan
from pathlib import Path
from typing import Any

import numpy as np

from soups.averaging import Averaging
from soups.candidates import Candidate
from soups.checks import sound_digest
from soups.errors import UserError
from soups.files.atomic import read_jsonl, write_jsonl
from soups.files.opening import opened
from soups.files.tables import column, read_table, read_text
from soups.ranks import from_first, spread, this_rank
from soups.scoring import Scored, Scorer, gain_of, key_of
from soups.selection import Mixture, Result
from soups.sources import Pool

Given = Mapping[str, float] | str | Path | None  # a dict; or a .json dict, a .jsonl or .csv of "file" and "score"


class Journal:
    """Results of candidates already tried, on disk as they come, so that a restart pays for none twice.

    A recipe is deterministic: a restart asks for the same candidates in the same order, and finds them here.
    """

    def __init__(self, path: Path | None):
        self.path = path
        try:
            rows = read_jsonl(path) if path is not None and path.exists() else []
            self.known: dict[str, Any] = {row["key"]: row["result"] for row in rows}
        except (IsADirectoryError, KeyError, TypeError):
            raise UserError(
                f"{path} is no journal of scores: name another file, or one that is not there yet"
            ) from None

    def keep(self, key: str, result: Any) -> None:
        """Remember a result, on disk too."""
        self.known[key] = result
        if self.path is not None:
            write_jsonl(self.path, [{"key": key, "result": result} for key, result in self.known.items()])

    def lookup(self, key: str, compute: Callable[[], Any]) -> Any:
        """What is known, else computed."""
        if key not in self.known:
            self.keep(key, compute())
        return self.known[key]


def digests_of(pool: Pool, paths: Sequence[Path]) -> list[str]:
    """A name for the content of each file, which is read once."""
    if pool.adapters:
        from soups.lora import digest_of_folder  # noqa: PLC0415  # torch takes seconds

        return [digest_of_folder(path) for path in paths]
    found = []
    for path in paths:
        with opened([path], pool.reading) as (checkpoint,):
            found.append(sound_digest(checkpoint))
    return found


def _rows(path: Path) -> list[tuple[str, Any]]:
    if path.suffix != ".json":
        rows = read_table(path)
        return list(zip(column(path, rows, "file"), column(path, rows, "score"), strict=True))
    try:
        return list(json.loads(read_text(path)).items())
    except (ValueError, AttributeError) as error:
        raise UserError(
            f'{path}: need numbers by file name, as in {{"a.pt": 0.81}} ({type(error).__name__}: {error})'
        ) from None


def given_scores(given: Given, paths: Sequence[Path], names: Sequence[str]) -> dict[int, float]:
    """Scores that are known, by the model's number; a model is named by its file, as short as tells it apart."""
    if given is None:
        return {}
    where, rows = ("scores", list(given.items())) if isinstance(given, Mapping) else (str(given), _rows(Path(given)))
    called = [(short, str(path), path.name, str(path.resolve())) for path, short in zip(paths, names, strict=True)]
    found: dict[int, float] = {}
    for name, value in rows:
        fits = [i for i, each in enumerate(called) if str(Path(name)) in each]
        if len(fits) != 1:
            what = "is none of the models" if not fits else f"may be any of {len(fits)} models"
            raise UserError(f"{where}: {name!r} {what}, which are {', '.join(names[:4])}")
        try:
            score = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{where}: the score of {name} is {value!r}, not a number") from None
        if isnan(score):
            raise UserError(f"{where}: the score of {name} is NaN: leave that model out")
        if found.setdefault(fits[0], score) != score:
            raise UserError(f"{where}: {name} has the scores {found[fits[0]]:g} and {score:g}: leave one of them")
    return found


def _packed(found: Scored) -> dict[str, Any]:
    if found.answers is None:
        return {"score": found.value}
    buffer = io.BytesIO()
    np.save(buffer, found.answers, allow_pickle=False)
    answers = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
    return {"score": found.value, "answers": answers, "examples": found.examples}


def _unpacked(packed: Mapping[str, Any]) -> Scored:
    if "answers" not in packed:
        return Scored(packed["score"])
    content = zlib.decompress(base64.b64decode(packed["answers"]))
    return Scored(packed["score"], np.load(io.BytesIO(content), allow_pickle=False), packed.get("examples", ""))


def reduced(mixture: Mixture) -> dict[int, int]:
    """How often each model counts, in lowest terms: two of the same are that one.

    >>> reduced((3, 1, 3, 1)), reduced((2, 2, 2))
    ({3: 1, 1: 1}, {2: 1})
    """
    counts = Counter(mixture)
    common = gcd(*counts.values())
    return {i: count // common for i, count in counts.items()}


@dataclass
class Scores:
    """The scores of one pool by one scorer."""

    pool: Pool
    scorer: Scorer
    how: Averaging
    journal: Journal
    digests: list[str]
    given: dict[int, float]
    quiet: bool
    min_sigma: float = 0.0  # a candidate enters only if its gain has at least this z, on top of the rule
    report: "Scores | None" = None  # of the same pool, on examples that select nothing
    settings: str = field(init=False)
    first: tuple[str, int, str] | None = field(init=False, default=None)  # a model, its examples, and what names them

    def __post_init__(self) -> None:
        init = digests_of(self.pool, [self.how.init]) if self.how.init else []
        how = [self.how.dtype, self.how.batch_norm, init, self.pool.reading.exclude, self.pool.reading.set_aside]
        how.append(self.how.measured_on.key if self.how.measured_on else None)
        self.settings = key_of(self.scorer.key, self.scorer.metric, self.scorer.goal, how)
        self.journal.known = from_first(self.journal.known)  # every process knows what the first one knows
        if this_rank()[0]:
            self.journal.path = None  # one writer

    def key(self, mixture: Mixture) -> str:
        """Names the weights of a mixture and all else that its score depends on."""
        parts = sorted((self.digests[i], count) for i, count in reduced(mixture).items())
        return key_of(self.settings, parts)

    def of(self, mixtures: Sequence[Mixture]) -> list[Scored]:
        """Scores, computed by all processes where neither given nor known."""
        keys = {mixture: self.key(mixture) for mixture in mixtures}
        missing = [m for m in dict.fromkeys(mixtures) if keys[m] not in self.journal.known and not self._given(m)]
        missing = list({keys[mixture]: mixture for mixture in missing}.values())
        rank, world = this_rank()
        for start in range(0, len(missing), world):
            some = missing[start : start + world]
            for mixture, packed in zip(some, spread(self._measure, some), strict=True):
                self._compared(mixture, _unpacked(packed))
                self.journal.keep(keys[mixture], packed)
                if not self.quiet and rank == 0:
                    line = f"{self._candidate(mixture).name}: {packed['score']:.6g}"
                    print(line, file=sys.stderr, flush=True)
        return [
            Scored(self.given[mixture[0]])
            if self._given(mixture)
            else self._compared(mixture, _unpacked(self.journal.known[keys[mixture]]))
            for mixture in mixtures
        ]

    def _compared(self, mixture: Mixture, found: Scored) -> Scored:
        """The same score; a UserError where it is not of the examples that the first one was of."""
        name, n = self._candidate(mixture).name, 0 if found.answers is None else len(found.answers)
        first, number, examples = self.first = self.first or (name, n, found.examples)
        if n == 0 and self.min_sigma:
            raise UserError(
                f"--min-sigma needs a number for each example, and of {name} the score alone is known: see `a score of "
                "your own` in docs/soup-your-own.md"
            )
        if n != number:
            counted = [f"{each or 'no'} numbers of single examples" for each in (n, number)]
            raise UserError(f"{name} has {counted[0]}, and {first} has {counted[1]}: score all on the same examples")
        if found.examples != examples:
            raise UserError(f"{name} was scored on other examples than {first}: score all on the same examples")
        return found

    def _given(self, mixture: Mixture) -> bool:
        return len(reduced(mixture)) == 1 and mixture[0] in self.given

    def _candidate(self, mixture: Mixture) -> Candidate:
        return Candidate(self.pool, reduced(mixture), self.how)

    def _measure(self, mixture: Mixture) -> dict[str, Any]:
        candidate = self._candidate(mixture)
        try:
            return _packed(self.scorer.measure(candidate))
        finally:
            candidate.forget()

    def results(self, mixtures: Sequence[Mixture], to_beat: float) -> list[Result]:
        """The same as the greedy loop asks for it, each beside the soup that its last model was added to."""
        results = []
        for found, before in zip(self.of(mixtures), self.of([mixture[:-1] for mixture in mixtures]), strict=True):
            gain = gain_of(self.scorer, found, before)
            vetoed = bool(self.min_sigma) and (gain.z is None or gain.z < self.min_sigma)
            results.append(Result(found.value, versus=None if gain.z is None else gain, vetoed=vetoed))
        return results
