"""From cached logits to a tidy table: one row a model and split, with what was selected on what."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.metrics import correct
from eval.significance import Difference, paired_bootstrap
from soups.cook import logits_of, usable_pool
from store.atomic import read_json
from store.runs import RunFolder

SHIFT_MEAN = "shift_mean"


@dataclass(frozen=True)
class Method:
    """Something with logits on every split."""

    name: str
    models: int  # forward passes at inference
    hits: dict[str, Tensor]  # split -> (N,) bool
    held_out: float

    def accuracy(self, split: str) -> float:
        """Top-1 in [0, 1] on a split."""
        return self.hits[split].double().mean().item()


def refuse_leak(config: Experiment, cooked: dict[str, Any]) -> None:
    """A recipe that chose on a split which reports would be an oracle under another name.

    Raises:
        UserError: it did.
    """
    used = cooked["selected_on"]["split"]
    if used != config.task.held_out or used in config.task.reported:
        raise UserError(
            f"recipe {cooked['recipe']} selected on {used!r}, not on the held-out split {config.task.held_out!r}: "
            "its numbers would be an oracle's; delete its folder and run python -m soups again"
        )


def measure(config: Experiment, evaluator: Evaluator) -> tuple[list[Method], list[Method]]:
    """Hits of the individual models (row 0 first) and of the methods of Table 3.

    Raises:
        UserError: a soup is missing, or was selected on a split that reports.
    """
    run, task = RunFolder.of(config), config.task

    def hits(logits_on: Any) -> dict[str, Tensor]:
        return {split: correct(logits_on(split), evaluator.split(split).labels) for split in task.reported}

    pool = [
        Method(
            f"row {i.row}" if i.row else "initialisation",
            1,
            hits(lambda split, i=i: evaluator.logits(i.digest, i.load, split)),
            i.held_out_top1,
        )
        for i in usable_pool(config)
    ]
    zero_shot = read_json(run.zero_shot / "done.json")
    file = run.zero_shot / "weights.safetensors"
    score = zero_shot["held_out"]
    methods = [
        Method(
            "zero-shot",
            1,
            hits(lambda split: evaluator.logits_of_file(zero_shot["digest"], file, split)),
            score["correct"] / score["n"],
        ),
        pool[0],
    ]
    for recipe in config.recipes:
        path = run.soup(recipe) / "soup.json"
        if not path.exists():
            raise UserError(f"{path} is missing: run python -m soups experiment=... recipe={recipe} first")
        cooked = read_json(path)
        refuse_leak(config, cooked)
        score, members = cooked["held_out"], len(cooked["ingredients"])
        methods.append(
            Method(
                recipe,
                1 if cooked["digest"] else members,
                hits(lambda split, cooked=cooked: logits_of(config, cooked, split, evaluator)),
                score["correct"] / score["n"],
            )
        )
    return pool, methods


def bootstrap_groups(config: Experiment, evaluator: Evaluator, splits: tuple[str, ...]) -> list[Tensor]:
    """(N_s,) the resampled unit of each image: its class, or the image itself."""
    if config.task.bootstrap_unit == "class":
        return [evaluator.split(split).labels for split in splits]
    groups, offset = [], 0
    for split in splits:
        n = len(evaluator.split(split).labels)
        groups.append(torch.arange(offset, offset + n))
        offset += n
    return groups


def compare(config: Experiment, method: Method, baseline: Method, evaluator: Evaluator) -> dict[str, Difference]:
    """Paired bootstrap of `method` minus `baseline` on every reported split and on the mean of the shifts."""
    columns = {split: (split,) for split in config.task.reported} | {SHIFT_MEAN: config.task.shifts}
    return {
        column: paired_bootstrap(
            [method.hits[split] for split in splits],
            [baseline.hits[split] for split in splits],
            bootstrap_groups(config, evaluator, splits),
            resamples=config.analysis.resamples,
            seed=config.analysis.seed,
        )
        for column, splits in columns.items()
    }


def shift_mean(config: Experiment, method: Method) -> float:
    """Unweighted mean of the accuracies on the shifts (Section 3.1)."""
    return sum(method.accuracy(split) for split in config.task.shifts) / len(config.task.shifts)


def tidy(config: Experiment, methods: list[Method], evaluator: Evaluator) -> pd.DataFrame:
    """One row per method and column: accuracy, n, difference to the best individual model and its interval.

    Columns: method, models, held_out, column, n, accuracy, difference, low, high; fractions throughout.
    """
    baseline = next(method for method in methods if method.name == "best")
    rows = []
    for method in methods:
        differences = compare(config, method, baseline, evaluator)
        for column, difference in differences.items():
            single = column != SHIFT_MEAN
            n = len(method.hits[column]) if single else sum(len(method.hits[s]) for s in config.task.shifts)
            rows.append(
                {
                    "method": method.name,
                    "models": method.models,
                    "held_out": method.held_out,
                    "column": column,
                    "n": n,
                    "accuracy": method.accuracy(column) if single else shift_mean(config, method),
                    "difference": difference.mean,
                    "low": difference.low,
                    "high": difference.high,
                }
            )
    return pd.DataFrame(rows)


def scatter_points(config: Experiment, pool: list[Method], methods: list[Method]) -> pd.DataFrame:
    """One row per point of Figure 1: name, kind (individual or the method's name), test, shift_mean; fractions."""
    points = [("individual", method) for method in pool[1:]] + [(method.name, method) for method in methods]
    return pd.DataFrame(
        {
            "name": method.name,
            "kind": kind,
            "held_out": method.held_out,
            "test": method.accuracy(config.task.test),
            "shift_mean": shift_mean(config, method),
        }
        for kind, method in points
    )
