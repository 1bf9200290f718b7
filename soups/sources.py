"""Models as people have them - paths, patterns, dicts, modules, loaders - as files that are read block by block."""

import glob
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soups.errors import UserError
from soups.files.folders import HUB, from_hub, natural, pinned, short_names
from soups.files.reading import Reading

Source = (
    str | Path | Mapping[str, Any] | Callable[[], Mapping[str, Any]] | Any
)  # Any: a module, whose torch is not loaded


def in_natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sorted, run2 before run10, whether they are typed from the current folder or from the root."""
    return sorted(paths, key=lambda path: natural(os.path.abspath(path)))  # noqa: PTH100  # links keep their places


def matches(pattern: str) -> list[Path]:
    """The files that a path or a pattern stands for, sorted; raises UserError where a pattern matches nothing."""
    path = Path(pattern)
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    # As a shell, and not as Path.glob: a Mac's ._run1.pt is no match of *.pt.
    found = in_natural_order(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207
    if not found:
        raise UserError(f"no file matches {pattern!r}")
    return found


@dataclass
class Pool:
    """Files of the models, their names, and a folder for what has to be written on the way."""

    paths: list[Path]
    names: list[str]
    reading: Reading
    temporary: tempfile.TemporaryDirectory[str] = field(repr=False)
    adapters: bool = False  # folders of peft, not models
    beside: list["Pool"] = field(default_factory=list, repr=False)  # pools of one, such as the initialisation

    @property
    def workplace(self) -> Path:
        """A folder that is deleted when nobody needs the pool any more."""
        return Path(self.temporary.name)

    @property
    def like(self) -> Path:
        """Beside which config and tokenizer are: the first model, or the base model of adapters."""
        if self.reading.base is None:
            return self.paths[0]
        base = self.reading.place(self.reading.base)
        return from_hub(str(base)) if str(base).startswith(HUB) else base

    def __len__(self) -> int:
        return len(self.paths)


def _kept(source: Any, path: Path) -> Path:
    """A model in memory as a file; one model of a loader at a time is in memory."""
    import torch  # noqa: PLC0415  # files alone need none of it

    state = source() if callable(source) and not hasattr(source, "state_dict") else source
    state = state.state_dict() if hasattr(state, "state_dict") else state
    if not isinstance(state, Mapping):
        raise UserError(
            f"{path.stem} is a {type(state).__name__}, not a path, a state dict, a module or a loader of one"
        )
    torch.save(dict(state), path)
    return path


def pool_of(sources: Source | Iterable[Source], reading: Reading | None = None) -> Pool:
    """Models in the order in which they were given; those of a pattern sorted, run2 before run10.

    `sources` is a path or a pattern, a state dict, a module, or a function that returns one of the last two; or several
    of them in any mixture. What is in memory is written to a file once.
    """
    if isinstance(sources, (str, Path, Mapping)) or callable(sources) or hasattr(sources, "state_dict"):
        sources = [sources]
    temporary = tempfile.TemporaryDirectory(prefix=".soups-")
    paths: list[Path] = []
    names: dict[int, str] = {}
    for source in sources:
        if isinstance(source, (str, Path)) and str(source).startswith(HUB):
            paths.append(from_hub(str(source)))
            names[len(paths) - 1] = pinned(str(source), paths[-1])
        elif isinstance(source, (str, Path)):
            paths += matches(str(source))
        else:
            names[len(paths)] = f"model {len(paths)}"
            paths.append(_kept(source, Path(temporary.name) / f"model {len(paths)}.pt"))
    if not paths:
        raise UserError("no models: a soup needs at least one model")
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0].name} is named twice; to count a model double, give it a weight of 2")
    short = short_names(paths)
    return Pool(paths, [names.get(i, short[i]) for i in range(len(paths))], reading or Reading(), temporary)
