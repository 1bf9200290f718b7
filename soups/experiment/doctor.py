"""What is wrong with the pool of a finished sweep:  python -m soups.experiment.doctor demo [--barriers]

As soups.doctor, with files, initialisation and held-out accuracies known. With --barriers the network is evaluated half
way between all pairs of models.
"""

import argparse
from pathlib import Path

from rich.console import Console

from configs.schema import load
from eval.forward import Evaluator
from soups.barriers import midpoint_barriers
from soups.doctor import examine, show
from soups.errors import one_line_errors
from soups.experiment.pool import usable_pool


def examine_experiment(experiment: str, runs: Path, *, barriers: bool, console: Console) -> None:
    """The pool of a finished sweep: files, initialisation and held-out accuracies are known, and the network too.

    Raises:
        UserError: rows are missing.
    """
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
    for barrier in midpoint_barriers(
        [i.load for i in tuned], lambda weights: evaluator.score(evaluator.fresh_logits(weights, split), split)
    )[:10]:
        pair = f"rows {tuned[barrier.first].row} and {tuned[barrier.second].row}"
        height = 100 * barrier.height
        console.print(
            f"- {pair}: the midpoint is {abs(height):.1f} points {'below' if height > 0 else 'above'} their mean"
        )


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
