"""Examples that stand in two splits of a task, by their content, whatever their names are."""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.data import Task
from configs.errors import UserError
from soups.files.atomic import digest_of, read_json, write_json
from store.runs import lock
from tasks.emoji.load import DATA
from tasks.files import READERS, ROOT
from tasks.held_out import noun
from tasks.load import load_split
from tasks.split import Examples

PIECE = 4096  # bytes at the end of an example, which are read before all of it is
CHUNK = 256  # examples that one call of a thread reads


@dataclass(frozen=True)
class Overlap:
    """Examples that two splits share."""

    first: str
    second: str
    count: int  # examples of the second that stand in the first too
    n: int  # examples of the second
    example: str  # one of them, under both names


def _digests(examples: Examples, rows: NDArray[np.int64], last: int | None) -> NDArray[np.int64]:
    """(len(rows),) 64 bits of each example's content, or of its last bytes."""

    def of_chunk(first: int) -> list[int]:
        contents = (examples.stored.content(int(row), last) for row in rows[first : first + CHUNK])
        return [int.from_bytes(hashlib.blake2b(each, digest_size=8).digest(), "big", signed=True) for each in contents]

    with ThreadPoolExecutor(READERS) as pool:
        chunks = pool.map(of_chunk, range(0, len(rows), CHUNK))
        return np.array([digest for chunk in chunks for digest in chunk], dtype=np.int64)


def overlaps(task: Task, names: Sequence[str] | None = None) -> list[Overlap]:
    """Every two splits of a task with examples of equal content: bytes of files, pixels in memory, texts.

    Little is read: sizes, which the listing has; the last 4 KiB of examples whose size another split has too; all
    bytes of those whose last 4 KiB are equal as well.

    Args:
        task: whose splits are read.
        names: names of the splits; all where None.

    Raises:
        UserError: a split or a file that cannot be read.
    """
    names = names or (task.train, task.held_out, *task.reported)
    splits = {name: load_split(task, name) for name in names}
    rows: dict[str, NDArray[np.int64]] = {name: np.arange(len(split)) for name, split in splits.items()}
    keys = {name: split.stored.sizes for name, split in splits.items()}
    for last in (PIECE, None):
        found = {name: np.unique(keys[name]) for name in names}
        for name in names:
            elsewhere = np.concatenate([found[other] for other in names if other != name])
            rows[name] = rows[name][np.isin(keys[name], elsewhere)]
        keys = {name: _digests(split, rows[name], last) for name, split in splits.items()}
    shared = []
    for first, second in combinations(names, 2):
        equal = np.flatnonzero(np.isin(keys[second], keys[first]))
        if len(equal):
            here = int(rows[second][equal[0]])
            there = int(rows[first][np.flatnonzero(keys[first] == keys[second][equal[0]])[0]])
            called = splits[first].stored.called(there), splits[second].stored.called(here)
            example = f"{called[0]} of {first} is {called[1]} of {second}"
            shared.append(Overlap(first, second, len(equal), len(splits[second]), example))
    return shared


def refused(task: Task, shared: list[Overlap]) -> list[str]:
    """A sentence for each overlap that is larger than `task.overlap_allowed`, of splits that train or select.

    Splits that only report may share examples: no score gets too good by that. With `task.protocol=paper` held-out is
    what is reported, on purpose.
    """
    leaks = (task.train,) if task.protocol == "paper" else (task.train, task.held_out)
    sentences = []
    for each in shared:
        if each.first not in leaks or each.count <= task.overlap_allowed * each.n:
            continue
        share = math.ceil(10_000 * each.count / each.n) / 10_000
        sentences.append(
            f"{each.count:,} of the {each.n:,} {noun(task)} of split {each.second!r} stand in split {each.first!r} too "
            f"({each.example}): take them out of one of the two, or allow so many by task.overlap_allowed={share:g}"
        )
    return sentences


def is_embedded(task: Task) -> bool:
    """Whether the data are this repository's own: files are compared with its digests, and the tests compare splits."""
    return task.kind == "sentiment" or (task.kind == "emoji" and (ROOT / task.folder).resolve() == DATA)


def _is_there(task: Task, split: str) -> bool:
    try:
        load_split(task, split)
    except UserError:
        return False
    return True


@lru_cache(maxsize=16)
def refuse_overlaps(task: Task, runs: Path) -> None:
    """Refuse a task whose splits share more examples than it allows; compared once for all experiments of a folder.

    A split that only reports and is not there yet, as while a model trains before all test sets are downloaded, is
    compared once it is; the stage that reads it says what is missing.

    Args:
        task: whose splits are read.
        runs: `paths.runs`, where the answer is kept under the digests of the splits. Where several processes ask at
            the same time, one compares and the others wait for it.

    Raises:
        UserError: they overlap; the message says how many examples, names one and says what to type. Or a split or a
            file that cannot be read.
    """
    if is_embedded(task):
        return
    names = [task.train, task.held_out, *(split for split in task.reported if _is_there(task, split))]
    kept = runs / "overlaps" / f"{digest_of([[name, load_split(task, name).digest] for name in names])}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as file:
        lock(file, "type paths.runs=FOLDER of a file system with locks", wait=True)
        if not kept.exists():
            write_json(kept, [asdict(each) for each in overlaps(task, names)])
    sentences = refused(task, [Overlap(**each) for each in read_json(kept)])
    if sentences:
        raise UserError("; ".join(sentences))
