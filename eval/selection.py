"""Which of several models is the best, and on which split that was decided: held-out selects, an oracle is labelled."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isnan

from configs.errors import UserError


@dataclass(frozen=True)
class Choice:
    """A model chosen by its score on one split."""

    index: int  # of the model, in the order of its scores
    split: str  # what was looked at to choose it
    oracle: bool  # the split reports: no one could have chosen so without seeing its labels

    @property
    def label(self) -> str:
        """What a table calls it, as in the paper's Table 4.

        >>> Choice(3, "sketch", oracle=True).label
        'Best on sketch (oracle)'
        """
        return f"Best on {self.split}{' (oracle)' if self.oracle else ''}"


def _best(scores: Sequence[float], split: str) -> int:
    if not scores or any(isnan(score) for score in scores):
        raise ValueError(f"the best on {split!r} needs one number per model and at least one, got {list(scores)}")
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def chosen_on_held_out(scores: Sequence[float], held_out: str, reported: Collection[str]) -> Choice:
    """The model with the highest score on the held-out split, the first of equals.

    Args:
        scores: one per model, on the held-out split.
        held_out: the name of that split.
        reported: the splits whose results are shown, of which it must not be one.

    Raises:
        UserError: the held-out split is one that reports.
        ValueError: there are no scores, or one is not a number.
    """
    choice = Choice(_best(scores, held_out), held_out, oracle=held_out in reported)
    refuse_oracle(choice, held_out)
    return choice


def oracle(scores: Sequence[float], split: str) -> Choice:
    """The model with the highest score on a split that reports, the first of equals; for rows that say so.

    In Table 4 each column has an oracle of its own, and that of the mean of the shifts is the model with the best
    mean, so the oracles' own cells may average to more than it.

    Args:
        scores: one per model, on that split, or averaged over several.
        split: its name, or that of the average.

    Raises:
        ValueError: there are no scores, or one is not a number.
    """
    return Choice(_best(scores, split), split, oracle=True)


def refuse_oracle(choice: Choice, held_out: str) -> None:
    """Let pass only what was chosen on the held-out split; to be called for every row that is not labelled an oracle.

    Raises:
        UserError: the choice is an oracle, or was made on another split.
    """
    if choice.oracle or choice.split != held_out:
        raise UserError(
            f"model {choice.index} was chosen on {choice.split!r}{', which reports' if choice.oracle else ''}: choose "
            f"it on the held-out split {held_out!r}, or label its row {choice.label!r}"
        )
