"""From cached logits to a tidy table: one row for each model, soup or ensemble and each split."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Annotated, Evaluator
from eval.significance import Answers, Difference, bootstrap_scores, oracle, paired_bootstrap
from soups.experiment.pool import individuals_of, usable_pool
from soups.experiment.soups import logits_of, outputs_of
from soups.files.atomic import read_json
from soups.scorers.metrics import score
from store.rows import identity, score_of
from store.runs import Ingredient, RunFolder, finished

SHIFT_MEAN = "shift_mean"
NAN = float("nan")
TIDY = ["method", "models", "held_out", "column", "n", "accuracy", "spread", "difference", "low", "high"]


@dataclass(frozen=True)
class Method:
    """Something with logits on every split."""

    name: str
    models: int  # forward passes at inference
    hits: dict[str, Tensor]  # split -> (N,) bool; of several random orders the (N,) share of them that is right
    held_out: float = NAN
    orders: tuple["Method", ...] = ()  # one for each order of a greedy soup in random order
    predicted: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # split -> (N,) class ids, of each order
    scores: dict[str, float] = field(default_factory=dict)  # split that top-1 does not score -> score
    annotated: dict[str, Annotated] = field(default_factory=dict)  # annotation of the test split -> results
    best_in: dict[str, "Method"] = field(default_factory=dict)  # of an oracle: column -> the model that is best there

    def of(self, column: str) -> "Method":
        """The method itself; of an oracle, the model that is best in a column."""
        return self.best_in.get(column, self)

    def accuracy(self, *splits: str) -> float:
        """In [0, 1]: top-1, or what the task scores a split by; of several splits the unweighted mean (Section 3.1)."""
        found = ((split, self.of(split)) for split in splits)
        each = (m.scores[split] if split in m.scores else m.hits[split].double().mean().item() for split, m in found)
        return sum(each) / len(splits)


def method_of(
    name: str, models: int, logits_on: Callable[[str], Tensor], evaluator: Evaluator, held_out: float = NAN
) -> Method:
    """A method from its logits on each test and shift split."""
    task = evaluator.config.task
    logits = {split: logits_on(split) for split in task.reported}
    ids = {split: evaluator.predicted(seen, split) for split, seen in logits.items()}
    found = method_of_answers(name, models, ids.__getitem__, evaluator, held_out)
    hits = {split: evaluator.hits(seen, split) for split, seen in logits.items()}  # NaN is no answer, and refused
    return replace(found, hits=hits, annotated=evaluator.annotated(logits[task.test]))


def method_of_answers(
    name: str, models: int, ids_on: Callable[[str], Tensor], evaluator: Evaluator, held_out: float = NAN
) -> Method:
    """A method from the (N,) class ids that it predicts on each test and shift split."""
    task = evaluator.config.task
    found = {split: ids_on(split) for split in task.reported}
    images = {split: evaluator.split(split) for split in task.reported}
    hits = {split: found[split] == images[split].labels for split in task.reported}
    other = [split for split in task.reported if task.metrics.get(split, "top1") != "top1"]
    scores = {s: score(task.metrics[s], found[s], images[s].labels, images[s].groups) for s in other}
    return Method(name, models, hits, held_out, predicted={s: (ids,) for s, ids in found.items()}, scores=scores)


def logits_of_model(ingredient: Ingredient, evaluator: Evaluator) -> Callable[[str], Tensor]:
    """Split -> (N, C) logits of a model of the pool, which are kept."""
    return partial(evaluator.logits, ingredient.digest, ingredient.load)


def method_of_model(name: str, ingredient: Ingredient, evaluator: Evaluator) -> Method:
    """A method from a model of the pool."""
    return method_of(name, 1, logits_of_model(ingredient, evaluator), evaluator, ingredient.held_out_score)


def titled(name: str) -> str:
    """With a capital at its beginning, and the others as they are.

    >>> titled("emoji"), titled("CoLA")
    ('Emoji', 'CoLA')
    """
    return name[:1].upper() + name[1:]


def over_orders(name: str, orders: Sequence[Method]) -> Method:
    """The mean of several soups of one recipe; the soups are kept for their spread."""
    first, k = orders[0], len(orders)

    def mean(rights: Iterable[Tensor]) -> Tensor:
        return torch.stack([right.double() for right in rights]).mean(dim=0)

    hits = {split: mean(each.hits[split] for each in orders) for split in first.hits}
    predicted = {split: tuple(ids for each in orders for ids in each.predicted[split]) for split in first.predicted}
    scores = {split: sum(each.scores[split] for each in orders) / k for split in first.scores}
    seen = {n: Annotated(mean(e.annotated[n].right for e in orders), own.classes) for n, own in first.annotated.items()}
    held_out = sum(each.held_out for each in orders) / k
    return Method(name, first.models, hits, held_out, tuple(orders), predicted, scores, seen)


def oracle_of(config: Experiment, pool: Sequence[Method]) -> Method:
    """The best individual model on each test and shift split, and in the mean of the shifts: each column has its own.

    It is chosen on what it reports, and named so; Table 4 has it beside the model that is chosen on held-out.
    """
    scores = {column: [each.accuracy(*splits) for each in pool] for column, splits in columns_of(config).items()}
    scores |= {name: [each.annotated[name].accuracy for each in pool] for name in pool[0].annotated}
    return Method("oracle", 1, {}, best_in={column: pool[oracle(each, column)] for column, each in scores.items()})


def soup_record(config: Experiment, name: str) -> dict[str, Any]:
    """The soup.json of a recipe, or of one of its random orders.

    Raises:
        UserError: it is missing, or chose on a test or shift split: an oracle under another name.
    """
    path, task = RunFolder.of(config).soup(name) / "soup.json", config.task
    if not path.exists():
        raise UserError(f"{path} is missing: run python -m soups recipe={name.partition('/')[0]} first")
    record: dict[str, Any] = read_json(path)
    used = record["selected_on"]["split"]
    if used != task.held_out or used in task.reported:
        raise UserError(
            f"recipe {record['recipe']} selected on {used!r}, not on the held-out split {task.held_out!r}: "
            "its numbers would be an oracle's; delete its folder and run python -m soups again"
        )
    return record


def measure(evaluator: Evaluator, *, with_oracle: bool = False) -> tuple[list[Method], list[Method]]:
    """Hits of the individual models (row 0 first) and of the methods of Table 3; with the oracle as `analysis.oracle`.

    Raises:
        UserError: a soup is missing, or was selected on a test or shift split.
    """
    config, run = evaluator.config, RunFolder.of(evaluator.config)

    def individual(each: Ingredient) -> Method:
        kind = f" ({each.kind})" if config.cooking.individuals else ""
        return method_of_model(f"row {each.row}{kind}" if each.row else "initialisation", each, evaluator)

    def soup(name: str) -> Method:
        record = soup_record(config, name)
        models = 1 if record["digest"] else len(record["ingredients"])
        logits = partial(logits_of, record, evaluator=evaluator)
        return method_of(name, models, logits, evaluator, score_of(record["held_out"]))

    known = {(each.row, each.digest): individual(each) for each in usable_pool(config)}
    pool = list(known.values())
    methods = [pool[0]]
    if config.model.templates is not None and config.model.head != "zero_shot":
        done, file = finished(run.zero_shot, identity(config, 0)), run.zero_shot / "weights.safetensors"
        if done is None:
            raise UserError(f"{run.zero_shot} holds no model: run python -m finetune first")
        logits = partial(evaluator.logits_of_file, done["digest"], file)
        methods.insert(0, method_of("zero-shot", 1, logits, evaluator, score_of(done["held_out"])))
    for recipe in config.recipes:
        soups = [soup(name) for name in outputs_of(config, recipe)]
        methods.append(soups[0] if len(soups) == 1 else over_orders(recipe, soups))
    if config.analysis.oracle or with_oracle:
        chosen_from = [known.get((each.row, each.digest)) or individual(each) for each in individuals_of(config)]
        methods.append(oracle_of(config, chosen_from))
    return pool, methods


def bootstrap_groups(evaluator: Evaluator, splits: Sequence[str]) -> list[Tensor]:
    """(N_s,) the resampled unit of each image: its class, or the image itself."""
    labels = [evaluator.split(split).labels for split in splits]
    if evaluator.config.task.bootstrap_unit == "class":
        return labels
    sizes = [len(each) for each in labels]
    return list(torch.arange(sum(sizes)).split(sizes))


def columns_of(config: Experiment) -> dict[str, tuple[str, ...]]:
    """The columns of a table and the splits that each is over: every split, and where there are some all shifts."""
    shifts = config.task.shifts
    return {split: (split,) for split in config.task.reported} | ({SHIFT_MEAN: shifts} if shifts else {})


def difference_in(
    evaluator: Evaluator, ours: Method, baseline: Method, splits: Sequence[str], *, redraw: bool = False
) -> Difference:
    """One method minus another, averaged over splits, with a paired bootstrap interval; of random orders the mean.

    With `redraw`, what scores a split by anything but top-1 is computed anew for every draw, which takes seconds; else
    the interval is NaN there.
    """
    config = evaluator.config
    resampling = {"resamples": config.analysis.resamples, "seed": config.analysis.seed}
    units = bootstrap_groups(evaluator, splits)
    if not any(split in ours.scores for split in splits):
        hits, others = ([each.hits[split] for split in splits] for each in (ours, baseline))
        return paired_bootstrap(hits, others, units, **resampling)
    if not redraw:
        mean = sum(ours.accuracy(split) - baseline.accuracy(split) for split in splits) / len(splits)
        return Difference(mean, NAN, NAN)
    is_turned = len(baseline.predicted[splits[0]]) > 1  # several against one are the same, the other way round
    many, one = (baseline, ours) if is_turned else (ours, baseline)
    answers = []
    for split, unit in zip(splits, units, strict=True):
        images, metric = evaluator.split(split), config.task.metrics.get(split, "top1")
        predicted = many.predicted[split], one.predicted[split][0]
        answers.append(Answers(metric, *predicted, images.labels, unit, images.groups))
    found = bootstrap_scores(answers, **resampling)
    return Difference(-found.mean, -found.high, -found.low) if is_turned else found


def numbers_of(
    evaluator: Evaluator,
    method: Method,
    baseline: Method | None,
    columns: Mapping[str, Sequence[str]],
    *,
    redraw: bool = False,
) -> Iterator[dict[str, Any]]:
    """For each column a row of a table: column, n, accuracy, and difference to the baseline, if any, with low and high.

    Columns are those of `columns_of`, or others with their splits; `redraw` is as for `difference_in`.
    """
    for column, splits in columns.items():
        ours = method.of(column)
        row: dict[str, Any] = {"column": column, "n": sum(len(ours.hits[split]) for split in splits)}
        row["accuracy"] = ours.accuracy(*splits)
        if baseline is not None:
            gain = difference_in(evaluator, ours, baseline, splits, redraw=redraw)
            row |= {"difference": gain.mean, "low": gain.low, "high": gain.high}
        yield row


def need_shifts(config: Experiment) -> None:
    """Refuse a task without shifts, which has no scatter of test against shifts, with a UserError."""
    if not config.task.shifts:
        raise UserError(f"{config.name}: this figure is test against shifts, and task.shifts is empty")


def best_of(methods: Sequence[Method]) -> Method:
    """The best individual model, chosen on held-out, of the methods of Table 3."""
    return next(method for method in methods if method.name == "best")


def tidy(methods: Sequence[Method], evaluator: Evaluator, baseline: Method | None = None) -> pd.DataFrame:
    """One row per method and column: accuracy, n, difference to the baseline and its interval.

    Columns: method, models, held_out, column, n, accuracy, spread (standard deviation over random orders, where there
    are some, as Table 3 gives it in brackets), difference, low, high; fractions throughout. The baseline is the best
    individual model where none is given.
    """
    first, columns, rows = baseline or best_of(methods), columns_of(evaluator.config), []
    for method in methods:
        head = {"method": method.name, "models": method.models, "held_out": method.held_out}
        for row in numbers_of(evaluator, method, first, columns, redraw=True):
            of_orders = [each.accuracy(*columns[row["column"]]) for each in method.orders]
            rows.append(head | row | {"spread": statistics.stdev(of_orders) if len(of_orders) > 1 else NAN})
    return pd.DataFrame(rows)[TIDY]
