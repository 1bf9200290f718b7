"""Checkpoints with the tensors of the authors' released models, made up, in their size or in a small one."""

import re

import torch

from models.released import released_shapes

SMALLER = {768: 64, 2304: 192, 3072: 256, 512: 32, 49408: 90, 77: 8}


def small_shapes():
    """Their tensors in a network of two blocks and a twelfth of their width."""
    kept = {name: shape for name, shape in released_shapes().items() if not re.search(r"\.([2-9]|1\d)\.", name)}
    return {name: tuple(SMALLER.get(size, size) for size in shape) for name, shape in kept.items()}


SMALL_VISION = {"image_size": 224, "layers": 2, "width": 64, "head_width": 64, "patch_size": 32}
SMALL_TEXT = {"context_length": 8, "vocab_size": 90, "width": 32, "heads": 1, "layers": 1}
SMALL_NETWORK = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": SMALL_VISION, "text_cfg": SMALL_TEXT}  # open_clip's


def random_state(shapes, seed=0):
    """Numbers of sizes that a trained network could have."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        scale = 0.3 if "positional" in name or "class_embedding" in name else 0.03
        numbers = scale * torch.randn(shape, generator=generator)
        state[name] = 1 + numbers if ".ln_" in name and name.endswith("weight") else numbers
    return state


def thin_state(shapes, value=0.0, **changed):
    """A file of a few kilobytes: every tensor is one number, seen many times; some are replaced, or removed by None."""
    state = {name: torch.full((1,), value).expand(shape or (1,)) for name, shape in shapes.items()}
    state["model.logit_scale"] = torch.tensor(value)
    return {name: tensor for name, tensor in (state | changed).items() if tensor is not None}
