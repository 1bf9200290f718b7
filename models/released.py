"""The authors' released checkpoints: from their state dicts to the network of `model=clip_vit_b32`.

A file is the state dict of their wrapper: OpenAI's CLIP ViT-B/32 without its text transformer, and a linear head on
features of unit norm. What is left of the text tower takes no part in classification and is dropped.
"""

import re
from contextlib import ExitStack
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from soups.files.checkpoints import Checkpoint
from soups.files.dtypes import FLOATS, STORED
from soups.files.opening import open_checkpoint
from soups.files.tensors import DTYPES

LEFTOVERS = {  # of the text tower, which the wrapper keeps and never calls
    "model.positional_embedding": (77, 512),
    "model.text_projection": (512, 512),
    "model.logit_scale": (),
    "model.token_embedding.weight": (49408, 512),
    "model.ln_final.weight": (512,),
    "model.ln_final.bias": (512,),
}
VISUAL, HEAD = "model.visual.", "classification_head."


def _block() -> dict[str, tuple[int, ...]]:
    width = 768
    shapes: dict[str, tuple[int, ...]] = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    shapes |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    shapes |= {"mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
    shapes |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    return shapes | {f"{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of each of the 160 tensors of a released file.

    Source: the wrapper of github.com/mlfoundations/model-soups, which loads them strictly.

    >>> shapes = released_shapes()
    >>> len(shapes), sum(prod(shape) for shape in shapes.values())
    (160, 113961705)
    """
    tower: dict[str, tuple[int, ...]] = {"class_embedding": (768,), "positional_embedding": (50, 768)}
    tower |= {"proj": (768, 512), "conv1.weight": (768, 3, 32, 32)}
    tower |= {f"{norm}.{part}": (768,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    for layer in range(12):
        tower |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in _block().items()}
    head = {f"{HEAD}weight": (1000, 512), f"{HEAD}bias": (1000,)}
    return LEFTOVERS | {VISUAL + name: shape for name, shape in tower.items()} | head


def own_name(name: str) -> str | None:
    """What a tensor of theirs is called in our network; None of what is dropped.

    >>> own_name("model.visual.proj"), own_name("classification_head.bias"), own_name("model.logit_scale")
    ('tower.proj', 'head.bias', None)
    """
    if name in LEFTOVERS:
        return None
    return re.sub(rf"^{re.escape(HEAD)}", "head.", re.sub(rf"^{re.escape(VISUAL)}", "tower.", name))


def check_released(checkpoint: Checkpoint) -> None:
    """Refuse a file that is not one of the authors'.

    Raises:
        UserError: names the file and the first tensor that is missing, unknown, of another shape or no float.
    """
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
    """Weights for `models.classifier.architecture` of `model=clip_vit_b32` with 1,000 classes, from a released file.

    Never unpickles (`weights_only`); numbers become float32, as their `get_model_from_sd` has it, which is exact for
    float16 and bfloat16.

    Args:
        path: model_<i>.pt.

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
            own = own_name(name)
            if own is None:
                dropped[name] = prod(entry.shape)
                continue
            stored = np.empty(entry.size, STORED[entry.dtype])
            checkpoint.read(name, 0, stored)
            weights[own] = torch.from_numpy(stored).view(DTYPES[entry.dtype]).reshape(entry.shape).float()
    return weights, dropped
