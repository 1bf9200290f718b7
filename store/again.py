"""A second call of a finished run prints what the first one said, without importing torch or reading data."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from configs.registered import ROOT
from configs.schema import Experiment, dump
from soups.files.atomic import digest_of, read_json, write_json

PRINTED = "printed.json"
# What a result is made by, beside settings and the run's own files.
CODE = ("analysis", "configs", "eval", "finetune", "models", "results", "soups", "store", "tasks", "reproduce.py")
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "matplotlib")
EMBEDDED = ("emoji", "sentiment")  # kinds of tasks whose data are among these files


def _files(place: Path) -> list[tuple[str, int, int]]:
    found = sorted(path for path in (place, *place.rglob("*")) if path.is_file() and path.name != PRINTED)
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.suffix != ".pyc"]


def _state(config: Experiment, words: Sequence[str]) -> str:
    """A digest of the settings, and of name, size and time of the run's files and of the code that made them."""
    files = [_files(place) for place in (config.paths.runs / config.name, *(ROOT / name for name in CODE))]
    return digest_of([dump(config), list(words), files, sys.version, [version(name) for name in PACKAGES]])


def printed_before(config: Experiment, words: Sequence[str]) -> str | None:
    """What the finished run printed at its end; None where it has to be looked at, or made, in full."""
    path = config.paths.runs / config.name / PRINTED
    if config.task.kind not in EMBEDDED or not path.exists():
        return None
    printed = read_json(path)
    return str(printed["text"]) if printed["state"] == _state(config, words) else None


def remember(config: Experiment, words: Sequence[str], text: str) -> None:
    """Keep what a run printed, once all of its files are written."""
    if config.task.kind in EMBEDDED:
        write_json(config.paths.runs / config.name / PRINTED, {"state": _state(config, words), "text": text})
