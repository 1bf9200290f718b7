"""From settings to a folder that was loaded back and gave the soup's logits."""

from pathlib import Path
from typing import Any

import torch

from configs.exporting import Export, Target
from soups.errors import UserError
from soups.experiment.export.card import write_card
from soups.experiment.export.formats import (
    Reader,
    possible,
    read_onnx,
    read_open_clip,
    read_timm,
    read_transformers,
    targets,
    write_onnx,
    write_open_clip,
    write_timm,
    write_transformers,
)
from soups.experiment.export.source import Source, read_source
from soups.experiment.export.usage import usage
from soups.export.onnx import need_packages
from soups.files.atomic import replacing

TOLERANCE = 1e-4  # of the largest logit, and at least 1e-4
WRITERS: dict[Target, Any] = {
    "timm": write_timm,
    "open_clip": write_open_clip,
    "transformers": write_transformers,
    "onnx": write_onnx,
}
READERS: dict[Target, Reader] = {
    "timm": read_timm,
    "open_clip": read_open_clip,
    "transformers": read_transformers,
    "onnx": read_onnx,
}


def compare(source: Source, to: Target, folder: Path) -> float:
    """The largest difference between the folder's logits and the soup's, on inputs of chance of two batch sizes.

    Raises:
        UserError: it is above 1e-4 of the largest logit, or above 1e-4 where that is smaller than 1.
    """
    largest = 0.0
    with torch.no_grad():
        load = READERS[to](source, folder)
        for count in (2, 5):
            inputs = source.example(count, seed=count)
            ours, theirs = source.logits(inputs), load(inputs)
            gap = (ours - theirs).abs().max().item()
            if not gap <= TOLERANCE * max(1.0, ours.abs().max().item()):
                raise UserError(
                    f"to={to}: loaded back, logits differ by {gap:.2g} from the soup's, so nothing was written; "
                    f"{possible(source)}"
                )
            largest = max(largest, gap)
    return largest


def export(settings: Export) -> str:
    """Write the folder and return what was written and compared, a line each.

    Raises:
        UserError: no such soup, a library that has no such network, missing packages, a folder that is there
            already, a full disk, or logits that differ.
    """
    out, to = settings.out, settings.to
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} is there already: name another folder, or delete it")
    if to == "onnx":
        need_packages()
    source = read_source(settings)
    if to not in targets(source) and not (to == "timm" and source.model.kind in ("timm", "imagenet_lite0")):
        raise UserError(f"to={to}: this soup is of a network of {source.model.kind}: {possible(source)}")
    with replacing(out, folder=True) as folder:
        WRITERS[to](source, folder)
        gap = compare(source, to, folder)
        write_card(source, to, settings.license, usage(source, to), folder)
    return f"{out}: loaded by {to}, logits within {gap:.1e} of the soup's on 7 inputs of chance"
