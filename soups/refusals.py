"""Pools that can be averaged number by number, and should not be: what their names, configs and angles give away."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from soups.conformance import Layout, common_layout
from soups.geometry import ANOTHER_ORIGIN, medians_of_others
from store.checkpoints import Checkpoint, opened
from store.dtypes import FLOATS, STORED, widen

ADAPTER = re.compile(r"(^|\.)(lora_|hada_|lokr_|oft_|ia3_|vera_)")
DOWN = re.compile(r"\.lora_(embedding_)?A(\.|$)")
# Of GPTQ, AWQ, bitsandbytes, and float8 with scales.
QUANTISED = re.compile(r"\.(qweight|qzeros|absmax|quant_map|nested_absmax|SCB|weight_scale|weight_scale_inv)$")
LOOKED_AT = 1 << 16  # of each tensor, the first elements
AT_ONCE = 1 << 22  # elements, over all models


def refuse_adapters(checkpoints: Sequence[Checkpoint]) -> None:
    """Factors of low rank are not averaged one by one.

    Raises:
        UserError: an ingredient is an adapter; says so where their ranks differ.
    """
    ranks: dict[int, Path] = {}
    factors: list[tuple[Path, str]] = []
    for checkpoint in checkpoints:
        factors += [(checkpoint.path, name) for name in checkpoint.entries if ADAPTER.search(name)]
        for name, entry in checkpoint.entries.items():
            if DOWN.search(name) and entry.shape:
                ranks.setdefault(entry.shape[0], checkpoint.path)
    if not factors:
        return
    what = f"are in {factors[0][0]} ({factors[0][1]!r})"
    if len(ranks) > 1:
        what = "are of different rank, " + " and ".join(f"{rank} in {path}" for rank, path in list(ranks.items())[:2])
    raise UserError(
        f"LoRA adapters {what}: the mean of their factors is not the mean of their updates. Merge each into its model "
        "first (peft's merge_and_unload) and soup those, or call soups.lora.soup_lora, which is exact"
    )


def refuse_quantised(checkpoints: Sequence[Checkpoint]) -> None:
    """Codes of quantised weights have no mean.

    Raises:
        UserError: an ingredient has tensors that only quantised models have, or matrices of integers as weights.
    """
    for checkpoint in checkpoints:
        for name, entry in checkpoint.entries.items():
            is_code = entry.dtype not in FLOATS and name.endswith("weight") and len(entry.shape) > 1
            if is_code or QUANTISED.search(name):
                raise UserError(
                    f"{checkpoint.path}: tensor {name!r} ({entry}) is of quantised weights, whose codes have no mean: "
                    "soup the models as they were before, or dequantise them first"
                )


def config_beside(path: Path) -> Path | None:
    """config.json in the folder that an ingredient is, or that it lies in."""
    found = (path if path.is_dir() else path.parent) / "config.json"
    return found if found.exists() else None


def read_config(path: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        UserError: damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a dict")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return values


def refuse_other_configs(paths: Sequence[Path]) -> None:
    """Models of transformers or timm whose config.json speak of different networks or classes.

    Raises:
        UserError: names two files and the setting; equal shapes with classes in another order are seen here alone.
    """
    first: tuple[Path, dict[str, Any]] | None = None
    for path in paths:
        file = config_beside(path)
        if file is None:
            continue
        values = read_config(file)
        if first is None:
            first = file, values
            continue
        for key in ("model_type", "architectures", "architecture", "id2label", "problem_type", "quantization_config"):
            if values.get(key) != first[1].get(key):
                raise UserError(
                    f"{file} and {first[0]} differ in {key!r} ({_short(values.get(key))} and "
                    f"{_short(first[1].get(key))}): models of another network or label space have no common soup"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def sampled_cosines(checkpoints: Sequence[Checkpoint], layout: Layout) -> np.ndarray:
    """(K, K) cosines of K models' weights: the median over matrices, each told by its first elements; 1 without any.

    The doctor reads all elements and sums over tensors; here a new head, which may be long, is one tensor among many.
    """
    count = len(checkpoints)
    found, width = [], max(1, min(LOOKED_AT, AT_ONCE // count))
    for name, entry in layout.entries.items():
        if entry.dtype not in FLOATS or len(entry.shape) < 2:
            continue
        stored = np.empty(min(width, entry.size), STORED[entry.dtype])
        rows = np.empty((count, len(stored)))
        for row, checkpoint in zip(rows, checkpoints, strict=True):
            checkpoint.read(name, 0, stored)
            row[:] = widen(stored, entry.dtype)
        products = rows @ rows.T
        lengths = np.sqrt(products.diagonal())
        if (lengths > 0).all():
            found.append(products / np.outer(lengths, lengths))
    return np.median(found, axis=0) if found else np.ones((count, count))


def refuse_strangers(checkpoints: Sequence[Checkpoint], layout: Layout) -> None:
    """Models that did not start from the same weights lie behind a barrier: their mean is of no use.

    Raises:
        UserError: names those whose weights are at a wide angle to the others'.
    """
    kin = medians_of_others(sampled_cosines(checkpoints, layout))
    strange = kin < ANOTHER_ORIGIN
    if strange.any():
        names = [
            str(checkpoint.path) for checkpoint, is_strange in zip(checkpoints, strange, strict=True) if is_strange
        ]
        raise UserError(
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} started elsewhere: weights have a cosine of "
            f"{kin[strange].min():.2f} with the other models (median). Leave them out (python -m soups.doctor tells "
            "more), or average them all the same with unrelated=average"
        )


def refuse_unsuitable(paths: Sequence[Path], *, unrelated: bool = False) -> None:
    """Every refusal, before anything is averaged.

    Args:
        paths: of the ingredients.
        unrelated: average models that started elsewhere all the same.

    Raises:
        UserError: as the functions above, or as `common_layout`.
    """
    refuse_other_configs(paths)
    with opened(paths) as checkpoints:
        refuse_adapters(checkpoints)
        refuse_quantised(checkpoints)
        layout = common_layout(checkpoints)
        if not unrelated:
            refuse_strangers(checkpoints, layout)
