"""How much sooner greedy ends on several workers, by the authors' decisions:  python -m benchmarks.schedule

Replays their 71 decisions (results/released/greedy_decisions.csv) with the project's own loop, which evaluates the next
candidates of a round together; what stands after an accepted one is wasted. Counts rounds, not seconds: the evaluations
of a round are taken to last equally long. Writes results/measured/greedy_schedule.csv, or the file named by --out.
"""

from typing import Any

import pandas as pd

from benchmarks.run import ROOT, benchmark
from soups.selection import Result, Selection, add_in_order

DECISIONS = ROOT / "results/released/greedy_decisions.csv"
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def replay(workers: int) -> Selection:
    """The authors' greedy soup with so many candidates a round: its decisions, evaluations and rounds."""
    correct = pd.read_csv(DECISIONS)["held_out_correct"].tolist()
    return add_in_order(
        range(len(correct)),
        correct[0],
        lambda mixtures, to_beat: [Result(correct[mixture[-1]]) for mixture in mixtures],
        ahead=workers,
        ties="drop",  # as in the authors' script
    )


def schedule() -> list[dict[str, Any]]:
    """A row for each number of workers; useful is the share of evaluations that decided something."""
    found = {workers: replay(workers) for workers in WORKERS}
    decisions = found[1].rounds
    return [
        {
            "workers": workers,
            "rounds": each.rounds,
            "evaluations": each.evaluations,
            "speedup": round(decisions / each.rounds, 2),
            "useful": round(decisions / each.evaluations, 3),
        }
        for workers, each in found.items()
    ]


if __name__ == "__main__":
    benchmark(lambda options: schedule(), name="greedy_schedule")
