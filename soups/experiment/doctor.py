"""What is wrong with the pool of a finished sweep:  python -m soups.experiment.doctor demo [--barriers]

As soups.doctor, with files, initialisation and held-out accuracies known. With --barriers the network is evaluated half
way between all pairs of models.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from rich.console import Console

from configs.schema import load
from eval.forward import Evaluator
from soups.average import Average, Loader
from soups.doctor import examine, show
from soups.errors import one_line_errors
from soups.experiment.pool import usable_pool
from soups.files.weights import Weights


def examine_experiment(experiment: str, runs: Path, *, barriers: bool, console: Console) -> None:
    """The pool of a finished sweep: files, initialisation and held-out accuracies are known, and the network too."""
    config = load(experiment, f"paths.runs={runs}")
    start, *tuned = usable_pool(config)
    scores = {i.folder.name: i.held_out_score for i in tuned}
    files = [i.folder / "weights.safetensors" for i in tuned]
    held_out = tuned[0].held_out["n"]
    show(examine(files, start.folder / "weights.safetensors", scores, held_out=held_out), console)
    if not barriers:
        return
    evaluator, split = Evaluator(config), config.task.held_out
    count = len(tuned) * (len(tuned) + 1) // 2
    console.print(f"midpoints of all pairs, {count} evaluations on {split} ...")
    for height, first, second in midpoint_barriers(
        [i.load for i in tuned], lambda weights: evaluator.score(evaluator.fresh_logits(weights, split), split)
    )[:10]:
        pair, side = f"rows {tuned[first].row} and {tuned[second].row}", "below" if height > 0 else "above"
        console.print(f"- {pair}: the midpoint is {100 * abs(height):.1f} points {side} their mean")


def midpoint_barriers(models: Sequence[Loader], accuracy: Callable[[Weights], float]) -> list[tuple[float, int, int]]:
    """How far the midpoint of each pair of K models is below the mean of both, highest first, and the pair.

    Where accuracy drops half way between two models they are not in one basin, and their soup is bad. Each model is
    loaded K times, two are in memory, and the accuracy, in [0, 1] on held-out, is asked for K (K + 1) / 2 times.
    """
    ends = [accuracy(load()) for load in models]
    found = []
    for i, j in combinations(range(len(models)), 2):
        middle = accuracy(Average().plus(models[i]()).plus(models[j]()).weights())
        found.append(((ends[i] + ends[j]) / 2 - middle, i, j))
    return sorted(found, key=lambda barrier: (-barrier[0], *barrier[1:]))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="name of a finished sweep")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are")
    parser.add_argument("--barriers", action="store_true", help="accuracy half way between all pairs")
    arguments = parser.parse_args()
    one_line_errors(
        lambda: examine_experiment(arguments.experiment, arguments.runs, barriers=arguments.barriers, console=Console())
    )


if __name__ == "__main__":
    main()
