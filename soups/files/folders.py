"""Names of files for people, which file of a folder is the model, and folders of the Hugging Face hub."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soups.errors import UserError, first_line

INDEX = "model.safetensors.index.json"
# In the order in which transformers and open_clip look for them.
WEIGHTS = (
    "model.safetensors",
    INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.(safetensors|bin)$")
ADAPTER = "adapter_model.safetensors"
_OF_ADAPTER = re.compile(r"^adapter_(model|config)\.")
HUB = "hf:"


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts run2 before run10.

    >>> sorted(["run10", "run2", "run"], key=natural)
    ['run', 'run2', 'run10']
    """
    parts = re.split(r"(\d+)", text)
    return [(int(part), part) if part.isdigit() else (-1, part) for part in parts if part]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path that no other path ends with, however it was typed; equal paths have equal names.

    >>> short_names([Path("a/best.pt"), Path("b/best.pt"), Path("b/last.pt")])
    ['a/best.pt', 'b/best.pt', 'last.pt']
    """
    whole = {path: Path(os.path.abspath(path)) for path in paths}  # noqa: PTH100  # a link keeps its name
    found = {path: Path(*each.parts[-1:]) for path, each in whole.items()}
    for parts in range(2, max((len(path.parts) for path in whole.values()), default=0) + 1):
        twice = {name for name, count in Counter(found.values()).items() if count > 1}
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


def is_shard(path: Path) -> bool:
    """Whether a file is one of several that make a model together."""
    return SHARD.search(path.name) is not None


def config_beside(path: Path, *names: str) -> Path | None:
    """The first file of these names in the folder that an ingredient is, or that it lies in."""
    folder = path if path.is_dir() else path.parent
    return next((folder / name for name in names if (folder / name).exists()), None)


def config_of(path: Path) -> dict[str, Any]:
    """What the config.json beside an ingredient says; empty where there is none. Raises UserError if it is damaged."""
    file = config_beside(path, "config.json")
    try:
        return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft, and no model."""
    return (folder / "adapter_config.json").is_file() and not any((folder / name).exists() for name in WEIGHTS)


def in_folder(folder: Path) -> Path:
    """The weights of a folder as Hugging Face's libraries and open_clip write it; a UserError if it is not one."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) == 1:
        return indices[0]
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    shards = [file for file in [*files, *sorted(folder.glob("*.bin"))] if is_shard(file)]
    if shards:
        raise UserError(
            f"{folder} has the shard {shards[0].name} without its index: copy {INDEX} beside it, or save the model "
            "again with save_pretrained"
        )
    whole = [file for file in files if not _OF_ADAPTER.search(file.name)]
    if len(whole) == 1:
        return whole[0]
    if not whole and any(_OF_ADAPTER.search(file.name) for file in folder.iterdir()):
        raise UserError(
            f"{folder} holds an adapter, not a model: type `soups lora` for a soup of adapters, or with --base MODEL "
            "of the models into which they are merged"
        )
    raise UserError(f"{folder} is a folder without {INDEX}: name a file in it")


def pinned(name: str, folder: Path) -> str:
    """`hf:org/model@commit` of a model of the hub, and of the folder that it was downloaded to."""
    return f"{name.partition('@')[0]}@{folder.name}" if folder.parent.name == "snapshots" else name


def from_hub(name: str) -> Path:
    """The local folder of `hf:org/model` or `hf:org/model@revision`, downloaded where it is not there yet."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415  # needed for this alone
    except ModuleNotFoundError:
        raise UserError(f"{name}: models of the hub need the package huggingface_hub; pip install it") from None
    patterns = ["*.safetensors", "*.bin", "*.json", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # of the network, of the hub, of a name: each has a class of its own
        raise UserError(f"{name} cannot be had from the hub: {first_line(error)}") from None
