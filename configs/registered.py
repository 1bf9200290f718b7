"""What Hydra composes beside single yaml files: every setting's neutral value, and experiments that share a file."""

from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from pydantic_core import PydanticUndefined, to_jsonable_python

from configs.fields import default_of

CONFIGS = Path(__file__).resolve().parent
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
