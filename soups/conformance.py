"""Whether models fit together: the same tensors, shapes and kinds, tied in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import UserError
from store.checkpoints import Checkpoint, Entry


@dataclass(frozen=True)
class Layout:
    """The tensors that all models of a pool have."""

    entries: dict[str, Entry]  # by name, sorted; tied tensors once, under a name that every file knows
    ties: dict[str, str]  # further names -> the name in `entries`

    @property
    def parameters(self) -> int:
        """Elements of all tensors, tied ones once."""
        return sum(entry.size for entry in self.entries.values())


def tie_groups(checkpoints: Sequence[Checkpoint]) -> list[set[str]]:
    """Names that mean one tensor in at least one of the files."""
    groups: list[set[str]] = []
    for checkpoint in checkpoints:
        for pair in map(set, checkpoint.ties.items()):
            touching = [group for group in groups if group & pair]
            groups = [group for group in groups if not group & pair] + [pair.union(*touching)]
    return groups


def _representatives(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Each tied name -> the name that stands for its tensor.

    A file may lack some of the names (safetensors drop them), but may not hold two of them as tensors of their own.
    """
    stands_for: dict[str, str] = {}
    for group in tie_groups(checkpoints):
        for checkpoint in checkpoints:
            apart = sorted(group & checkpoint.entries.keys())
            if len(apart) > 1:
                raise UserError(
                    f"{checkpoint.path}: {apart[0]!r} and {apart[1]!r} are two tensors, but tied in another file"
                )
        known = [name for name in sorted(group) if all(c.own(name) in c.entries for c in checkpoints)]
        if not known:
            raise UserError(f"the files do not agree on a name of the tied tensor {sorted(group)}")
        stands_for |= dict.fromkeys(group, known[0])
    return stands_for


def common_layout(checkpoints: Sequence[Checkpoint]) -> Layout:
    """The layout of models that can be averaged.

    Raises:
        UserError: no files; or keys, shapes, kinds or ties differ; names the file and the tensor.
    """
    if not checkpoints:
        raise UserError("no ingredients: a soup needs at least one model")
    stands_for = _representatives(checkpoints)
    first, *others = [{stands_for.get(name, name): entry for name, entry in c.entries.items()} for c in checkpoints]
    start = checkpoints[0].path
    for checkpoint, entries in zip(checkpoints[1:], others, strict=True):
        for name in sorted(first.keys() | entries.keys()):
            if name not in entries:
                raise UserError(f"{checkpoint.path}: tensor {name!r} of {start} is missing")
            if name not in first:
                raise UserError(f"{checkpoint.path}: tensor {name!r} is not in {start}")
            if entries[name] != first[name]:
                raise UserError(f"{checkpoint.path}: tensor {name!r} is {entries[name]}, but {first[name]} in {start}")
    if not first:
        raise UserError(f"{start} holds no tensors")
    ties = {name: kept for name, kept in sorted(stands_for.items()) if name != kept}
    return Layout(dict(sorted(first.items())), ties)
