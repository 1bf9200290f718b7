"""Figures B.2 and G.4: models that differ by their seed alone, their soups and ensembles, calibration and accuracy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import get_console
from torch import Tensor

from analysis.figures.style import STYLE, legend, panels, styled, two_lines
from analysis.measure.calibration import calibration_of
from analysis.measure.methods import Method, logits_of_model, method_of, numbers_of, over_orders
from analysis.measure.mixtures import axis_labels, drawn_columns, kept_logits, mean_logits
from configs.errors import UserError
from configs.schema import Experiment, dump
from eval.calibration import fit_beta
from eval.forward import Evaluator
from eval.pool import evaluate_all
from soups.average import Average
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of
from store.rows import row_config
from store.runs import Ingredient

INDIVIDUAL, SOUP, ENSEMBLE = "individual", "soup", "ensemble"
NONE, FIRST, AFTER = "none", "first", "after"  # when temperatures are fitted
HEAD = ("head.weight", "head.bias")
FIGURE_G4 = 5  # seeds
WHAT = {
    INDIVIDUAL: ("Individual, seed k", STYLE["individual"][1], "D"),
    SOUP: ("Soup of seeds 1 to k", STYLE["uniform"][1], "o"),
    ENSEMBLE: ("Ensemble of seeds 1 to k", STYLE["greedy_ensemble"][1], "s"),
}
TEMPERATURES = {NONE: "as trained", FIRST: "members calibrated first", AFTER: "calibrated afterwards"}
K, INTERVALS = "Number of models k", "Shaded: 95 % interval of the difference to the mean of individuals 1 to k"


def seed_group(config: Experiment, pool: Sequence[Ingredient]) -> list[Ingredient]:
    """The largest group of fine-tuned models whose rows differ in nothing but the seed, in the order of their rows.

    Rows that set no seed have random streams of their own. Of equally large groups the first is taken.

    Raises:
        UserError: no two models differ by their seed alone.
    """
    groups: dict[str, list[Ingredient]] = {}
    for each in pool:
        if not each.row:
            continue
        values = dump(row_config(config, each.row))
        values["optim"].pop("seed")
        same = {name: values[name] for name in ("task", "model", "optim", "augment", "regularizer")}
        groups.setdefault(digest_of(same), []).append(each)
    largest = max(groups.values(), key=len, default=[])
    if len(largest) < 2:
        raise UserError(
            f"{config.name}: no two models differ by their seed alone; vary optim.seed, as "
            "configs/experiment/demo_seeds_only.yaml does"
        )
    return largest


@dataclass(frozen=True)
class Answering:
    """A model, soup or ensemble: its logits on every split, and the inverse temperature that they are scaled by."""

    what: str
    k: int  # the seed's place, or how many models it is made of
    temperature: str
    logits: Callable[[str], Tensor]
    beta: float = 1.0


def scaled_head(weights: dict[str, Tensor], beta: float) -> dict[str, Tensor]:
    """Weights whose logits are `beta` times as large.

    Raises:
        UserError: the network has no linear head.
    """
    if any(name not in weights for name in HEAD):
        raise UserError("temperature is folded into a linear head before averaging, and this network has none")
    return weights | {name: (beta * weights[name].double()).to(weights[name].dtype) for name in HEAD}


def answering(evaluator: Evaluator, members: Sequence[Ingredient], *, calibrated: bool) -> Iterator[Answering]:
    """Individuals, and soup and ensemble of the first 1, 2, ..., K members, one after the other.

    Args:
        evaluator: of the experiment.
        members: K models that differ by their seed.
        calibrated: add each with temperatures fitted on the held-out split: `first`, of every member before averaging,
            which in weights means a scaled head; and `after`, of the result.
    """
    task = evaluator.config.task
    labels = evaluator.split(task.held_out).labels

    def beta_of(logits: Callable[[str], Tensor]) -> float:
        return fit_beta(logits(task.held_out), labels)

    singles = [logits_of_model(each, evaluator) for each in members]
    betas = [beta_of(single) for single in singles] if calibrated else []
    mean = first = Average()
    for k, (member, single) in enumerate(zip(members, singles, strict=True), 1):
        mean = mean.plus(member.load())
        soup = kept_logits(evaluator, mean.weights()) if k > 1 else single
        plain = {INDIVIDUAL: single, SOUP: soup, ENSEMBLE: mean_logits(evaluator, members[:k])}
        yield from (Answering(what, k, NONE, logits) for what, logits in plain.items())
        if not calibrated:
            continue
        first = first.plus(scaled_head(member.load(), betas[k - 1]))
        yield Answering(INDIVIDUAL, k, AFTER, single, betas[k - 1])
        yield Answering(SOUP, k, FIRST, kept_logits(evaluator, first.weights()))
        yield Answering(ENSEMBLE, k, FIRST, mean_logits(evaluator, members[:k], betas[:k]))
        yield from (Answering(what, k, AFTER, plain[what], beta_of(plain[what])) for what in (SOUP, ENSEMBLE))


def _scaled(evaluator: Evaluator, each: Answering, split: str) -> Tensor:
    return each.beta * evaluator.projected(each.logits(split), split).double()


def seeds_table(evaluator: Evaluator, members: Sequence[Ingredient], *, calibrated: bool) -> pd.DataFrame:
    """One row per model, soup and ensemble, when temperatures are fitted, and column (test, mean of shifts).

    Columns: what (individual, soup, ensemble), k, temperature (none, first, after), models (at inference), beta,
    column, n, accuracy; where no temperature is fitted difference (to the mean accuracy of the individuals 1 to k)
    with its interval low and high; and those of `calibration_of` where `calibrated`. Fractions.
    """
    rows: list[dict[str, Any]] = []
    individuals: list[Method] = []
    columns = drawn_columns(evaluator.config)
    for each in answering(evaluator, members, calibrated=calibrated):
        models = each.k if each.what == ENSEMBLE else 1
        method = method_of(each.what, models, each.logits, evaluator)
        if (each.what, each.temperature) == (INDIVIDUAL, NONE):
            individuals.append(method)
        head = {"what": each.what, "k": each.k, "temperature": each.temperature, "models": models, "beta": each.beta}
        is_compared = each.what != INDIVIDUAL and each.temperature == NONE
        baseline = over_orders(INDIVIDUAL, individuals) if is_compared else None
        for row in numbers_of(evaluator, method, baseline, columns):
            rows.append(head | row)
            if calibrated:
                rows[-1] |= calibration_of(evaluator, partial(_scaled, evaluator, each), columns[row["column"]])
    return pd.DataFrame(rows)


def _curves(axes: Axes, drawn: pd.DataFrame, value: str, scale: float) -> None:
    for what, (title, colour, marker) in WHAT.items():
        curve = drawn[drawn["what"] == what]
        line = "none" if what == INDIVIDUAL else "-"  # seed 2 does not follow from seed 1
        look: dict[str, Any] = {"marker": marker, "ms": 3.5, "lw": 1.3, "ls": line, "zorder": 3}
        if len(curve):
            axes.plot(curve["k"], scale * curve[value], color=colour, label=title, **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _accuracies(axes: Axes, drawn: pd.DataFrame, label: str) -> None:
    """The k-th seed, soup and ensemble of seeds 1 to k, with intervals of the difference to the mean individual."""
    drawn = drawn[drawn["temperature"] == NONE]  # a temperature does not move a model's accuracy
    _curves(axes, drawn, "accuracy", 100)
    for what in (SOUP, ENSEMBLE):
        curve = drawn[drawn["what"] == what].dropna(subset="low")
        ends = [100 * (curve["accuracy"] - curve["difference"] + curve[end]) for end in ("low", "high")]
        axes.fill_between(curve["k"], *ends, color=WHAT[what][1], alpha=0.12, lw=0, zorder=1)
    axes.set(xlabel=K, ylabel=label)


@styled
def draw_calibration(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure B.2: a line of panels a calibration error and column, across when temperatures are fitted; then accuracy.

    Older numbers without NLL and Brier scores have no panels of them.
    """
    labels = axis_labels(config)
    errors = {"ece": (100, "ECE (%)"), "nll": (1, "NLL (nats)"), "brier": (1, "Brier score")}
    rows = [(error, column) for error in errors if error in numbers for column in labels]
    figure, grid = panels(len(rows) + 1, len(TEMPERATURES), 0.7 + 1.35 * (len(rows) + 1))
    for axes, when in zip(grid[0], TEMPERATURES.values(), strict=True):
        axes.set_title(when)
    for line, (error, column) in zip(grid, rows, strict=False):
        (scale, title), name = errors[error], labels[column].partition(",")[0]
        for axes, temperature in zip(line, TEMPERATURES, strict=True):
            drawn = numbers[(numbers["column"] == column) & (numbers["temperature"] == temperature)]
            _curves(axes, drawn, error, scale)
        low, high = (pick(axes.get_ylim()[end] for axes in line) for end, pick in enumerate((min, max)))
        for axes in line:  # one scale, on which an ECE begins at 0
            axes.set_ylim(*(0, 1.05 * high) if error == "ece" else (low, high))
        line[0].set_ylabel(f"{name},\n{title}")
    for axes, (column, label) in zip(grid[-1], labels.items(), strict=False):
        _accuracies(axes, numbers[numbers["column"] == column], two_lines(label))
    for axes in grid[-1, len(labels) :]:
        axes.remove()
    legend(figure, grid[0, 0], 3, f"ECE: of {config.analysis.bins} equal-mass bins. {INTERVALS}")
    return figure


@styled
def draw_budget(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure G.4: accuracy of the k-th seed, and of soup and ensemble of seeds 1 to k, a panel for each column."""
    labels = axis_labels(config)
    figure, (line,) = panels(1, len(labels), 3.0)
    for axes, (column, label) in zip(line, labels.items(), strict=True):
        _accuracies(axes, numbers[numbers["column"] == column], label)
    legend(figure, line[0], 3, INTERVALS)
    return figure


def measure_seeds(config: Experiment, *, calibrated: bool) -> pd.DataFrame:
    """The numbers of Figure B.2 (`calibrated`), of all seeds, or of Figure G.4, of the first five: `seeds_table`.

    B.2 costs two evaluations for each seed, held-out included: of the soup so far, as it is and with calibrated heads.
    G.4 shares the first.

    Raises:
        UserError: the sweep is not finished, no two models differ by their seed alone, or B.2's have no linear head.
    """
    members = seed_group(config, usable_pool(config))[: None if calibrated else FIGURE_G4]
    evaluate_all(config, [each.folder for each in members], get_console())
    return seeds_table(Evaluator(config), members, calibrated=calibrated)
