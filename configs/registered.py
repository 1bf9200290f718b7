"""What Hydra composes beside single yaml files: neutral values, experiments that share a file; and rows as a table."""

import json
from dataclasses import is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from pydantic_core import PydanticUndefined, to_jsonable_python

from configs.fields import default_of
from soups.files import tables

CONFIGS = Path(__file__).resolve().parent
ROOT = CONFIGS.parent
# Settings that have a usual value but no default in their dataclass: store/rows.py leaves defaults out of what names a
# row, and these have always been in it.
USUAL: dict[str, dict[str, Any]] = {
    "Task": {"train": "train", "held_out": "held_out", "test": "test", "shifts": []},
    "Texts": {"template": None, "options": []},
    "Glue": {"subset": None},
    "Model": {
        "image_size": 224,
        "normalize": True,
        "head": "linear_probe",
        "templates": "openai",
        "probe_c": [0.1, 1, 10],
    },
    "Optim": {
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "clip_norm": None,
        "label_smoothing": 0.0,
        "mixup": 0.0,
    },
}


def neutral(settings: Any) -> dict[str, Any]:
    """Every setting of a dataclass or union, at its usual value or its default; "???", to be typed, without either."""
    values: dict[str, Any] = {}
    for kind in get_args(settings) or (settings,):
        for name, field in kind.__pydantic_fields__.items():
            default = default_of(kind, name)
            if default is not PydanticUndefined:
                values[name] = to_jsonable_python(default)
            elif all(map(is_dataclass, get_args(field.annotation) or (field.annotation,))):
                values[name] = neutral(field.annotation)
            else:
                values[name] = "???"
        for each in kind.__mro__:
            values |= USUAL.get(each.__name__, {})
    return values


def _series(file: Path) -> dict[str, dict[str, Any]]:
    """Experiments of a file of configs/series, by name: what they share, with what each line adds or chooses."""
    series: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # type: ignore[assignment]
    found = {}
    for words, line in series["experiments"].items():
        chosen = [{f"override /{group}": choice} for group, choice in line.pop("override", {}).items()]
        name = f"{file.stem}_{words}"
        merged: Any = OmegaConf.to_container(OmegaConf.merge(series["shared"], line), resolve=False)
        found[name] = merged | {"defaults": [*merged["defaults"], *chosen], "name": name}
    return found


@cache
def experiments() -> dict[str, Path]:
    """The file of every experiment, by name in alphabetical order."""
    files = {file.stem: file for file in (CONFIGS / "experiment").glob("*.yaml")}
    files |= {name: file for file in (CONFIGS / "series").glob("*.yaml") for name in _series(file)}
    return dict(sorted(files.items()))


def register(settings: type) -> None:
    """Give Hydra the config `neutral`, which configs/config.yaml starts from, and the experiments of configs/series."""
    store = ConfigStore.instance()
    store.store(name="neutral", node=neutral(settings))
    for file in (CONFIGS / "series").glob("*.yaml"):
        for name, node in _series(file).items():
            store.store(group="experiment", name=name, node=node, package="_global_")


def read_table(path: Path) -> list[dict[str, dict[str, Any]]]:
    """Each line of a csv as group -> field -> value; columns without a dot are notes, and empty cells are left out.

    Cells are JSON values or plain words. The path is from the project's root where it is not absolute.
    """
    file = ROOT / path
    return _table(file, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=4)
def _table(file: Path, changed: int) -> list[dict[str, dict[str, Any]]]:
    """`read_table`, once for each state of a file: every row of a sweep is one of its lines."""
    table: list[dict[str, dict[str, Any]]] = []
    for line in tables.read_table(file):
        nested: dict[str, dict[str, Any]] = {}
        for name, text in line.items():
            group, dot, field = name.partition(".")
            if dot and text != "":
                nested.setdefault(group, {})[field] = _value(text)
        table.append(nested)
    return table


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
