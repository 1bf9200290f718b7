"""Chance that depends on names alone, so that no order of calls and no library version can move a drawing."""

import hashlib

SEED = "emoji-1"  # changes every split; part of the data's identity


def draw(*key: object) -> float:
    """A number in [0, 1) that is a pure function of `key`.

    >>> draw("1F34E", "noto") == draw("1F34E", "noto") != draw("1F34E", "noto-v1")
    True
    """
    digest = hashlib.blake2b("/".join(map(str, (SEED, *key))).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
