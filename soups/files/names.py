"""Names of files, for people."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts run2 before run10.

    >>> sorted(["run10", "run2", "run"], key=natural)
    ['run', 'run2', 'run10']
    """
    parts = re.split(r"(\d+)", text)
    return [(int(part), part) if part.isdigit() else (-1, part) for part in parts if part]


def short_names(paths: Sequence[Path]) -> list[str]:
    """For each path the last parts of it that no other path ends with, however it was typed; equal paths have equal
    names.

    >>> short_names([Path("a/best.pt"), Path("b/best.pt"), Path("b/last.pt")])
    ['a/best.pt', 'b/best.pt', 'last.pt']
    """
    whole = {path: Path(os.path.abspath(path)) for path in paths}  # noqa: PTH100  # a link keeps its name
    found = {path: Path(*each.parts[-1:]) for path, each in whole.items()}
    parts = 1
    while twice := {name for name, count in Counter(found.values()).items() if count > 1}:
        parts += 1
        if parts > max(len(path.parts) for path in whole.values()):
            break
        for path, name in found.items():
            if name in twice:
                found[path] = Path(*whole[path].parts[-parts:])
    return [str(found[path]) for path in paths]


def name_beside(name: str, path: Path, paths: Sequence[Path], names: Sequence[str]) -> str:
    """The name of one more path, or where another has it already a longer one.

    >>> name_beside("best.pt", Path("a/best.pt"), [Path("b/best.pt")], ["best.pt"])
    'a/best.pt'
    """
    return name if name not in names else short_names([path, *paths])[0]
