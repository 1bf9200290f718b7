"""How much sooner greedy ends on several workers, by the authors' own decisions:  python -m slurm.schedule [--out FILE]

Greedy tries one candidate after the other, and each decision waits for the one before. Workers that evaluate the next
candidates against the soup so far waste only what stands after an accept (soups/shortcuts.py, greedy_speculative).
Replays the 71 decisions of results/released/greedy_decisions.csv for 1 to 64 workers. Counts rounds, not seconds: the
evaluations of a round are taken to last equally long.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from configs.cli import one_line_errors
from configs.errors import UserError
from soups.shortcuts import Spent
from store.atomic import replacing

ROOT = Path(__file__).resolve().parents[1]
DECISIONS = ROOT / "results/released/greedy_decisions.csv"
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def read_decisions(path: Path = DECISIONS) -> list[bool]:
    """Whether each candidate was accepted, in the order in which they were tried; the first model is none of them.

    Raises:
        UserError: the file is missing or is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        return [{"true": True, "false": False}[line["accepted"]] for line in lines[1:]]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; git checkout {path.name} brings it back") from None
    except KeyError as error:
        raise UserError(f"{path}: a column `accepted` with true or false is needed, {error} is wrong") from None


def simulate(accepted: Sequence[bool], workers: int) -> Spent:
    """Rounds and evaluations of `greedy_speculative` with so many candidates a round, without any model.

    Args:
        accepted: the decision about each candidate, in order.
        workers: candidates a round.

    Raises:
        ValueError: no workers.

    >>> simulate([False, True, False, False], workers=2)
    Spent(evaluations=4, rounds=2, image_forwards=0)
    >>> simulate([True, False, False, False], workers=2)
    Spent(evaluations=5, rounds=3, image_forwards=0)
    """
    if workers < 1:
        raise ValueError(f"greedy needs at least one worker, got {workers}")
    decided = evaluations = rounds = 0
    while decided < len(accepted):
        tried = accepted[decided : decided + workers]
        rounds, evaluations = rounds + 1, evaluations + len(tried)
        decided += tried.index(True) + 1 if True in tried else len(tried)
    return Spent(evaluations, rounds, 0)


def most_rounds(candidates: int, accepts: int, workers: int) -> int:
    """An upper bound on the rounds, wherever the accepts are: each of them, and the end, cuts one round short.

    >>> most_rounds(candidates=71, accepts=4, workers=8)
    13
    """
    return (candidates + (accepts + 1) * (workers - 1)) // workers


def table(accepted: Sequence[bool]) -> pd.DataFrame:
    """A line for each number of workers; speedup and useful share are fractions of 1 evaluation a round."""
    lines = []
    for workers in WORKERS:
        spent = simulate(accepted, workers)
        lines.append(
            {
                "workers": workers,
                "rounds": spent.rounds,
                "evaluations": spent.evaluations,
                "speedup": round(len(accepted) / spent.rounds, 2),
                "useful": round(len(accepted) / spent.evaluations, 3),
            }
        )
    return pd.DataFrame(lines)


def run(out: Path | None) -> None:
    """Print the table, and write it where asked."""
    found = table(read_decisions())
    grid = Table(*found.columns, box=None, title="greedy, 71 decisions of the authors' run")
    for row in found.itertuples(index=False):
        grid.add_row(*map(str, row))
    Console().print(grid)
    if out is not None:
        with replacing(out) as temporary:
            found.to_csv(temporary, index=False)
        print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    one_line_errors(lambda: run(arguments.out))
