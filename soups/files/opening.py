"""Opens weights, whatever they are: .safetensors; checkpoints of torch.save, never executing a pickle; shards of
either; folders of torch.distributed.checkpoint; LoRA adapters with their base model; models of the Hugging Face hub.
"""

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from soups.errors import UserError
from soups.files.adapters import merged, weights_file
from soups.files.aligned import aligned
from soups.files.checkpoints import PICKLED, Checkpoint, open_safetensors, recorded_ties, renamed, supported
from soups.files.distributed import METADATA, open_distributed
from soups.files.folders import HUB, INDEX, from_hub, in_folder, is_adapter, is_shard
from soups.files.pickled import open_pickled
from soups.files.reading import Reading, only_here, without_wrappers

MOST_FILES = 1 << 14  # open at once; some systems name no limit and have one


def _open_index(index: Path, stack: ExitStack, reading: Reading) -> Checkpoint:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged or not an index of shards ({type(error).__name__}: {error})") from None
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names a shard outside its folder: {outside[0]!r}")
    missing = [name for name in shards if not (index.parent / name).exists()]
    if missing:
        raise UserError(f"{index}: its shard {missing[0]} is missing")
    checkpoint = _together(index, [_open_file(index.parent / name, stack, reading) for name in shards])
    unlike = sorted(listed.keys() ^ (set(checkpoint.names) - checkpoint.absent))
    if unlike:
        where = "the index but in no shard" if unlike[0] in listed else "a shard but not in the index"
        raise UserError(f"{index}: tensor {unlike[0]!r} is in {where}")
    return checkpoint


def _together(path: Path, shards: Sequence[Checkpoint]) -> Checkpoint:
    """The shards of one model as one checkpoint."""
    place: dict[str, Checkpoint] = {}
    metadata: dict[str, str] = {}
    ties: dict[str, str] = {}
    for shard in shards:
        metadata |= shard.metadata
        for name in (name for name in shard.names if name not in shard.absent):
            if name in place:
                raise UserError(f"{shard.path}: tensor {name!r} stands in {place[name].path.name} too")
            place[name] = shard
        ties |= {name: kept for name, kept in shard.ties.items() if name not in shard.absent}
    recorded = recorded_ties(metadata, set(place))
    return Checkpoint(
        path,
        {name: shard.entries[name] for name, shard in sorted(place.items()) if name in shard.entries},
        ties | recorded,
        lambda name, offset, view: place[name].fill(name, offset, view),
        metadata=metadata,
        absent=frozenset(recorded),
    )


def _open_file(path: Path, stack: ExitStack, reading: Reading) -> Checkpoint:
    """A file of weights, told by its first bytes where its name does not say what it is."""
    if path.suffix == ".json":
        return _open_index(path, stack, reading)
    with path.open("rb") as file:
        first = file.read(9)
    if first == b"version h":  # of https://git-lfs.github.com/spec/v1
        raise UserError(f"{path} is a Git LFS pointer, not the weights: git lfs pull fetches them")
    if not first:
        raise UserError(f"{path} is empty: copy or download it again")
    if path.suffix == ".safetensors" or (first[8:] == b"{" and path.suffix not in PICKLED):
        if reading.key is not None:
            raise UserError(f"{path} has no keys, so --key {reading.key} means nothing in it")
        return open_safetensors(path, stack)
    if path.suffix in PICKLED or first.startswith((b"PK\x03\x04", b"\x80\x02")):
        return open_pickled(path, stack, reading)
    raise UserError(f"{path}: not a weight file; known are .safetensors, {INDEX} and {' '.join(PICKLED)}")


@cache
def _many_files() -> None:
    """Let this process open as many files as it may: those of a pool of shards are open together, often thousands."""
    try:
        import resource  # noqa: PLC0415
    except ImportError:  # Windows has neither the module nor the limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_checkpoint(source: Path | Checkpoint, stack: ExitStack, reading: Reading | None = None) -> Checkpoint:
    """Open a file, an index of shards, a folder of one of them, or hf:org/model; one that is open is given back.

    Raises:
        UserError: missing, truncated, damaged, not weights, or a kind of tensor that cannot be averaged.
    """
    if isinstance(source, Checkpoint):
        return source
    _many_files()
    reading, path = reading or Reading(), source
    try:
        if str(path).startswith(HUB):
            path = from_hub(str(path))
        if reading.base is not None and is_adapter(path):
            adapter = _open_file(weights_file(path), stack, Reading())
            return merged(
                path, adapter, open_checkpoint(reading.place(reading.base), stack, replace(reading, base=None))
            )
        if (path / METADATA).is_file():
            found = supported(open_distributed(path, stack, reading))
        else:
            if path.is_dir():
                path = in_folder(path)
            elif is_shard(path) or path.suffix == ".distcp":
                raise UserError(f"{path} is one shard of a model: name its folder, or the index of the shards")
            found = supported(_open_file(path, stack, reading))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        remedy = ": `ulimit -n` says how many a process may have" if error.errno == errno.EMFILE else ""
        raise UserError(f"{path}: {error.strerror}{remedy}") from None
    found = found if reading.as_stored else renamed(found, without_wrappers(found.names, inside=found.unwrapped != ""))
    if reading.like is None:
        return found
    return aligned(found, open_checkpoint(reading.place(reading.like), stack, replace(reading, like=None)))


def alike(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints of a pool, without the `model.` before all names of some of them alone."""
    changes = only_here([checkpoint.names for checkpoint in checkpoints])
    return [renamed(checkpoint, names) for checkpoint, names in zip(checkpoints, changes, strict=True)]


@contextmanager
def opened(sources: Sequence[Path | Checkpoint], reading: Reading | None = None) -> Iterator[list[Checkpoint]]:
    """Several weight files of one pool, open while the block lasts."""
    with ExitStack() as stack:
        found = [open_checkpoint(source, stack, reading) for source in sources]
        yield found if reading is not None and reading.as_stored else alike(found)
