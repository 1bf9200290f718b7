"""Chance that is keyed, never counted: a draw depends on its key alone, not on what was drawn before it."""

import hashlib


def bits(*key: object) -> int:
    """64 bits that are a function of `key`."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone: not on call order, machine or library version.

    >>> uniform(0, 17, "optim.lr") == uniform(0, 17, "optim.lr") != uniform(0, 18, "optim.lr")
    True
    """
    return (bits(*key) >> 11) / 2**53


def seed(*key: object) -> int:
    """A seed in [0, 2**63) for a generator, from `key` alone."""
    return bits(*key) >> 1
