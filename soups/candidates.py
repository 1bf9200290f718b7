"""What is scored: a model of a pool or a mixture of several, as weights, as a file or as a folder."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soups.averaging import Averaging, writer
from soups.files.atomic import replacing
from soups.files.checkpoints import PICKLED
from soups.files.folders import ADAPTER
from soups.files.opening import opened
from soups.files.reading import Reading
from soups.folder import WEIGHTS, companions
from soups.sources import Pool

if TYPE_CHECKING:
    from torch import Tensor


def write_pickled(weights: Path, out: Path, pool: Pool) -> None:
    """A .safetensors file as torch.save writes it, under the key and the names that it has in the pool's first file."""
    import torch  # noqa: PLC0415

    from soups.files.weights import mapped  # noqa: PLC0415

    state: dict[str, Any] = mapped(weights)
    if pool.like.is_file() and pool.like.suffix in PICKLED:
        with opened([pool.like], pool.reading) as (like,):
            state = {like.original.get(name, name): tensor for name, tensor in state.items()} | like.others
            for key in reversed(like.unwrapped.split(".") if like.unwrapped else []):
                state = {key: state}
    with replacing(out) as temporary, temporary.open("wb") as file:  # an archive is called as its file, this as none
        torch.save(state, file)


@dataclass
class Candidate:
    """One model of a pool, or a mixture of several, while it is scored."""

    pool: Pool
    weights_of: Mapping[int, float]  # index -> how often it counts
    how: Averaging
    place: Path = field(init=False)

    def __post_init__(self) -> None:
        self.place = self.pool.workplace / ("-".join(map(str, sorted(self.weights_of)))[:80] + f".{os.getpid()}")

    @property
    def name(self) -> str:
        """What it is of, for messages."""
        *others, last = [self.pool.names[i] for i in self.weights_of]
        listed = others if len(others) < 4 else [*others[:2], f"{len(others) - 2} more"]
        return f"{last} with {', '.join(listed)}" if others else last

    @property
    def original(self) -> Path | None:
        """The ingredient's own file, where that is all that it is."""
        single = len(self.weights_of) == 1 and self.pool.reading == Reading() and self.how.dtype == "keep"
        return self.pool.paths[next(iter(self.weights_of))] if single else None

    @cached_property
    def made(self) -> Path:
        """A .safetensors file of it; of adapters a folder of peft, whose scaling is 1."""
        self.place.mkdir(exist_ok=True)
        out, how = self.place / ("adapter" if self.pool.adapters else "soup.safetensors"), self.how
        if len(self.weights_of) == 1:  # a model by itself keeps its own statistics
            how = replace(how, batch_norm="average", init=None, measured_on=None)
        shares = [self.weights_of.get(i, 0.0) for i in range(len(self.pool))]
        writer(self.pool, shares, how, sync=False)(out, {})
        return out

    def weights(self) -> "Mapping[str, Tensor]":
        """Its tensors, each read when it is asked for; of an adapter the factors, whose product is the whole update."""
        from soups.files.weights import LazyWeights  # noqa: PLC0415

        return LazyWeights(self.made / ADAPTER if self.pool.adapters else self.original or self.made)

    def file(self) -> Path:
        """A file or folder of it, in the form that the ingredients have; an ingredient itself as a link.

        It lies in a folder of this candidate alone: what a command writes beside it is no other run's.
        """
        if self.original is not None:
            self.place.mkdir(exist_ok=True)
            link = self.place / Path(os.path.abspath(self.original)).name  # noqa: PTH100  # of `.` too
            if not link.is_symlink():
                link.symlink_to(self.original.absolute())
            return link
        like = self.pool.like
        if like.is_dir() and not self.pool.adapters:
            return self.folder(like)
        if like.suffix not in PICKLED or self.pool.adapters:
            return self.made
        out = self.place / f"soup{like.suffix}"
        if not out.exists():
            write_pickled(self.made, out, self.pool)
        return out

    def folder(self, like: Path) -> Path:
        """A folder of it with the config and the tokenizer that are in the folder `like`."""
        if self.original is not None and (self.original / "config.json").is_file():
            return self.original
        folder = self.place / "folder"
        if not folder.exists():
            folder.mkdir(parents=True)
            for file in companions(like):
                (folder / file.name).symlink_to(file.resolve())
            source = self.original if self.original and self.original.suffix == ".safetensors" else self.made
            (folder / WEIGHTS).symlink_to(source.resolve())
        return folder

    def forget(self) -> None:
        """Delete what was written."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.__dict__.pop("made", None)
