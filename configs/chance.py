"""Chance that is keyed, never counted: a draw depends on its key alone, not on what was drawn before it."""

import hashlib
import random

import numpy as np
import torch


def _bits(key: tuple[object, ...]) -> int:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone: not on call order, machine or library version.

    >>> uniform(0, 17, "optim.lr") == uniform(0, 17, "optim.lr") != uniform(0, 18, "optim.lr")
    True
    """
    return (_bits(key) >> 11) / 2**53


def seed(*key: object) -> int:
    """A seed in [0, 2**63) for a generator, from `key` alone."""
    return _bits(key) >> 1


def seed_globals(*key: object) -> None:
    """Seed the three global generators that timm's and torchvision's augmentations draw from.

    Called before every sample, so that sample j of epoch e looks the same whichever process or restart makes it.
    """
    bits = _bits(key)
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    torch.default_generator.manual_seed(bits >> 1)  # torch.manual_seed also formats a traceback for each device
