"""The best of several models: held-out selects; what is selected on a split that reports is an oracle."""

from collections.abc import Collection, Sequence
from math import isnan

from configs.errors import UserError


def best_on_held_out(scores: Sequence[float], held_out: str, reported: Collection[str]) -> int:
    """The place of the model with the highest score on the split `held_out`, the first of equals.

    Raises:
        UserError: that split is among those whose results are reported.
        ValueError: there are no scores, or one is not a number.
    """
    if held_out in reported:
        raise UserError(f"{held_out!r} reports results, so models cannot be chosen on it: choose on a held-out split")
    return oracle(scores, held_out)


def oracle(scores: Sequence[float], split: str) -> int:
    """The place of the model with the highest score on any split, or average of splits; the first of equals.

    Without held-out labels no one could choose so: only for rows that say so. In Table 4 each column has an oracle of
    its own, also that of the mean of the shifts, so the cells of the shifts may average to more than it.
    """
    if not scores or any(isnan(score) for score in scores):
        raise ValueError(f"the best on {split!r} needs one number per model and at least one, got {list(scores)}")
    return max(range(len(scores)), key=lambda i: (scores[i], -i))
