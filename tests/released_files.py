"""Checkpoints with the 160 tensors of the authors' released models, made up."""

import torch

from models.released import released_shapes


def random_state(seed=0, dtype=torch.float32):
    """All of their shapes, with numbers of sizes that a trained network could have."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in released_shapes().items():
        scale = 0.3 if "positional" in name or "class_embedding" in name else 0.03
        numbers = scale * torch.randn(shape, generator=generator)
        is_norm = ".ln_" in name and name.endswith("weight")
        state[name] = (1 + numbers if is_norm else numbers).to(dtype)
    return state


def thin_state(value=0.0, changed=()):
    """The same shapes in a file of a few kilobytes: every tensor is one number, seen many times.

    Args:
        value: the number.
        changed: (name, tensor or None) that replace or remove some.
    """
    state = {name: torch.full((1,), value).expand(shape or (1,)) for name, shape in released_shapes().items()}
    state["model.logit_scale"] = torch.tensor(value)
    for name, tensor in changed:
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state
