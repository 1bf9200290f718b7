"""From cached logits to a tidy table: one row a model and split, with what was selected on what."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.significance import Difference, paired_bootstrap
from soups.cook import dishes, logits_of
from soups.pool import usable_pool
from store.atomic import read_json
from store.runs import RunFolder

SHIFT_MEAN = "shift_mean"


@dataclass(frozen=True)
class Method:
    """Something with logits on every split."""

    name: str
    models: int  # forward passes at inference
    hits: dict[str, Tensor]  # split -> (N,) bool; of several random orders the (N,) share of them that is right
    held_out: float
    orders: tuple["Method", ...] = ()  # of greedy in random order

    def accuracy(self, split: str) -> float:
        """Top-1 in [0, 1] on a split."""
        return self.hits[split].double().mean().item()


def benchmark_name(config: Experiment) -> str:
    """What the task is called in tables and figures."""
    return config.task.kind if config.task.kind == "emoji" else config.task.folder.name


def over_orders(name: str, orders: list[Method]) -> Method:
    """The mean of several soups of one recipe, which keeps them to tell their spread."""
    hits = {split: torch.stack([each.hits[split].double() for each in orders]).mean(dim=0) for split in orders[0].hits}
    held_out = sum(each.held_out for each in orders) / len(orders)
    return Method(name, orders[0].models, hits, held_out, tuple(orders))


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

    def hits(logits_on: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {split: evaluator.hits(logits_on(split), split) for split in task.reported}

    pool = [
        Method(
            f"row {i.row}" if i.row else "initialisation",
            1,
            hits(partial(evaluator.logits, i.digest, i.load)),
            i.held_out_top1,
        )
        for i in usable_pool(config)
    ]
    methods = [pool[0]]
    if config.model.templates is not None and config.model.head != "zero_shot":
        done = read_json(run.zero_shot / "done.json")
        file, score = run.zero_shot / "weights.safetensors", done["held_out"]
        found = hits(lambda split: evaluator.logits_of_file(done["digest"], file, split))
        methods.insert(0, Method("zero-shot", 1, found, score["correct"] / score["n"]))
    for recipe in config.recipes:
        soups = [_soup(config, name, evaluator, hits) for name in dishes(config, recipe)]
        methods.append(soups[0] if len(soups) == 1 else over_orders(recipe, soups))
    return pool, methods


def _soup(
    config: Experiment, name: str, evaluator: Evaluator, hits: Callable[[Callable[[str], Tensor]], dict[str, Tensor]]
) -> Method:
    path = RunFolder.of(config).soup(name) / "soup.json"
    if not path.exists():
        raise UserError(f"{path} is missing: run python -m soups recipe={name.partition('/')[0]} first")
    cooked = read_json(path)
    refuse_leak(config, cooked)
    score, members = cooked["held_out"], len(cooked["ingredients"])
    return Method(
        name,
        1 if cooked["digest"] else members,
        hits(lambda split: logits_of(cooked, split, evaluator)),
        score["correct"] / score["n"],
    )


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


def accuracy_in(config: Experiment, method: Method, column: str) -> float:
    """Accuracy in [0, 1] on a split or on the mean of the shifts."""
    return shift_mean(config, method) if column == SHIFT_MEAN else method.accuracy(column)


def spread_in(config: Experiment, method: Method, column: str) -> float | None:
    """Standard deviation of the accuracies of several random orders, as Table 3 gives it in brackets."""
    if len(method.orders) < 2:
        return None
    return statistics.stdev(accuracy_in(config, each, column) for each in method.orders)


def tidy(config: Experiment, methods: list[Method], evaluator: Evaluator) -> pd.DataFrame:
    """One row per method and column: accuracy, n, difference to the best individual model and its interval.

    Columns: method, models, held_out, column, n, accuracy, spread (standard deviation over random orders, where there
    are some), difference, low, high; fractions throughout.
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
                    "accuracy": accuracy_in(config, method, column),
                    "spread": spread_in(config, method, column),
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
