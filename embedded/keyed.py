"""Chance of the benchmark: it depends on names alone, so that no order of calls can move a drawing."""

from soups.chance import uniform

SEED = "emoji-1"  # changes every split; part of the data's identity


def draw(*key: object) -> float:
    """A number in [0, 1) that is a pure function of `key`.

    >>> draw("1F34E", "noto") == draw("1F34E", "noto") != draw("1F34E", "noto-v1")
    True
    """
    return uniform(SEED, *key)
