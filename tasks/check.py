"""Check every split of a task before anything is trained on it:  python -m tasks.check task=imagenet

Prints for each split how many images and classes it has, where they are and a digest, and decodes a few of them; for
texts how many there are of each class, and one of them. Then it says which splits have examples in common, by their
content. Ends with OK, or with what is wrong and exit status 2.
"""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from configs.cli import typed_right
from configs.data import Task
from configs.errors import UserError
from configs.registered import CONFIGS
from configs.schema import parse_task
from soups.errors import one_line_errors
from soups.files.atomic import digest_of, read_json, write_json
from store.runs import lock
from tasks.emoji.load import DATA
from tasks.files import READERS, ROOT, Files
from tasks.load import class_names, load_annotations, load_split
from tasks.split import Examples, ImageSplit
from tasks.texts import TextRows

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
    """Every two splits of a task, of those named or of all, with examples of equal content: bytes, pixels, texts.

    Little is read: sizes, which the listing has; the last 4 KiB of examples whose size another split has too; all
    bytes of those whose last 4 KiB are equal as well.
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
            f"{each.count:,} of the {each.n:,} {task.noun} of split {each.second!r} stand in split {each.first!r} too "
            f"({each.example}): take them out of one of the two, or allow so many by task.overlap_allowed={share:g}"
        )
    return sentences


def is_embedded(task: Task) -> bool:
    """Whether the data are this repository's own: files are compared with its digests, and the tests compare splits."""
    return task.kind == "sentiment" or (task.kind == "emoji" and (ROOT / task.folder).resolve() == DATA)


@lru_cache(maxsize=16)
def refuse_overlaps(task: Task, runs: Path) -> None:
    """Refuse a task whose splits share more examples than it allows; compared once for all experiments of a folder.

    A split that only reports and is not there yet, as while a model trains before all test sets are downloaded, is
    compared once it is; the stage that reads it says what is missing. The answer is kept in `runs`, `paths.runs`, under
    the digests of the splits. Where several processes ask at the same time, one compares and the others wait for it.
    """
    if is_embedded(task):
        return
    names = [task.train, task.held_out]
    for split in task.reported:
        with suppress(UserError):
            load_split(task, split)
            names.append(split)
    kept = runs / "overlaps" / f"{digest_of([[name, load_split(task, name).digest] for name in names])}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as file:
        lock(file, "type paths.runs=FOLDER of a file system with locks", wait=True)
        if not kept.exists():
            write_json(kept, [asdict(each) for each in overlaps(task, names)])
    sentences = refused(task, [Overlap(**each) for each in read_json(kept)])
    if sentences:
        raise UserError("; ".join(sentences))


def describe(task: Task, name: str) -> str:
    """One line about a split, of which the first, the middle and the last image have been decoded."""
    split = load_split(task, name)
    n, digest = len(split), split.digest[:12]
    if n == 0:
        raise UserError(f"split {name!r} has no example")
    if isinstance(split.stored, TextRows):
        counts = torch.bincount(split.labels, minlength=task.size).tolist()
        of_each = ", ".join(f"{count:,} {option}" for count, option in zip(counts, class_names(task), strict=True))
        first = " | ".join(split.stored.fields[0])
        return f"{name}: {n:,} texts ({of_each}), e.g. {first[:80]!r}, digest {digest}"
    assert isinstance(split, ImageSplit)  # of every other kind
    sizes = sorted({"{}x{}".format(*split.pil(row).size) for row in sorted({0, n // 2, n - 1})})
    groups = f", {len(split.group_names)} groups" if split.groups is not None else ""
    where = split.stored.root if isinstance(split.stored, Files) else task.folder
    classes = f"{task.size:,}"
    if split.space is not None:  # e.g. 113 over 125 of 1,000
        network = len({i for several in split.space.ids for i in several})
        over = "" if network == len(split.space) else f" over {network:,}"
        classes = f"{len(split.space):,}{over} of {classes}"
    return f"{name}: {n:,} images, classes {classes}{groups}, e.g. {' '.join(sizes)} pixels, {where}, digest {digest}"


def check(task: Task) -> None:
    """Print a line about each split, the class names, the annotations and overlaps; all problems come at the end.

    Raises:
        UserError: one or more splits cannot be used, or they share more examples than `task.overlap_allowed`.
    """
    problems: list[str] = []
    splits = [task.train, task.held_out, *task.reported]
    for name in splits:
        try:
            print(describe(task, name), flush=True)
        except UserError as error:
            print(f"{name}: cannot be used", flush=True)
            problems.append(str(error))
    try:
        names = class_names(task)
        print(f"class names: {', '.join(names if len(names) < 4 else (*names[:2], '...', names[-1]))}")
        for name, right in load_annotations(task).items():
            print(f"annotations {name}: {int(right.any(dim=1).sum()):,} images, {int(right.sum()):,} answers")
        shared = [] if problems else overlaps(task)  # which reads all splits
        for each in shared:
            print(
                f"{each.first} and {each.second}: {each.count:,} of the latter's {each.n:,} {task.noun} stand in both"
            )
        if not problems and not shared:
            print(f"no two splits have {task.noun} of equal content")
        problems += refused(task, shared)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    print(f"OK: {len(splits)} splits")


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def main(cfg: DictConfig) -> None:
    """Check the task that the command line composes, as `check`."""
    if OmegaConf.is_missing(cfg, "name"):
        cfg.name = "check"  # no experiment is needed
    typed = HydraConfig.get().overrides.task
    one_line_errors(lambda: check(parse_task(cfg, typed)))


if __name__ == "__main__":
    typed_right(main, __doc__ or "")()
