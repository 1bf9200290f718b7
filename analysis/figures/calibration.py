"""Figures B.2 and G.4, models that differ by their seed alone with their soups and ensembles; reliability diagrams."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import get_console
from torch import Tensor

from analysis.figures.style import STYLE, legend, panels, styled, two_lines
from analysis.measure.calibration import calibration_of
from analysis.measure.methods import Method, logits_of_model, method_of, numbers_of, over_orders, soup_record
from analysis.measure.mixtures import axis_labels, drawn_columns, kept_logits, mean_logits
from analysis.tables.cells import NAMES
from configs.errors import UserError
from configs.schema import Experiment, dump
from eval.calibration import Calibration, calibrate, fit_beta
from eval.forward import Evaluator
from eval.pool import evaluate_all
from soups.average import Average
from soups.experiment.pool import usable_pool
from soups.experiment.soups import logits_of
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
ERRORS = {"ece": (100, "ECE (%)"), "nll": (1, "NLL (nats)"), "brier": (1, "Brier score")}
INTERVALS = "Shaded: 95 % interval of the difference to the mean of individuals 1 to k"
# What it is, the seed's place or number of its models, when temperatures are fitted, its logits on every split, and
# the inverse temperature that they are scaled by.
Answering = tuple[str, int, str, Callable[[str], Tensor], float]
SHOWN = ("best", "uniform", "greedy", "ensemble")  # in reliability diagrams
ACCURACY, GAP = "#0072B2", "#D55E00"  # Okabe and Ito's colours, like those of analysis.figures.style


def seed_group(config: Experiment, pool: Sequence[Ingredient]) -> list[Ingredient]:
    """The largest group of fine-tuned models whose rows differ in their seed alone; of equally large ones the first."""
    groups: dict[str, list[Ingredient]] = {}
    for each in pool:
        if each.row:
            values = dump(row_config(config, each.row))
            values["optim"].pop("seed")  # rows that set none have random streams of their own
            same = {name: values[name] for name in ("task", "model", "optim", "augment", "regularizer")}
            groups.setdefault(digest_of(same), []).append(each)
    largest = max(groups.values(), key=len, default=[])
    if len(largest) < 2:
        raise UserError(
            f"{config.name}: no two models differ by their seed alone; vary optim.seed, as "
            "configs/experiment/demo_seeds_only.yaml does"
        )
    return largest


def scaled_head(weights: dict[str, Tensor], beta: float) -> dict[str, Tensor]:
    """Weights whose logits are `beta` times as large."""
    if any(name not in weights for name in HEAD):
        raise UserError("temperature is folded into a linear head before averaging, and this network has none")
    return weights | {name: (beta * weights[name].double()).to(weights[name].dtype) for name in HEAD}


def answering(evaluator: Evaluator, members: Sequence[Ingredient], *, calibrated: bool) -> Iterator[Answering]:
    """Individuals, and soup and ensemble of the first 1, 2, ..., K members, one after the other.

    With `calibrated`, each also with temperatures fitted on the held-out split: `first`, of every member before
    averaging, which in weights means a scaled head; and `after`, of the result.
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
        yield from ((what, k, NONE, logits, 1.0) for what, logits in plain.items())
        if not calibrated:
            continue
        first = first.plus(scaled_head(member.load(), betas[k - 1]))
        yield INDIVIDUAL, k, AFTER, single, betas[k - 1]
        yield SOUP, k, FIRST, kept_logits(evaluator, first.weights()), 1.0
        yield ENSEMBLE, k, FIRST, mean_logits(evaluator, members[:k], betas[:k]), 1.0
        yield from ((what, k, AFTER, plain[what], beta_of(plain[what])) for what in (SOUP, ENSEMBLE))


def _scaled(evaluator: Evaluator, logits: Callable[[str], Tensor], beta: float, split: str) -> Tensor:
    return beta * evaluator.projected(logits(split), split).double()


def seeds_table(evaluator: Evaluator, members: Sequence[Ingredient], *, calibrated: bool) -> pd.DataFrame:
    """One row per model, soup and ensemble, when temperatures are fitted, and column (test, mean of shifts).

    Columns: what (individual, soup, ensemble), k, temperature (none, first, after), models (at inference), beta,
    column, n, accuracy; where no temperature is fitted difference (to the mean accuracy of the individuals 1 to k)
    with its interval low and high; and those of `calibration_of` where `calibrated`. Fractions.
    """
    rows: list[dict[str, Any]] = []
    individuals: list[Method] = []
    columns = drawn_columns(evaluator.config)
    for what, k, temperature, logits, beta in answering(evaluator, members, calibrated=calibrated):
        models, is_plain = k if what == ENSEMBLE else 1, temperature == NONE
        method = method_of(what, models, logits, evaluator)
        if what == INDIVIDUAL and is_plain:
            individuals.append(method)
        head = {"what": what, "k": k, "temperature": temperature, "models": models, "beta": beta}
        baseline = over_orders(INDIVIDUAL, individuals) if what != INDIVIDUAL and is_plain else None
        for row in numbers_of(evaluator, method, baseline, columns):
            rows.append(head | row)
            if calibrated:
                scaled = partial(_scaled, evaluator, logits, beta)
                rows[-1] |= calibration_of(evaluator, scaled, columns[row["column"]])
    return pd.DataFrame(rows)


def measure_seeds(config: Experiment, *, calibrated: bool) -> pd.DataFrame:
    """`seeds_table` of all seeds (`calibrated`, Figure B.2), or of the first five (G.4).

    B.2 costs two evaluations for each seed, of soups as they are and of calibrated heads; G.4 shares the former.
    """
    members = seed_group(config, usable_pool(config))[: None if calibrated else FIGURE_G4]
    evaluate_all(config, [each.folder for each in members], get_console())
    return seeds_table(Evaluator(config), members, calibrated=calibrated)


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
    axes.set(xlabel="Number of models k", ylabel=label)


@styled
def draw_calibration(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure B.2: a line of panels an error and column, across when temperatures are fitted; then accuracy."""
    labels = axis_labels(config)
    rows = [(error, column) for error in ERRORS if error in numbers for column in labels]
    figure, grid = panels(len(rows) + 1, len(TEMPERATURES), 0.7 + 1.35 * (len(rows) + 1))
    for axes, when in zip(grid[0], TEMPERATURES.values(), strict=True):
        axes.set_title(when)
    for line, (error, column) in zip(grid, rows, strict=False):
        (scale, title), name = ERRORS[error], labels[column].partition(",")[0]
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


# ---- reliability diagrams: is a model right as often as it says, before and after temperature scaling


def reliability_rows(models: Mapping[str, Calibration]) -> pd.DataFrame:
    """One row per model, stage (before or after) and bin, from each model's `eval.calibration.calibrate`.

    Columns: model, stage, beta (1 before), ece (of all bins), bin, count, confidence, accuracy; fractions, and NaN in
    bins without examples.
    """
    frames = []
    for name, found in models.items():
        for stage, beta, bins in (("before", 1.0, found.before), ("after", found.beta, found.after)):
            whole = {"model": name, "stage": stage, "beta": beta, "ece": bins.ece, "bin": range(len(bins.count))}
            of_bins = {"count": bins.count, "confidence": bins.confidence, "accuracy": bins.accuracy}
            frames.append(pd.DataFrame(whole | {key: column.numpy() for key, column in of_bins.items()}))
    return pd.concat(frames, ignore_index=True)


def measure_reliability(config: Experiment) -> pd.DataFrame:
    """`reliability_rows` of the test split from cached logits, with the columns of `calibration_of`.

    Models are those of `SHOWN` that the experiment has; temperatures are fitted on the held-out split.
    """
    evaluator, held_out, test = Evaluator(config), config.task.held_out, config.task.test
    labels = {split: evaluator.split(split).labels for split in (held_out, test)}
    found, scores = {}, []
    for recipe in [each for each in SHOWN if each in config.recipes]:
        name, soup = NAMES[recipe], soup_record(config, recipe)
        logits = evaluator.projected(logits_of(soup, test, evaluator), test)
        fitted_on = logits_of(soup, held_out, evaluator), labels[held_out]
        found[name] = calibrate(fitted_on, (logits, labels[test]), bins=config.analysis.bins)
        for stage, beta in (("before", 1.0), ("after", found[name].beta)):
            errors = calibration_of(evaluator, {test: beta * logits.double()}.__getitem__, [test])
            scores.append({"model": name, "stage": stage} | errors)
    return reliability_rows(found).merge(pd.DataFrame(scores).drop(columns="ece"), on=["model", "stage"])


@styled
def draw_reliability(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """One column per model; above as it is, below with its temperature fitted on the held-out split.

    A bar stands at the mean confidence of its bin; the gap is what its accuracy lacks to the diagonal.
    """
    del config
    models = numbers["model"].unique()
    # Each stage is a diagram above its counts, and all counts have one scale.
    width, heights = 0.6 + 1.9 * len(models), [3, 0.8, 3, 0.8]
    figure, grid = panels(4, len(models), 5.4, width=width, sharex=True, height_ratios=heights)
    for column, model in zip(grid.T, models, strict=True):
        for top, stage in ((0, "before"), (2, "after")):
            bins = numbers[(numbers["model"] == model) & (numbers["stage"] == stage)]
            column[top].set_title(f"{model}\nas trained" if top == 0 else f"β = {bins['beta'].iloc[0]:.2f}")
            _diagram(column[top], column[top + 1], bins)
            column[top].sharey(grid[0, 0])
            column[top + 1].sharey(grid[1, 0])
        column[-1].set_xlabel("Confidence (%)")
    for top in (0, 2):
        grid[top, 0].set_ylabel("Accuracy (%)")
        grid[top + 1, 0].set_ylabel("Images")
    for axes in grid.flat:
        axes.label_outer()
    legend(figure, grid[0, 0], 3)
    return figure


def _widths(centres: np.ndarray) -> np.ndarray:
    """Bars of bins at these places, as wide as to the nearest neighbour and 1 to 6 points."""
    apart = np.diff(centres, prepend=-np.inf, append=np.inf)
    return np.clip(0.9 * np.minimum(apart[:-1], apart[1:]), 1.0, 6.0)


def _diagram(above: Axes, below: Axes, bins: pd.DataFrame) -> None:
    full = bins[bins["count"] > 0]
    confidence, accuracy, count = 100 * full["confidence"].to_numpy(), 100 * full["accuracy"].to_numpy(), full["count"]
    widths = _widths(confidence)
    above.bar(confidence, accuracy, widths, color=ACCURACY, alpha=0.75, linewidth=0, label="accuracy", zorder=2)
    look: dict[str, Any] = {"facecolor": (*mpl.colors.to_rgb(GAP), 0.35), "edgecolor": GAP, "hatch": "////"}
    gap = confidence - accuracy
    above.bar(confidence, gap, widths, bottom=accuracy, linewidth=0.6, label="gap to confidence", zorder=3, **look)
    above.plot([0, 100], [0, 100], color="black", lw=0.8, ls="--", label="calibrated", zorder=4)
    above.set(xlim=(0, 100), ylim=(0, 100))
    # Bars of a model that is too modest can reach this corner, hence the box.
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    text = f"ECE {100 * full['ece'].iloc[0]:.1f} %\nn = {count.sum():,}"
    above.text(4, 95, text, va="top", fontsize=7, zorder=5, bbox=box)
    below.bar(confidence, count, widths, color="#666666", linewidth=0, zorder=2)
