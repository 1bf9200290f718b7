"""LoRA adapters as PEFT saves them, and a model into which one is merged, which is read as any checkpoint is.

Products are summed over the rank element by element, so that neither the block nor the machine changes a bit.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soups.errors import UserError
from soups.files.checkpoints import BLOCK, Checkpoint
from soups.files.dtypes import FLOATS, STORED, round_once, widen
from soups.files.folders import ADAPTER

CONFIG = "adapter_config.json"
ORIGIN = ("base_model_name_or_path", "revision", "task_type")
SAME = (*ORIGIN, "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices")
# Other settings of LoraConfig that are honoured, or mean nothing once an adapter is trained. One that stands in neither
# list and is set may change what the adapter does.
KNOWN = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping", "peft_version"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
# Initialisations that leave the base model as it is; after another one an adapter alone is not what was learned.
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_DOWN = re.compile(r"((?P<module>.*)\.lora_(?:embedding_)?)A((?:\..*)?)")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's adapter_config.json; raises UserError where it is missing, damaged or has an unknown setting."""
    path = folder / CONFIG
    elsewhere = "merge each adapter into its model with peft's merge_and_unload, and soup those"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is known here: {elsewhere}")
        scaling_of(config)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: name folders that peft's save_pretrained wrote") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be used ({type(error).__name__}: {error})") from None
    for option in sorted(config.keys() - {*SAME, *KNOWN}):
        if config[option]:
            raise UserError(f"{path}: {option} is {config[option]!r}, which may change what it does: {elsewhere}")
    start = config.get("init_lora_weights")
    if start not in KEEPS_BASE:
        raise UserError(
            f"{path}: init_lora_weights={start!r} changed the base model too, so the adapter is no change to the "
            "original: save it with peft's path_initial_model_for_weight_conversion=..., and soup that"
        )
    return config


def common_configs(folders: Sequence[Path], settings: Sequence[str] = SAME) -> list[dict[str, Any]]:
    """Each folder's config; raises UserError where one differs in a setting from the first, so there is no mean."""
    first, *others = configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], others, strict=True):
        for key in settings:
            one, other = (each.get(key) or None for each in (config, first))
            if one != other and not (isinstance(one, list) and sorted(one) == sorted(other or [])):  # in any order
                raise UserError(
                    f"{folder / CONFIG}: {key} is {config.get(key)!r}, but {first.get(key)!r} in {folders[0]}: "
                    "only changes to the same model have a mean (where it is the same under two names, edit the file)"
                )
    return configs


def scaling_of(config: Mapping[str, Any], module: str = "") -> float:
    """What B A is multiplied by, from peft's adapter_config.json: alpha / r, or alpha / sqrt(r) for rsLoRA.

    `rank_pattern` and `alpha_pattern` may give a module, named as in the adapter or in its model, numbers of its own.

    >>> scaling_of({"r": 16, "lora_alpha": 32}), scaling_of({"r": 16, "lora_alpha": 32, "use_rslora": True})
    (2.0, 8.0)
    >>> scaling_of({"r": 16, "lora_alpha": 32, "alpha_pattern": {"v_proj": 8}}, "layers.0.self_attn.v_proj")
    0.5
    """

    def number(patterns: str, otherwise: str) -> Any:
        """Of the first pattern that the end of the module's name matches, as peft reads them."""
        own = (config.get(patterns) or {}).items()
        return next((n for pattern, n in own if re.match(rf"(.*\.)?({pattern})$", in_model(module))), config[otherwise])

    rank = number("rank_pattern", "r")
    return float(number("alpha_pattern", "lora_alpha") / (sqrt(rank) if config.get("use_rslora") else rank))


def in_model(name: str) -> str:
    """A name in the base model, without what peft puts before it and into it."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def weights_file(folder: Path) -> Path:
    """The file with an adapter's tensors; raises UserError where there is none."""
    for name in (ADAPTER, "adapter_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} has no {ADAPTER}: name folders that peft's save_pretrained wrote")


def factors(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Module -> the names of its factors A and B; raises ValueError where they are not an adapter's."""
    names = list(names)
    pairs = {match["module"]: (match[0], f"{match[1]}B{match[3]}") for match in map(_DOWN.fullmatch, names) if match}
    known = {name for pair in pairs.values() for name in pair}
    for a, b in pairs.values():
        if b not in names:
            raise ValueError(f"{a!r} has no {b!r} beside it")
    known |= {f"{module}.lora_{also}" for module in pairs for also in ("B.bias", "magnitude_vector")}
    strange = [name for name in names if "lora_" in name and name not in known]
    if strange or not pairs:
        raise ValueError(f"{strange[0]!r} is no factor of a LoRA update" if strange else "no factors lora_A and lora_B")
    return pairs


def _floats(checkpoint: Checkpoint, name: str, start: int = 0, count: int | None = None) -> NDArray[np.float64]:
    return widen(checkpoint.elements(name, start, count), checkpoint.entry(name).dtype).astype(np.float64)


@dataclass(frozen=True)
class _Update:
    """A tensor of a model, with what an adapter makes of it."""

    weights: tuple[Checkpoint, str]  # (out, in, ...), or turned (in, out)
    adapter: Checkpoint
    down: str  # name of A; empty where it is 1, for a bias
    up: str  # of B
    scaling: float
    turned: bool = False
    magnitude: str = ""  # of DoRA's lengths, one for each output

    def added(self, first: int, last: int) -> NDArray[np.float64]:
        """Rows of the weights and s B A, (last - first, width)."""
        up = self.scaling * _floats(self.adapter, self.up).reshape(self.adapter.entry(self.up).shape[0], -1)
        down = _floats(self.adapter, self.down).reshape(up.shape[1], -1) if self.down else np.ones((1, 1))
        left, right = (down.T[first:last], up.T) if self.turned else (up[first:last], down)
        width = right.shape[1]
        total = _floats(*self.weights, first * width, (last - first) * width).reshape(-1, width)
        for column, row in zip(left.T, right, strict=True):
            total += column[:, None] * row
        return total

    def rows(self, first: int, last: int) -> NDArray[np.float64]:
        """Rows of the merged weights; in DoRA what makes an output, a row or turned a column, has a trained length."""
        total = self.added(first, last)
        if not self.magnitude:
            return total
        if self.turned:
            return total * self._factors
        return total * _ratio(_floats(self.adapter, self.magnitude)[first:last], (total**2).sum(axis=1))[:, None]

    @cached_property
    def _factors(self) -> NDArray[np.float64]:
        """What columns are multiplied by."""
        magnitude, inside = _floats(self.adapter, self.magnitude), self.adapter.entry(self.down).shape[1]
        step = max(1, BLOCK // len(magnitude))
        squares = ((self.added(i, min(i + step, inside)) ** 2).sum(axis=0) for i in range(0, inside, step))
        return _ratio(magnitude, sum(squares, np.zeros_like(magnitude)))


def _ratio(magnitude: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a trained length to that of the weights, which peft computes in float32; rounding hides the sum's order."""
    return magnitude / np.sqrt(squares).astype(np.float32)


def merged(folder: Path, adapter: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The base model with the adapter of a folder merged into it, computed when it is read, in the base's kinds."""
    config = read_config(folder)
    heads = config.get("modules_to_save") or []
    try:
        pairs = factors(adapter.names)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    source = {name: (base, name) for name in base.entries}  # where the weights are that are read, or updated
    updates: dict[str, _Update] = {}

    def place(name: str, target: str, shape: tuple[int, ...]) -> str:
        own = base.own(target)
        entry = base.entries.get(own)
        if entry is None and not any(f".{head}." in f".{target}" for head in heads):
            raise UserError(
                f"{folder}: {name!r} changes {target!r}, which {base.path} does not have (where transformers has other "
                "names in files than in memory, write --base a file of torch.save(model.state_dict(), FILE))"
            )
        if entry is not None and (entry.shape != shape or entry.dtype not in FLOATS):
            raise UserError(f"{folder}: {name!r} is for floats of shape {shape}; {target!r} is {entry} in {base.path}")
        return own

    for name in adapter.names:
        # With bias="all" peft saves the biases of a trained head three times; the original is no part of the model.
        if "lora_" not in name and ".original_module." not in name:
            source[place(name, in_model(name), adapter.entry(name).shape)] = adapter, name
    for module, (a, b) in pairs.items():
        scale, bias = f"{module}.lora_magnitude_vector", f"{module}.lora_B.bias"
        scale = scale if scale in adapter.names else ""
        (rank, *inside), (out, *columns) = adapter.entry(a).shape, adapter.entry(b).shape
        if not inside or columns[:1] != [rank] or (scale and prod(adapter.entry(scale).shape) != out):
            raise UserError(
                f"{folder}: the factors of {module!r} do not fit together, as those of grouped convolutions"
            )
        turned = "lora_embedding_" in a or (bool(config.get("fan_in_fan_out")) and len(inside) == 1)
        own = place(a, f"{in_model(module)}.weight", (*inside, out) if turned else (out, *inside))
        scaling = scaling_of(config, module)
        updates[own] = _Update(source[own], adapter, a, b, scaling, turned, scale)
        if bias in adapter.names:
            own = place(bias, f"{in_model(module)}.bias", (out,))
            updates[own] = _Update(source[own], adapter, "", bias, scaling)
    entries = {name: of.entry(other) for name, (of, other) in sorted(source.items())}

    def fill(name: str, offset: int, view: memoryview) -> None:
        if name not in updates:
            of, other = source[name]
            of.fill(of.own(other), offset, view)
            return
        entry = entries[name]
        start, end = (place // STORED[entry.dtype].itemsize for place in (offset, offset + len(view)))
        width = entry.size // entry.shape[0]
        first = start // width
        values = updates[name].rows(first, -(-end // width)).reshape(-1)[start - first * width : end - first * width]
        view[:] = round_once(values, entry.dtype).view(np.uint8).data

    return replace(base, path=folder, entries=entries, fill=fill)
