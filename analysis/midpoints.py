"""Means of two models of a pool: what they answer, kept on disk, over the cluster's worker processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from analysis.means import answers, key_of_mean, measure_mixtures
from analysis.results import bootstrap_groups
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.pool import evaluate_all
from eval.significance import Answers, Difference, bootstrap_scores, paired_bootstrap
from soups.average import Average
from soups.scorers.metrics import score
from store.rows import draw, row_config
from store.runs import Ingredient

Predicted = dict[str, Tensor]  # split -> (N,) class ids in its label space


@dataclass(frozen=True)
class Pair:
    """Two models of a pool."""

    first: Ingredient
    second: Ingredient

    @property
    def name(self) -> str:
        """Names their mean, without reading them."""
        return key_of_mean((self.first, self.second))

    def mean(self) -> dict[str, Tensor]:
        """The weights half way between them."""
        return Average.of(self.first.load()).plus(self.second.load()).weights()


def answers_of_mean(evaluator: Evaluator, pair: Pair, split: str) -> Tensor:
    """(N,) class ids that a pair's mean predicts on a split, from disk or by a forward pass."""
    return answers(evaluator, pair.name, pair.mean, split)


def answers_of_model(evaluator: Evaluator, ingredient: Ingredient, split: str) -> Tensor:
    """(N,) class ids that a model of the pool predicts on a split."""
    return evaluator.predicted(evaluator.logits(ingredient.digest, ingredient.load, split), split)


def _answer(config: Experiment, pairs: Sequence[Pair]) -> str:
    evaluator = Evaluator(config)
    for pair in pairs:
        for split in config.task.reported:
            answers_of_mean(evaluator, pair, split)
    return f"{len(pairs)} means of two models: answered"


def measure_midpoints(config: Experiment, pairs: Sequence[Pair], console: Console | None = None) -> None:
    """Evaluate the models of all pairs, and each pair's mean, on the splits that report; what is on disk is kept.

    Raises:
        UserError: missing or damaged weights or data, or a worker that was killed.
    """
    members = {each.row: each.folder for pair in pairs for each in (pair.first, pair.second)}
    evaluate_all(config, [members[row] for row in sorted(members)], console or Console())
    workers = config.cluster.workers
    calls = [partial(_answer, config, pairs[i::workers]) for i in range(workers) if pairs[i::workers]]
    measure_mixtures(config, "means of two models", [pair.name for pair in pairs], calls, console)


def gain(
    config: Experiment, evaluator: Evaluator, ours: Predicted, theirs: Sequence[Predicted], splits: tuple[str, ...]
) -> Difference:
    """The score of `ours` minus the mean score of `theirs`, averaged over splits, with a paired bootstrap interval.

    Args:
        config: of the experiment; says how each split is scored and what is drawn.
        evaluator: its.
        ours: what one model answers.
        theirs: what each of the models compared with answers.
        splits: which.
    """
    resampling = {"resamples": config.analysis.resamples, "seed": config.analysis.seed}
    units, metrics = bootstrap_groups(config, evaluator, splits), config.task.metrics
    labels = [evaluator.split(split).labels for split in splits]
    if all(metrics.get(split, "top1") == "top1" for split in splits):
        hits = [ours[split] == right for split, right in zip(splits, labels, strict=True)]
        others = [
            torch.stack([(each[split] == right).double() for each in theirs]).mean(dim=0)
            for split, right in zip(splits, labels, strict=True)
        ]
        return paired_bootstrap(hits, others, units, **resampling)
    answers = [
        Answers(
            metrics.get(split, "top1"),
            tuple(each[split] for each in theirs),
            ours[split],
            right,
            unit,
            evaluator.split(split).groups,
        )
        for split, right, unit in zip(splits, labels, units, strict=True)
    ]
    turned = bootstrap_scores(answers, **resampling)  # of several models against one, and so the other way round
    return Difference(-turned.mean, -turned.high, -turned.low)


def score_over(config: Experiment, evaluator: Evaluator, predicted: Predicted, splits: Sequence[str]) -> float:
    """The unweighted mean over splits of what the task scores each by."""
    total = 0.0
    for split in splits:
        images = evaluator.split(split)
        total += score(config.task.metrics.get(split, "top1"), predicted[split], images.labels, images.groups)
    return total / len(splits)


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
