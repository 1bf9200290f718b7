"""The authors' released checkpoints: from their state dicts to the network of `model=clip_vit_b32`.

A file is the state dict of their wrapper: OpenAI's CLIP ViT-B/32 without its text transformer, and a linear head on
features of unit norm. The rest of the text tower takes no part in classification and is dropped.
"""

from contextlib import ExitStack
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import load
from soups.files.checkpoints import Checkpoint
from soups.files.dtypes import FLOATS, STORED
from soups.files.opening import open_checkpoint
from soups.files.weights import DTYPES

LEFTOVERS = {  # the text tower without its transformer, which the wrapper keeps and never calls
    "model.positional_embedding": (77, 512),
    "model.text_projection": (512, 512),
    "model.logit_scale": (),
    "model.token_embedding.weight": (49408, 512),
    "model.ln_final.weight": (512,),
    "model.ln_final.bias": (512,),
}
VISUAL, HEAD = "model.visual.", "classification_head."


@cache
def released_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of each of the 160 tensors of a released file: those of our network under their names, and more.

    Source: the wrapper of github.com/mlfoundations/model-soups, which loads them strictly.
    """
    from models.classifier import architecture  # noqa: PLC0415  # seconds that what converts nothing need not wait for

    with torch.device("meta"):
        ours = architecture(load("released").model, num_classes=1000).state_dict()
    names = {name: name.replace("tower.", VISUAL).replace("head.", HEAD) for name in ours}
    return LEFTOVERS | {names[name]: tuple(tensor.shape) for name, tensor in ours.items()}


def check_released(checkpoint: Checkpoint) -> None:
    """Refuse a file that is not one of the authors': it is named, and its first tensor that is unlike."""
    shapes = released_shapes()
    for name in sorted(shapes.keys() | checkpoint.entries.keys()):
        entry = checkpoint.entries.get(name)
        wrong = f"{checkpoint.path} is not one of the released models: tensor {name!r}"
        if entry is None:
            raise UserError(f"{wrong} is missing")
        if name not in shapes:
            raise UserError(f"{wrong} is not one of theirs")
        if entry.shape != shapes[name] or entry.dtype not in FLOATS:
            raise UserError(f"{wrong} is {entry}, but floats of {shapes[name]} in theirs")


def convert(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Weights for `models.classifier.architecture` of `model=clip_vit_b32` with 1,000 classes, from model_<i>.pt.

    Never unpickles (`weights_only`); numbers become float32, as their `get_model_from_sd` has it, which is exact for
    float16 and bfloat16.

    Returns:
        The 154 tensors of image tower and head, and how many numbers each dropped tensor had.

    Raises:
        UserError: missing, damaged, or not one of the authors' files.
    """
    with ExitStack() as stack:
        checkpoint = open_checkpoint(path, stack)
        check_released(checkpoint)
        weights, dropped = {}, {}
        for name, entry in checkpoint.entries.items():
            if name in LEFTOVERS:
                dropped[name] = prod(entry.shape)
                continue
            stored = np.empty(entry.size, STORED[entry.dtype])
            checkpoint.read(name, 0, stored)
            ours = name.replace(VISUAL, "tower.").replace(HEAD, "head.")
            weights[ours] = torch.from_numpy(stored).view(DTYPES[entry.dtype]).reshape(entry.shape).float()
    return weights, dropped
