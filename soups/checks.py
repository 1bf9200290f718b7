"""What is wrong with files, told before they are averaged: numbers, names, configs and angles give it away."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soups.conformance import Layout, common_layout
from soups.errors import UserError
from soups.files.checkpoints import BLOCK, Checkpoint, content_digest, hash_tensor
from soups.files.dtypes import FLOATS, widen
from soups.files.folders import config_beside, config_of
from soups.files.opening import opened
from soups.files.reading import Reading
from soups.geometry import ANOTHER_ORIGIN, medians_of_others

ADAPTER = re.compile(r"(^|\.)(lora_|hada_|lokr_|oft_|ia3_|vera_)")
# Of GPTQ, AWQ, bitsandbytes, and float8 with scales.
QUANTISED = re.compile(r"\.(qweight|qzeros|absmax|quant_map|nested_absmax|SCB|weight_scale|weight_scale_inv)$")
LOOKED_AT = 1 << 16  # of each tensor, the first elements
AT_ONCE = 1 << 22  # elements, over all models


def looked_through(checkpoint: Checkpoint) -> tuple[str, str]:
    """The digest of a file's content, and the first tensor in it with NaN or infinity or an empty string.

    A mask, of zeros and infinities alone, is no fault.
    """
    buffer, tensors, strange = np.empty(8 * BLOCK, np.uint8), {}, ""
    for name, entry in checkpoint.entries.items():
        running, finite = hash_tensor(), True
        for block in checkpoint.blocks(name, buffer):
            running.update(block.data)
            finite = finite and (entry.dtype not in FLOATS or bool(np.isfinite(widen(block, entry.dtype)).all()))
        tensors[name] = running.hexdigest()
        if not finite and not strange and not _is_mask(checkpoint, name, buffer):
            strange = name
    return content_digest(checkpoint, tensors), strange


def sound_digest(checkpoint: Checkpoint) -> str:
    """The digest of a file's content; a UserError where a tensor holds NaN or infinity."""
    digest, strange = looked_through(checkpoint)
    if strange:
        raise UserError(f"{checkpoint.path}: tensor {strange!r} holds NaN or infinity: leave that model out")
    return digest


def _is_mask(checkpoint: Checkpoint, name: str, buffer: NDArray[Any]) -> bool:
    blocks = (widen(block, checkpoint.entries[name].dtype) for block in checkpoint.blocks(name, buffer))
    return all(bool((np.isinf(values) | (values == 0)).all()) for values in blocks)


def refuse_factors_and_codes(checkpoints: Sequence[Checkpoint]) -> None:
    """Factors of low rank are not averaged one by one, and codes of quantised weights have no mean."""
    for checkpoint in checkpoints:
        for name, entry in checkpoint.entries.items():
            if ADAPTER.search(name):
                raise UserError(
                    f"{checkpoint.path} is of an adapter ({name!r}): the mean of factors is not the mean of updates. "
                    "Type `soups lora` and the adapters' folders, or soup the models into which peft's "
                    "merge_and_unload merges"
                )
            is_code = entry.dtype not in FLOATS and name.endswith("weight") and len(entry.shape) > 1
            if is_code or QUANTISED.search(name):
                raise UserError(
                    f"{checkpoint.path}: tensor {name!r} ({entry}) is of quantised weights, whose codes have no mean: "
                    "soup the models as they were before, or dequantise them first"
                )


def refuse_other_configs(paths: Sequence[Path], *, in_order: bool = True) -> None:
    """Models of transformers or timm whose config.json speak of different networks or classes.

    With `in_order` classes in another order too, which are seen here alone: the shapes are equal.
    """
    first: tuple[Path, dict[str, Any]] | None = None
    for path in paths:
        file, values = config_beside(path, "config.json"), config_of(path)
        if file is None:
            continue
        first = first or (file, values)
        keys = ("model_type", "architectures", "architecture", "id2label", "problem_type", "quantization_config")
        for key in (*keys, *(["label_names"] if "label_names" in values and "label_names" in first[1] else [])):
            ours, theirs = values.get(key), first[1].get(key)
            if key == "id2label" and ours and theirs and sorted(ours.values()) != sorted(theirs.values()):
                named = [Counter(each.values()) for each in (ours, theirs)]  # one may have a name twice
                only = [sorted((a - b).elements()) for a, b in (named, named[::-1])]
                raise UserError(
                    f"{file} and {first[0]} have different classes: {_short(only[0])} in the one alone, "
                    f"{_short(only[1])} in the other alone, and models of another label space have no common soup"
                )
            if ours != theirs and (key != "id2label" or in_order or not (ours and theirs)):
                raise UserError(
                    f"{file} and {first[0]} differ in {key!r} ({_short(values.get(key))} and "
                    f"{_short(first[1].get(key))}): models of another network or label space have no common soup"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def sampled_cosines(checkpoints: Sequence[Checkpoint], layout: Layout) -> NDArray[Any]:
    """(K, K) cosines of K models' weights, each the median over all elements of matrices; 1 without any.

    An element's cosine is that of its matrix, told by the first elements: a head that is new in each model, which may
    be long, is one tensor among many.
    """
    count = len(checkpoints)
    found, sizes, width = [], [], max(1, min(LOOKED_AT, AT_ONCE // count))
    for name, entry in layout.entries.items():
        if entry.dtype not in FLOATS or len(entry.shape) < 2 or name in layout.kept:
            continue
        rows = np.empty((count, min(width, entry.size)))
        for row, checkpoint in zip(rows, checkpoints, strict=True):
            row[:] = widen(checkpoint.elements(name, 0, len(row)), checkpoint.entry(name).dtype)
        products = rows @ rows.T
        lengths = np.sqrt(products.diagonal())
        if (lengths > 0).all():
            found.append(products / np.outer(lengths, lengths))
            sizes.append(entry.size)
    return _weighted_median(np.array(found), np.array(sizes)) if found else np.ones((count, count))


def _weighted_median(values: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Of (T, ...) values along the first axis: half of the weight lies on values that are at most this.

    >>> _weighted_median(np.array([0.0, 0.1, 1.0]), np.array([1, 1, 8])).item()
    1.0
    """
    order = values.argsort(axis=0, kind="stable")
    before = weights[order].cumsum(axis=0)
    middle = (2 * before < weights.sum()).sum(axis=0, keepdims=True)
    medians: NDArray[Any] = np.take_along_axis(np.take_along_axis(values, order, axis=0), middle, axis=0)[0]
    return medians


def refuse_unrelated(checkpoints: Sequence[Checkpoint], layout: Layout) -> None:
    """Models that were not fine-tuned from the same weights lie behind a barrier: their mean is of no use."""
    cosines = medians_of_others(sampled_cosines(checkpoints, layout))
    unrelated = cosines < ANOTHER_ORIGIN
    if unrelated.any():
        names = [str(checkpoint.path) for checkpoint, is_so in zip(checkpoints, unrelated, strict=True) if is_so]
        raise UserError(
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: not fine-tuned from the same checkpoint; "
            f"weights have a cosine of {cosines[unrelated].min():.2f} with the other models (median). Leave them out "
            "(soups doctor tells more), or average them all the same with --allow-unrelated"
        )


def refuse_unsuitable(
    sources: Sequence[Path], *, allow_unrelated: bool = False, reading: Reading | None = None
) -> Layout:
    """Every refusal, before anything is averaged; returns what is averaged."""
    refuse_other_configs(sources, in_order=reading is None or reading.like is None)
    with opened(sources, reading) as checkpoints:
        refuse_factors_and_codes(checkpoints)
        layout = common_layout(checkpoints, reading or Reading())
        if not allow_unrelated:
            refuse_unrelated(checkpoints, layout)
        return layout
