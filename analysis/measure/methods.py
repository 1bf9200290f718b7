"""From cached logits to a tidy table: one row for each model, soup or ensemble and each split."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Annotated, Evaluator
from eval.selection import oracle
from eval.significance import Answers, Difference, bootstrap_scores, paired_bootstrap
from soups.experiment.pool import individuals_of, usable_pool
from soups.experiment.soups import logits_of, outputs_of
from soups.files.atomic import read_json
from soups.scorers.metrics import score
from store.rows import identity, score_of
from store.runs import Ingredient, RunFolder, finished

SHIFT_MEAN = "shift_mean"
TIDY = ["method", "models", "held_out", "column", "n", "accuracy", "spread", "difference", "low", "high"]


@dataclass(frozen=True)
class Method:
    """Something with logits on every split."""

    name: str
    models: int  # forward passes at inference
    hits: dict[str, Tensor]  # split -> (N,) bool; of several random orders the (N,) share of them that is right
    held_out: float
    orders: tuple["Method", ...] = ()  # one for each order of a greedy soup in random order
    predicted: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # split -> (N,) class ids, of each order
    scores: dict[str, float] = field(default_factory=dict)  # split that top-1 does not score -> score
    for_mean: "Method | None" = None  # an oracle's model that is best in the mean of the shifts
    annotated: dict[str, Annotated] = field(default_factory=dict)  # annotation of the test split -> results

    def accuracy(self, split: str) -> float:
        """In [0, 1]: top-1 on a split, or what the task scores it by."""
        return self.scores[split] if split in self.scores else self.hits[split].double().mean().item()


def method_of(
    name: str, models: int, logits_on: Callable[[str], Tensor], held_out: float, evaluator: Evaluator
) -> Method:
    """A method from its logits on each test and shift split."""
    test = evaluator.config.task.test
    logits = {split: logits_on(split) for split in evaluator.config.task.reported}
    found = method_of_answers(
        name, models, lambda split: evaluator.predicted(logits[split], split), held_out, evaluator
    )
    hits = {split: evaluator.hits(seen, split) for split, seen in logits.items()}  # NaN is no answer, and refused
    return replace(found, hits=hits, annotated=evaluator.annotated(logits[test]))


def method_of_answers(
    name: str, models: int, ids_on: Callable[[str], Tensor], held_out: float, evaluator: Evaluator
) -> Method:
    """A method from the (N,) class ids that it predicts on each test and shift split."""
    task = evaluator.config.task
    found = {split: ids_on(split) for split in task.reported}
    images = {split: evaluator.split(split) for split in task.reported}
    hits = {split: found[split] == images[split].labels for split in task.reported}
    other = [split for split in task.reported if task.metrics.get(split, "top1") != "top1"]
    scores = {s: score(task.metrics[s], found[s], images[s].labels, images[s].groups) for s in other}
    return Method(name, models, hits, held_out, predicted={s: (ids,) for s, ids in found.items()}, scores=scores)


def method_of_model(name: str, ingredient: Ingredient, evaluator: Evaluator) -> Method:
    """A method from a model of the pool, whose logits are kept."""
    logits = partial(evaluator.logits, ingredient.digest, ingredient.load)
    return method_of(name, 1, logits, ingredient.held_out_score, evaluator)


def titled(name: str) -> str:
    """With a capital at its beginning, and the others as they are.

    >>> titled("emoji"), titled("CoLA")
    ('Emoji', 'CoLA')
    """
    return name[:1].upper() + name[1:]


def shift_name(config: Experiment) -> str:
    """What the axes call the shifts: by its title where there is one and it has a title.

    >>> from configs.schema import load
    >>> shift_name(load("figureg2_cifar10")), shift_name(load("demo"))
    ('CIFAR-10.1', 'mean of 5 shifts')
    """
    shifts = config.task.shifts
    return config.task.split_title(shifts[0]) if len(shifts) == 1 else f"mean of {len(shifts)} shifts"


def over_orders(name: str, orders: list[Method]) -> Method:
    """The mean of several soups of one recipe; the soups are kept for their spread."""
    first, k = orders[0], len(orders)
    hits = {split: torch.stack([each.hits[split].double() for each in orders]).mean(dim=0) for split in first.hits}
    held_out = sum(each.held_out for each in orders) / k
    predicted = {
        split: tuple(answers for each in orders for answers in each.predicted[split]) for split in first.predicted
    }
    scores = {split: sum(each.scores[split] for each in orders) / k for split in first.scores}
    seen = {
        name: Annotated(torch.stack([each.annotated[name].right.double() for each in orders]).mean(dim=0), own.classes)
        for name, own in first.annotated.items()
    }
    return Method(name, first.models, hits, held_out, tuple(orders), predicted, scores, annotated=seen)


def oracle_of(config: Experiment, pool: list[Method]) -> Method:
    """The best individual model on each test and shift split, and in the mean of the shifts: each column has its own.

    It is chosen on what it reports, and named so; Table 4 has it beside the model that is chosen on held-out.
    """
    best = {split: pool[oracle([m.accuracy(split) for m in pool], split)] for split in config.task.reported}
    hits = {split: method.hits[split] for split, method in best.items()}
    predicted = {split: method.predicted[split] for split, method in best.items() if split in method.predicted}
    scores = {split: method.scores[split] for split, method in best.items() if split in method.scores}
    seen = {a: max((m.annotated[a] for m in pool), key=lambda found: found.accuracy) for a in pool[0].annotated}
    mean = None
    if config.task.shifts:
        mean = pool[oracle([shift_mean(config, method) for method in pool], SHIFT_MEAN)]
    return Method("oracle", 1, hits, float("nan"), predicted=predicted, scores=scores, for_mean=mean, annotated=seen)


def soup_record(config: Experiment, name: str) -> dict[str, Any]:
    """The soup.json of a recipe, or of one of its random orders.

    Raises:
        UserError: it is missing, or it chose on a test or shift split.
    """
    path = RunFolder.of(config).soup(name) / "soup.json"
    if not path.exists():
        raise UserError(f"{path} is missing: run python -m soups recipe={name.partition('/')[0]} first")
    record: dict[str, Any] = read_json(path)
    refuse_leak(config, record)
    return record


def refuse_leak(config: Experiment, record: dict[str, Any]) -> None:
    """A recipe that chose on a test or shift split would be an oracle under another name.

    Raises:
        UserError: it did.
    """
    used = record["selected_on"]["split"]
    if used != config.task.held_out or used in config.task.reported:
        raise UserError(
            f"recipe {record['recipe']} selected on {used!r}, not on the held-out split {config.task.held_out!r}: "
            "its numbers would be an oracle's; delete its folder and run python -m soups again"
        )


def _individual(each: Ingredient, evaluator: Evaluator) -> Method:
    kind = f" ({each.kind})" if evaluator.config.cooking.individuals and each.row else ""
    return method_of_model(f"row {each.row}{kind}" if each.row else "initialisation", each, evaluator)


def measure(
    config: Experiment, evaluator: Evaluator, *, with_oracle: bool = False
) -> tuple[list[Method], list[Method]]:
    """Hits of the individual models (row 0 first) and of the methods of Table 3.

    Args:
        config: of the experiment.
        evaluator: of the same.
        with_oracle: add the oracle's row, as `analysis.oracle` does.

    Raises:
        UserError: a soup is missing, or was selected on a test or shift split.
    """
    run = RunFolder.of(config)
    members = usable_pool(config)
    known = {(each.row, each.digest): _individual(each, evaluator) for each in members}
    pool = list(known.values())
    methods = [pool[0]]
    if config.model.templates is not None and config.model.head != "zero_shot":
        done, file = finished(run.zero_shot, identity(config, 0)), run.zero_shot / "weights.safetensors"
        if done is None:
            raise UserError(f"{run.zero_shot} holds no model: run python -m finetune first")
        logits = partial(evaluator.logits_of_file, done["digest"], file)
        methods.insert(0, method_of("zero-shot", 1, logits, score_of(done["held_out"]), evaluator))
    for recipe in config.recipes:
        soups = [_soup(config, name, evaluator) for name in outputs_of(config, recipe)]
        methods.append(soups[0] if len(soups) == 1 else over_orders(recipe, soups))
    if config.analysis.oracle or with_oracle:
        chosen_from = [
            known.get((each.row, each.digest)) or _individual(each, evaluator) for each in individuals_of(config)
        ]
        methods.append(oracle_of(config, chosen_from))
    return pool, methods


def _soup(config: Experiment, name: str, evaluator: Evaluator) -> Method:
    record = soup_record(config, name)
    models = 1 if record["digest"] else len(record["ingredients"])
    logits = partial(logits_of, record, evaluator=evaluator)
    return method_of(name, models, logits, score_of(record["held_out"]), evaluator)


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


def columns_of(config: Experiment) -> dict[str, tuple[str, ...]]:
    """The columns of a table and the splits that each is over: every split, and the mean of the shifts where there are
    some.
    """
    shifts = config.task.shifts
    return {split: (split,) for split in config.task.reported} | ({SHIFT_MEAN: shifts} if shifts else {})


def difference_in(
    config: Experiment,
    evaluator: Evaluator,
    ours: Method,
    baseline: Method,
    splits: tuple[str, ...],
    *,
    redraw: bool = False,
) -> Difference:
    """One method minus another, averaged over splits, with a paired bootstrap interval.

    Args:
        config: of the experiment.
        evaluator: of the same.
        ours: the method.
        baseline: what it is compared with; of several models or random orders the mean counts.
        splits: which.
        redraw: where a split is scored by anything but top-1, compute that anew for every draw, which takes seconds;
            else the interval is NaN there.
    """
    resampling = {"resamples": config.analysis.resamples, "seed": config.analysis.seed}
    units = bootstrap_groups(config, evaluator, splits)
    if not any(split in ours.scores for split in splits):
        hits, others = ([each.hits[split] for split in splits] for each in (ours, baseline))
        return paired_bootstrap(hits, others, units, **resampling)
    if not redraw:
        mean = sum(ours.accuracy(split) - baseline.accuracy(split) for split in splits) / len(splits)
        return Difference(mean, float("nan"), float("nan"))
    is_turned = len(baseline.predicted[splits[0]]) > 1  # several against one are the same, the other way round
    many, one = (baseline, ours) if is_turned else (ours, baseline)
    answers = []
    for split, unit in zip(splits, units, strict=True):
        images, metric = evaluator.split(split), config.task.metrics.get(split, "top1")
        predicted = many.predicted[split], one.predicted[split][0]
        answers.append(Answers(metric, *predicted, images.labels, unit, images.groups))
    found = bootstrap_scores(answers, **resampling)
    return Difference(-found.mean, -found.high, -found.low) if is_turned else found


def _in(method: Method, column: str) -> Method:
    """The method itself; of an oracle, the model that is best in this column."""
    return method.for_mean or method if column == SHIFT_MEAN else method


def numbers_of(
    config: Experiment,
    evaluator: Evaluator,
    method: Method,
    baseline: Method | None,
    columns: Mapping[str, tuple[str, ...]],
    *,
    redraw: bool = False,
) -> Iterator[dict[str, Any]]:
    """For each column a row of a table: column, n, accuracy, and difference to the baseline with low and high.

    Args:
        config: of the experiment.
        evaluator: of the same.
        method: whose numbers they are.
        baseline: without one there is no difference.
        columns: each with its splits, as from `columns_of`.
        redraw: as for `difference_in`.
    """
    for column, splits in columns.items():
        row: dict[str, Any] = {"column": column, "n": sum(len(method.hits[split]) for split in splits)}
        row["accuracy"] = accuracy_in(config, method, column)
        if baseline is not None:
            gain = difference_in(config, evaluator, _in(method, column), baseline, splits, redraw=redraw)
            row |= {"difference": gain.mean, "low": gain.low, "high": gain.high}
        yield row


def need_shifts(config: Experiment) -> None:
    """Refuse a task without shifts, which has no scatter of test against shifts.

    Raises:
        UserError: it is one.
    """
    if not config.task.shifts:
        raise UserError(f"{config.name}: this figure is test against shifts, and task.shifts is empty")


def shift_mean(config: Experiment, method: Method) -> float:
    """Unweighted mean of the accuracies on the shifts (Section 3.1)."""
    return sum(method.accuracy(split) for split in config.task.shifts) / len(config.task.shifts)


def accuracy_in(config: Experiment, method: Method, column: str) -> float:
    """Accuracy in [0, 1] on a split or on the mean of the shifts."""
    return shift_mean(config, _in(method, column)) if column == SHIFT_MEAN else method.accuracy(column)


def spread_in(config: Experiment, method: Method, column: str) -> float | None:
    """Standard deviation of the accuracies of several random orders, as Table 3 gives it in brackets."""
    if len(method.orders) < 2:
        return None
    return statistics.stdev(accuracy_in(config, each, column) for each in method.orders)


def tidy(
    config: Experiment, methods: Sequence[Method], evaluator: Evaluator, baseline: Method | None = None
) -> pd.DataFrame:
    """One row per method and column: accuracy, n, difference to the baseline and its interval.

    Columns: method, models, held_out, column, n, accuracy, spread (standard deviation over random orders, where there
    are some), difference, low, high; fractions throughout. The baseline is the best individual model where none is
    given.
    """
    first = baseline or next(method for method in methods if method.name == "best")
    rows = []
    for method in methods:
        head = {"method": method.name, "models": method.models, "held_out": method.held_out}
        for row in numbers_of(config, evaluator, method, first, columns_of(config), redraw=True):
            rows.append(head | row | {"spread": spread_in(config, method, row["column"])})
    return pd.DataFrame(rows)[TIDY]


def scatter_points(
    config: Experiment, pool: Sequence[Method], methods: Sequence[Method], shifts: Sequence[str] | None = None
) -> pd.DataFrame:
    """One row per point of Figure 1: name, kind (individual or the method's name), test, shift_mean; fractions.

    Args:
        config: of the experiment.
        pool: its models, the initialisation first, which is drawn as a method.
        methods: of Table 3.
        shifts: over which the mean is; all where None.
    """
    over = config.task.shifts if shifts is None else shifts
    points = [("individual", method) for method in pool[1:]] + [(method.name, method) for method in methods]
    return pd.DataFrame(
        {
            "name": method.name,
            "kind": kind,
            "held_out": method.held_out,
            "test": method.accuracy(config.task.test),
            "shift_mean": sum(map(method.accuracy, over)) / len(over) if over else float("nan"),
        }
        for kind, method in points
    )
