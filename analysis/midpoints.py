"""Means of two models of a pool, evaluated over the cluster's worker processes."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from analysis.means import Mixture, mean_mixture, measure_mixtures, method_of_mixture
from analysis.results import Method
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.pool import evaluate_all
from store.rows import draw, row_config
from store.runs import Ingredient


@dataclass(frozen=True)
class Pair:
    """Two models of a pool."""

    first: Ingredient
    second: Ingredient

    @property
    def mean(self) -> Mixture:
        """The weights half way between them."""
        return mean_mixture((self.first, self.second))

    def method(self, evaluator: Evaluator) -> Method:
        """What the weights half way between them answer."""
        return method_of_mixture("mean", self.mean, evaluator)


def measure_midpoints(config: Experiment, pairs: Sequence[Pair], console: Console | None = None) -> None:
    """Evaluate the models of all pairs, and each pair's mean, on the splits that report; what is on disk is kept.

    Raises:
        UserError: missing or damaged weights or data, or a worker that was killed.
    """
    members = {each.row: each.folder for pair in pairs for each in (pair.first, pair.second)}
    evaluate_all(config, [members[row] for row in sorted(members)], console or Console())
    measure_mixtures(config, "means of two models", [pair.mean for pair in pairs], console)


def learning_rates(config: Experiment, rows: Sequence[int]) -> dict[int, float]:
    """Row -> its peak learning rate."""
    return {row: row_config(config, row).optim.lr for row in rows}


def own_settings(config: Experiment, row: int) -> str:
    """What is a row's own, for a caption.

    >>> from configs.schema import load
    >>> own_settings(load("demo_landscape"), 3)
    'lr 0.00015, seed 1'
    """
    return ", ".join(f"{field.partition('.')[2]} {value}" for field, value in draw(config, row).items())
