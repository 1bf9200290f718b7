"""Whether models fit together: the same tensors, shapes and kinds, tied in the same way; and which are not averaged."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from soups.errors import UserError
from soups.files.checkpoints import BLOCK, Checkpoint, Entry
from soups.files.dtypes import FLOATS
from soups.files.reading import Reading

LEAVE_OUT = "--only-common leaves such tensors out of the mean, --keep REGEX those whose names it finds"


@dataclass(frozen=True)
class Layout:
    """The tensors of a pool's mean."""

    entries: dict[str, Entry]  # by name, sorted; tied tensors once, under a name that every file knows
    ties: dict[str, str]  # further names -> the name in `entries`
    stored: tuple[str, ...] = ()  # names in `ties` that a file holds, so that a network may ask for them
    kept: tuple[str, ...] = ()  # names in `entries` that are not averaged, but those of one ingredient
    dropped: tuple[str, ...] = ()  # names of tensors that are not averaged, and that this ingredient lacks

    def names_of(self, name: str) -> list[str]:
        """All names under which a tensor in `entries` is written."""
        return [name, *(other for other in self.stored if self.ties[other] == name)]


def joint_kind(kinds: set[str]) -> str | None:
    """The narrowest kind of floats that holds all of several exactly; None where they have no mean.

    >>> joint_kind({"F16", "BF16"}), joint_kind({"F16", "F64"}), joint_kind({"I64"}), joint_kind({"I64", "F32"})
    ('F32', 'F64', 'I64', None)
    """
    if len(kinds) == 1:
        return next(iter(kinds))
    if not kinds <= set(FLOATS):
        return None
    return "F64" if "F64" in kinds else "F32"


def tie_groups(checkpoints: Sequence[Checkpoint]) -> list[set[str]]:
    """Names that mean one tensor in at least one of the files."""
    groups: list[set[str]] = []
    for pair in [*(pair for c in checkpoints for pair in c.ties.items()), *_copies(checkpoints)]:
        touching = [group for group in groups if group.intersection(pair)]
        groups = [group for group in groups if not group.intersection(pair)] + [set(pair).union(*touching)]
    return groups


def _copies(checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[str, str]]:
    """Ties that a format lost: matrices that some files lack, and that in others are copies of one that all have."""
    common = set.intersection(*(set(c.names) for c in checkpoints))
    for name in sorted(set().union(*(c.entries for c in checkpoints)) - common):
        holders = [c for c in checkpoints if name in c.entries]
        entry = holders[0].entries[name]
        alike = [other for other in sorted(common) if all(c.entries.get(other) == entry for c in holders)]
        if len(entry.shape) > 1 and not _constant(holders[0], name):
            yield from ((name, other) for other in alike if all(_equal(c, name, other) for c in holders))


def _constant(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the first elements are all the same, as those of a new layer of zeros are."""
    first = next(checkpoint.blocks(name, np.empty(8 * BLOCK, np.uint8)), np.zeros(0))
    return not (first != first[:1]).any()


def _representatives(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Each tied name -> the name that stands for its tensor; a file may lack some, or hold equal copies."""
    stands_for: dict[str, str] = {}
    for group in tie_groups(checkpoints):
        for checkpoint in checkpoints:
            first, *copies = sorted(group & checkpoint.entries.keys()) or [""]
            for copy in copies:
                if not _equal(checkpoint, first, copy):
                    raise UserError(
                        f"{checkpoint.path}: {first!r} and {copy!r} are two tensors, but tied in another file"
                    )
        holders = [c for c in checkpoints if group.intersection(c.names)]  # others lack the tensor, which is said later
        known = [name for name in sorted(group) if all(c.own(name) in c.entries for c in holders)]
        if not known:
            raise UserError(f"the files do not agree on a name of the tied tensor {sorted(group)}")
        stands_for |= dict.fromkeys(group, known[0])
    return stands_for


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.entries[one] != checkpoint.entries[other]:
        return False
    buffers = np.empty((2, 8 * BLOCK), np.uint8)
    pairs = zip(checkpoint.blocks(one, buffers[0]), checkpoint.blocks(other, buffers[1]), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def common_layout(checkpoints: Sequence[Checkpoint], reading: Reading | None = None, first: int = 0) -> Layout:
    """The layout of models that can be averaged; the tensors of file `first` stand in for those that are not.

    Raises:
        UserError: names, shapes, kinds or ties differ; names the file and the tensor.
    """
    if not checkpoints:
        raise UserError("no ingredients: a soup needs at least one model")
    can_choose, reading = reading is not None, reading or Reading()
    stands_for = _representatives(checkpoints)
    files = [{stands_for.get(name, name): entry for name, entry in c.entries.items()} for c in checkpoints]
    ties = {name: kept for name, kept in sorted(stands_for.items()) if name != kept}
    excluded = {*_excluded(reading.exclude, files, ties), *(stands_for.get(name, name) for name in reading.set_aside)}
    entries, kept, dropped = {}, [], []
    for name in sorted(set().union(*files)):
        problem = "" if name in excluded else _problem(name, checkpoints, files)
        if problem and not reading.only_common:
            raise UserError(f"{problem} ({LEAVE_OUT})" if can_choose else problem)
        if name not in excluded and not problem:
            kind = joint_kind({file[name].dtype for file in files})
            assert kind is not None  # else that is a problem
            entries[name] = replace(files[0][name], dtype=kind)
        elif name in files[first]:
            entries[name] = files[first][name]
            kept.append(name)
        else:
            dropped.append(name)
    if len(entries) == len(kept):
        raise UserError(f"{checkpoints[0].path} holds no tensors to average{f' ({LEAVE_OUT})' if kept else ''}")
    ties = {name: stands for name, stands in ties.items() if stands in entries}
    stored = tuple(name for name in ties if any(name in c.names and name not in c.absent for c in checkpoints))
    return Layout(entries, ties, stored, tuple(kept), tuple(dropped))


def _excluded(pattern: str | None, files: Sequence[dict[str, Entry]], ties: dict[str, str]) -> Iterator[str]:
    if pattern is None:
        return
    try:
        finds = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"--keep {pattern}: not a regular expression ({error})") from None
    aliases = [*((name, name) for name in set().union(*files)), *ties.items()]
    found = [stands for name, stands in aliases if finds(name)]
    if not found:
        raise UserError(f"--keep {pattern}: finds no tensor")
    yield from found


def _problem(name: str, checkpoints: Sequence[Checkpoint], files: Sequence[dict[str, Entry]]) -> str:
    """Why a tensor cannot be averaged, or an empty string."""
    start = checkpoints[0].path
    for checkpoint, entries in zip(checkpoints[1:], files[1:], strict=True):
        if name not in entries and name in files[0]:
            return f"{checkpoint.path}: tensor {name!r} of {start} is missing"
        if name in entries and name not in files[0]:
            return f"{checkpoint.path}: tensor {name!r} is not in {start}"
        if name in entries:
            ours, theirs = entries[name], files[0][name]
            if ours.shape != theirs.shape or joint_kind({ours.dtype, theirs.dtype}) is None:
                rows = len(ours.shape) > 1 and ours.shape[1:] == theirs.shape[1:]
                hint = "; rows of tokens are matched where each model has its config.json and tokenizer beside it"
                return f"{checkpoint.path}: tensor {name!r} is {ours}, but {theirs} in {start}{hint if rows else ''}"
    return ""
