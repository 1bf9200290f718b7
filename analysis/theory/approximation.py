"""Figure K.1: does approximation (1) predict where a soup of two models beats their ensemble, and by how much?"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from scipy.stats import rankdata
from torch import Tensor

from analysis.figures.style import legend, panels, styled
from analysis.measure.mixtures import Pair, do_missing, evaluate_models
from analysis.theory.equation import compare, curvature, line_at, on_grid, soup_at
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of, read_json, write_json
from store.rows import row_config
from store.runs import Ingredient

LEARNING_RATE, AUGMENTATION, SEED, START = "learning rate", "augmentation", "seed", "initialisation"
BETAS = {"calibrated": "β calibrated", "plain": "β = 1"}
LINEAR, SYMLOG_TICKS = 0.1, (-10, -1, -0.1, 0, 0.1, 1, 10)  # of the panels of all pairs, in nats
LEVELS = {("minimal", False), ("rand", True)}  # augmentation, and whether there is mixup
RESAMPLES = 2000  # draws of pairs, for the intervals of correlations
PALETTE = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's


def related_pairs(config: Experiment, pool: Sequence[Ingredient]) -> list[tuple[Pair, str, float]]:
    """The pairs of Appendix K.4, in what they differ, and the higher learning rate; pool[0] is row 0.

    Models of one augmentation and the first seed whose learning rates differ; of one learning rate and the first seed
    whose augmentations differ; of one of both whose seeds differ; and the initialisation with each of the first seed.
    """
    rates = config.analysis.theory.learning_rates
    models: dict[tuple[float, str, int], Ingredient] = {}
    for each in pool[1:]:
        settings = row_config(config, each.row)
        lr, kind, seed, mixup = settings.optim.lr, settings.augment.kind, settings.optim.seed, settings.optim.mixup
        if (kind, bool(mixup)) in LEVELS and seed is not None and lr in rates:
            models.setdefault((lr, kind, seed), each)
    if not models:
        raise UserError(
            f"{config.name}: no rows for Appendix K.4; it pairs rows of augment.kind minimal without and rand with "
            f"mixup, of learning rates {', '.join(f'{lr:g}' for lr in rates)} "
            "(analysis.theory.learning_rates), as configs/sweep/emoji_extreme.yaml has them"
        )
    first = min(seed for _, _, seed in models)
    found: dict[str, list[tuple[Pair, str, float]]] = {LEARNING_RATE: [], AUGMENTATION: [], SEED: []}
    for (a, one), (b, other) in combinations(models.items(), 2):
        differ = [name for name, x, y in zip(found, a, b, strict=True) if x != y]
        if differ == [SEED] or (len(differ) == 1 and a[2] == first):
            found[differ[0]].append((Pair(one, other), differ[0], max(a[0], b[0])))
    found[START] = [(Pair(pool[0], each), START, a[0]) for a, each in models.items() if a[2] == first]
    return [each for related in found.values() for each in related]


def _place(evaluator: Evaluator, pair: Pair, split: str) -> Path:
    theory = evaluator.config.analysis.theory
    ends = [pair.first.digest, pair.second.digest]
    name = digest_of({"segment": ends, "alphas": theory.alphas, "curvature": theory.curvature})
    return evaluator.place("approximation", split, name).with_suffix(".json")


def _measured(evaluator: Evaluator, pair: Pair, split: str) -> Iterator[dict[str, Any]]:
    theory, labels = evaluator.config.analysis.theory, evaluator.split(split).labels
    alphas = [i * (1 / (theory.alphas - 1)) for i in range(1, theory.alphas - 1)]  # at 0 and 1 both sides of (1) are 0
    weights = pair.first.load(), pair.second.load()

    def project(logits: Tensor) -> Tensor:
        return evaluator.projected(logits, split)

    first, second = (project(evaluator.logits(each.digest, each.load, split)) for each in (pair.first, pair.second))
    if theory.curvature == "differences":
        between = [project(evaluator.fresh_logits(soup_at(weights, alpha), split)) for alpha in alphas]
        yield from on_grid([first, *between, second], labels)
        return
    order = evaluator.order(split)
    ends, labels = (first[order], second[order]), labels[order]
    for alpha in alphas:
        line = line_at(evaluator.model, weights, alpha, evaluator.batches(split, order), project)
        yield compare(alpha, ends, line[0], labels, partial(_exact, line, labels))


def _exact(line: tuple[Tensor, Tensor, Tensor], labels: Tensor, beta: float) -> tuple[float, None]:
    return curvature(line, labels, beta), None  # without an error


def points(evaluator: Evaluator, pair: Pair, split: str) -> list[dict[str, Any]]:
    """`compare` at every alpha of a pair on a split, from disk or measured; logits of soups are not kept."""
    path = _place(evaluator, pair, split)
    if not path.exists():
        write_json(path, {"points": list(_measured(evaluator, pair, split))})
    return list(read_json(path)["points"])


def _measure(config: Experiment, pairs: Sequence[Pair]) -> str:
    evaluator = Evaluator(config)
    for pair, split in product(pairs, config.task.reported):
        points(evaluator, pair, split)
    return f"{len(pairs)} segments between two models: measured"


def measure_approximation(config: Experiment) -> pd.DataFrame:
    """The numbers of Figure K.1: one row per pair, split, alpha and beta (calibrated, plain).

    It costs, for each pair and split that is not on disk, a forward pass at every alpha, or about ten of them
    (analysis.theory.curvature=exact).

    Columns: first, second (rows of the sweep), differ, highest_lr, split, n, alpha, what (calibrated or plain), those
    of `compare`, approximation, loss_difference (nats) and error_difference (fraction); differences are soup minus
    ensemble, positive where the ensemble is better.
    """
    related, splits = related_pairs(config, usable_pool(config)), config.task.reported
    pairs = [pair for pair, _, _ in related]
    evaluate_models(config, pairs)
    evaluator = Evaluator(config)

    def is_done(pair: Pair) -> bool:
        return all(_place(evaluator, pair, split).exists() for split in splits)

    do_missing(config, "measuring {} segments between two models", pairs, partial(_measure, config), is_done)
    rows = []
    for (pair, differ, highest_lr), split in product(related, splits):
        head: dict[str, Any] = {"first": pair.first.row, "second": pair.second.row}
        head |= {"differ": differ, "highest_lr": highest_lr, "split": split}
        for found, what in product(points(evaluator, pair, split), BETAS):
            terms = found[what]
            ends = {
                "approximation": terms["convexity_term"] + terms["variance_term"],
                "loss_difference": terms["soup_loss"] - terms["ensemble_loss"],
                "error_difference": found["soup_error"] - found["ensemble_error"],
            }
            rows.append(head | {"n": found["n"], "alpha": found["alpha"], "what": what} | terms | ends)
    return pd.DataFrame(rows)


def _panels(tidy: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """The six: which beta, which pairs, which truth, and the points."""
    below = tidy["highest_lr"] < tidy["highest_lr"].max()
    for what in BETAS:
        of_beta = tidy["what"] == what
        yield what, "all", "loss_difference", tidy[of_beta]
        for truth in ("loss_difference", "error_difference"):
            yield what, "without highest lr", truth, tidy[of_beta & below]


def _statistics(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Of approximation and truth, over the last axis; NaN where one does not vary, or no truth has a sign."""
    is_decided = y != 0

    def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = (each - each.mean(axis=-1, keepdims=True) for each in (x, y))
        return (x * y).sum(axis=-1) / np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))

    def agreement(sign: np.ndarray | int) -> np.ndarray:
        return ((sign == np.sign(y)) & is_decided).sum(axis=-1) / is_decided.sum(axis=-1)

    with np.errstate(invalid="ignore"):
        return {
            "correlation": correlation(x, y),
            "rank correlation": correlation(rankdata(x, axis=-1), rankdata(y, axis=-1)),
            "sign agreement": agreement(np.sign(x)),
            "always the ensemble": agreement(1),  # how often answers without the approximation are right
            "always the soup": agreement(-1),
        }


def summary_table(config: Experiment, tidy: pd.DataFrame) -> pd.DataFrame:
    """One row per panel and statistic, with a 95 % bootstrap interval.

    Pairs of models are resampled, with all their alphas and splits, which are not independent.
    """
    rows = []
    for what, pairs, truth, drawn in _panels(tidy):
        numbers = drawn[["approximation", truth]].to_numpy()  # as many points of each pair, (G, P, 2)
        groups = np.stack([numbers[places] for places in drawn.groupby(["first", "second"]).indices.values()])
        generator = np.random.Generator(np.random.PCG64(config.analysis.seed))
        resampled = groups[generator.integers(len(groups), size=(RESAMPLES, len(groups)))].reshape(RESAMPLES, -1, 2)
        draws = pd.DataFrame(_statistics(resampled[..., 0], resampled[..., 1])).quantile([0.025, 0.975])
        head = {"beta": what, "pairs": pairs, "truth": truth, "n_pairs": len(groups), "n_points": len(drawn)}
        for name, value in _statistics(*groups.reshape(-1, 2).T).items():
            low, high = draws[name]
            rows.append(head | {"statistic": name, "value": float(value), "low": low, "high": high})
    return pd.DataFrame(rows)


def _panel(axes: Axes, drawn: pd.DataFrame, truth: str, colours: dict[float, str], test: str, *, whole: bool) -> None:
    scale = 100 if truth == "error_difference" else 1
    for (lr, colour), (is_test, marker) in product(colours.items(), ((False, "o"), (True, "^"))):
        part = drawn[(drawn["highest_lr"] == lr) & ((drawn["split"] == test) == is_test)]
        label = f"learning rate {lr:g}, {'test' if is_test else 'shifts'}"
        look: dict[str, Any] = {"marker": marker, "lw": 0, "alpha": 0.55, "zorder": 2 + is_test, "label": label}
        axes.scatter(part["approximation"], scale * part[truth], s=9 if is_test else 5, c=colour, **look)
    if whole:  # two orders of magnitude around 0
        for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            set_scale("symlog", linthresh=LINEAR, linscale=0.7)
            axis.set_major_locator(FixedLocator(SYMLOG_TICKS))
            axis.set_major_formatter("{x:g}")
    if truth == "loss_difference":
        ends, others = axes.get_xlim(), axes.get_ylim()
        line = np.linspace(min(ends[0], others[0]), max(ends[1], others[1]), 500)
        axes.plot(line, line, color="black", lw=0.7, ls="--", zorder=1)
        axes.set(xlim=ends, ylim=others)
    for draw_line in (axes.axhline, axes.axvline):
        draw_line(0, color="#999999", lw=0.6, zorder=1)


@styled
def draw_approximation(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure K.1: beta from the soup above and 1 below; loss of all pairs, of those without the highest learning rate,
    and their error.
    """
    summary = summary_table(config, numbers).pivot(
        index=["beta", "pairs", "truth"], columns="statistic", values="value"
    )
    rates = sorted(numbers["highest_lr"].unique())
    colours = {lr: PALETTE[i % len(PALETTE)] for i, lr in enumerate(rates)}
    figure, grid = panels(2, 3, 5.2)
    for axes, (what, pairs, truth, drawn) in zip(grid.flat, _panels(numbers), strict=True):
        _panel(axes, drawn, truth, colours, config.task.test, whole=pairs == "all")
        panel = summary.loc[what, pairs, truth]
        axes.set_title(
            f"{'all pairs' if pairs == 'all' else f'without lr {rates[-1]:g}'}; {BETAS[what]}\n"
            f"r = {panel['correlation']:.2f}, rank {panel['rank correlation']:.2f}\n"
            f"sign {100 * panel['sign agreement']:.0f} % (always ensemble {100 * panel['always the ensemble']:.0f} %)",
            fontsize=7,
        )
        axes.set_xlabel("Approximation (1) (nats)")
        axes.set_ylabel("Loss difference (nats)" if truth == "loss_difference" else "Error difference (points)")
    note = (
        "Differences: soup − ensemble. Calibrated β minimises the soup's loss. Dashed: where (1) is exact.\n"
        f"Left: linear between −{LINEAR:g} and {LINEAR:g}, logarithmic beyond"
    )
    legend(figure, grid[0, 0], 3, note, markerscale=2)
    return figure
