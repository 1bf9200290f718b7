"""Figure K.1: does approximation (1) predict where a soup of two models beats their ensemble, and by how much?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from rich.console import Console
from scipy.stats import rankdata

from analysis.figures.style import legend, panels, styled
from analysis.measure.mixtures import Pair, do_missing
from analysis.theory.equation import Comparison, Point, Segment, compare, on_grid
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.pool import evaluate_all
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of, read_json, write_json
from store.rows import row_config
from store.runs import Ingredient

LEARNING_RATE, AUGMENTATION, SEED, START = "learning rate", "augmentation", "seed", "initialisation"
WEAK, STRONG = "none", "RandAugment and mixup"  # the two levels of augmentation
BETAS = {"calibrated": "β calibrated", "plain": "β = 1"}
LINEAR, SYMLOG_TICKS = 0.1, (-10, -1, -0.1, 0, 0.1, 1, 10)  # of the panels of all pairs, in nats
RESAMPLES = 2000  # draws of pairs, for the intervals of correlations
TRUTHS = ("loss_difference", "error_difference")
TERMS = ("beta", "soup_loss", "ensemble_loss", "curvature", "curvature_error", "convexity_term", "variance_term")


@dataclass(frozen=True)
class Related:
    """Two models, and in what they differ."""

    pair: Pair
    differ: str
    highest_lr: float  # the higher of the two; the initialisation has none


def level_of(config: Experiment) -> str | None:
    """The level of augmentation that a row is trained with, if it is one of the two."""
    if config.augment.kind == "minimal" and not config.optim.mixup:
        return WEAK
    return STRONG if config.augment.kind == "rand" and config.optim.mixup else None


def related_pairs(config: Experiment, pool: Sequence[Ingredient]) -> list[Related]:
    """The pairs of Appendix K.4, of three learning rates, two augmentations and two seeds 21.

    Models of one augmentation and the first seed whose learning rates differ; of one learning rate and the first seed
    whose augmentations differ; of one of both whose seeds differ; and the initialisation with each of the first seed.

    Args:
        config: of the experiment.
        pool: its models, row 0 the initialisation.

    Raises:
        UserError: the sweep has no such rows.
    """
    models: dict[tuple[float, str, int], Ingredient] = {}
    for each in pool:
        settings = row_config(config, each.row)
        lr, level, seed = settings.optim.lr, level_of(settings), settings.optim.seed
        if each.row and level is not None and seed is not None and lr in config.analysis.theory.learning_rates:
            models.setdefault((lr, level, seed), each)
    first = min((seed for _, _, seed in models), default=0)
    found = []
    for (a, one), (b, other) in combinations(models.items(), 2):
        same = [x == y for x, y in zip(a, b, strict=True)]
        seeds_are_first = a[2] == b[2] == first
        if same == [False, True, True] and seeds_are_first:
            found.append(Related(Pair(one, other), LEARNING_RATE, max(a[0], b[0])))
        elif same == [True, False, True] and seeds_are_first:
            found.append(Related(Pair(one, other), AUGMENTATION, a[0]))
        elif same == [True, True, False]:
            found.append(Related(Pair(one, other), SEED, a[0]))
    found += [Related(Pair(pool[0], each), START, a[0]) for a, each in models.items() if a[2] == first]
    if not found:
        raise UserError(
            f"{config.name}: no rows for Appendix K.4; it pairs rows of augment.kind minimal without and rand with "
            f"mixup, of learning rates {', '.join(f'{lr:g}' for lr in config.analysis.theory.learning_rates)} "
            "(analysis.theory.learning_rates), as configs/sweep/emoji_extreme.yaml has them"
        )
    order = (LEARNING_RATE, AUGMENTATION, SEED, START)
    return sorted(found, key=lambda each: order.index(each.differ))


def _place(evaluator: Evaluator, pair: Pair, split: str) -> Path:
    theory = evaluator.config.analysis.theory
    ends = [pair.first.digest, pair.second.digest]
    name = digest_of({"segment": ends, "alphas": theory.alphas, "curvature": theory.curvature})
    return evaluator.place("approximation", split, name).with_suffix(".json")


def _measured(evaluator: Evaluator, pair: Pair, split: str) -> list[Point]:
    """The points of a pair at every alpha but 0 and 1, where both sides of (1) are 0."""
    theory, labels = evaluator.config.analysis.theory, evaluator.split(split).labels
    step = 1 / (theory.alphas - 1)
    first, second = (
        evaluator.projected(evaluator.logits(each.digest, each.load, split), split)
        for each in (pair.first, pair.second)
    )
    segment = Segment(pair.first.load(), pair.second.load())
    if theory.curvature == "differences":
        inner = range(1, theory.alphas - 1)
        between = [evaluator.projected(evaluator.fresh_logits(segment.at(i * step), split), split) for i in inner]
        return on_grid([first, *between, second], labels)
    order = evaluator.order(split)

    def project(logits: torch.Tensor) -> torch.Tensor:
        return evaluator.projected(logits, split)

    return [
        compare(
            evaluator.model,
            (segment.start, segment.end),
            partial(evaluator.batches, split, order),
            labels[order],
            i * step,
            ends=(first[order], second[order]),
            project=project,
        )
        for i in range(1, theory.alphas - 1)
    ]


def _terms(found: Comparison) -> dict[str, Any]:
    return {name: getattr(found, name) for name in TERMS}


def points(evaluator: Evaluator, pair: Pair, split: str) -> list[dict[str, Any]]:
    """All numbers of a pair on a split, one dict an alpha, from disk or measured; logits of soups are not kept."""
    path = _place(evaluator, pair, split)
    if not path.exists():
        found = [
            {
                "alpha": each.alpha,
                "n": each.n,
                "soup_error": each.soup_error,
                "ensemble_error": each.ensemble_error,
                "calibrated": _terms(each.calibrated),
                "plain": _terms(each.plain),
            }
            for each in _measured(evaluator, pair, split)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"points": found})
    return list(read_json(path)["points"])


def _measure(config: Experiment, pairs: Sequence[Pair]) -> str:
    evaluator = Evaluator(config)
    for pair in pairs:
        for split in config.task.reported:
            points(evaluator, pair, split)
    return f"{len(pairs)} segments between two models: measured"


def approximation_table(config: Experiment, evaluator: Evaluator, pairs: Sequence[Related]) -> pd.DataFrame:
    """One row per pair, split, alpha and beta (calibrated, plain).

    Columns: first, second (rows of the sweep), differ, highest_lr, split, n, alpha, what (calibrated or plain), beta,
    soup_loss, ensemble_loss, curvature, curvature_error, convexity_term, variance_term (nats), approximation,
    loss_difference (nats) and error_difference (fraction); differences are soup minus ensemble, positive where the
    ensemble is better.
    """
    rows = []
    for each in pairs:
        head: dict[str, Any] = {"first": each.pair.first.row, "second": each.pair.second.row}
        head |= {"differ": each.differ, "highest_lr": each.highest_lr}
        for split in config.task.reported:
            for found in points(evaluator, each.pair, split):
                for what in BETAS:
                    terms = found[what]
                    point: dict[str, Any] = {"split": split, "n": found["n"], "alpha": found["alpha"], "what": what}
                    ends = {
                        "approximation": terms["convexity_term"] + terms["variance_term"],
                        "loss_difference": terms["soup_loss"] - terms["ensemble_loss"],
                        "error_difference": found["soup_error"] - found["ensemble_error"],
                    }
                    rows.append(head | point | terms | ends)
    return pd.DataFrame(rows)


def _panels(tidy: pd.DataFrame) -> list[tuple[str, str, str, pd.DataFrame]]:
    """The six: which beta, which pairs, which truth, and the points."""
    found = []
    below = tidy["highest_lr"] < tidy["highest_lr"].max()
    for what in BETAS:
        of_beta = tidy["what"] == what
        found.append((what, "all", "loss_difference", tidy[of_beta]))
        found += [
            (what, "without highest lr", truth, tidy[of_beta & below])
            for truth in ("loss_difference", "error_difference")
        ]
    return found


STATISTICS = ("correlation", "rank correlation", "sign agreement")
BASELINES = {"always the ensemble": 1.0, "always the soup": -1.0}  # sign of the difference that each answers


def _agreement(answers: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The share of points, over the last axis, of equal sign among those whose truth is not 0; NaN where all are."""
    is_decided = truth != 0
    with np.errstate(invalid="ignore"):
        return ((np.sign(answers) == np.sign(truth)) & is_decided).sum(axis=-1) / is_decided.sum(axis=-1)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Over the last axis; NaN where one does not vary."""
    x, y = (each - each.mean(axis=-1, keepdims=True) for each in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(axis=-1) / np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))


def _statistics(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Correlation, rank correlation and sign agreement of the approximation, and how often each baseline is right."""
    ranks = rankdata(x, axis=-1), rankdata(y, axis=-1)
    found = dict(zip(STATISTICS, (_correlation(x, y), _correlation(*ranks), _agreement(x, y)), strict=True))
    return found | {name: _agreement(np.full_like(y, sign), y) for name, sign in BASELINES.items()}


def summary_table(tidy: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row per panel and statistic, with a 95 % bootstrap interval.

    Statistics: correlation, rank correlation and sign agreement of the approximation; beside the last, how often
    answers without it are right: always the ensemble, always the soup.

    Pairs of models are resampled, with all their alphas and splits, which are not independent.
    """
    rows = []
    for what, pairs, truth, drawn in _panels(tidy):
        numbers = drawn[["approximation", truth]].to_numpy()  # as many points of each pair, (G, P, 2)
        groups = np.stack([numbers[places] for places in drawn.groupby(["first", "second"]).indices.values()])
        whole = _statistics(*groups.reshape(-1, 2).T)
        drawn_pairs = np.random.Generator(np.random.PCG64(seed)).integers(len(groups), size=(RESAMPLES, len(groups)))
        resampled = groups[drawn_pairs].reshape(RESAMPLES, -1, 2)
        draws = pd.DataFrame(_statistics(resampled[..., 0], resampled[..., 1])).quantile([0.025, 0.975])
        head = {"beta": what, "pairs": pairs, "truth": truth, "n_pairs": len(groups), "n_points": len(drawn)}
        for name, value in whole.items():
            low, high = draws[name]
            rows.append(head | {"statistic": name, "value": float(value), "low": low, "high": high})
    return pd.DataFrame(rows)


def _panel(axes: Axes, drawn: pd.DataFrame, truth: str, colours: dict[float, str], test: str, *, whole: bool) -> None:
    scale = 100 if truth == "error_difference" else 1
    for lr, colour in colours.items():
        for is_test, marker in ((False, "o"), (True, "^")):
            part = drawn[(drawn["highest_lr"] == lr) & ((drawn["split"] == test) == is_test)]
            label = f"learning rate {lr:g}, {'test' if is_test else 'shifts'}"
            look: dict[str, Any] = {
                "s": 9 if is_test else 5,
                "marker": marker,
                "lw": 0,
                "alpha": 0.55,
                "zorder": 2 + is_test,
            }
            axes.scatter(part["approximation"], scale * part[truth], c=colour, label=label, **look)
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
    for line_at in (axes.axhline, axes.axvline):
        line_at(0, color="#999999", lw=0.6, zorder=1)


@styled
def draw_approximation(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure K.1: beta from the soup above and 1 below; loss of all pairs, of those without the highest learning rate,
    and their error.
    """
    summary = summary_table(numbers, config.analysis.seed)
    rates = sorted(numbers["highest_lr"].unique())
    palette = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
    colours = {lr: palette[i % len(palette)] for i, lr in enumerate(rates)}
    figure, grid = panels(2, 3, 5.2)
    for axes, (what, pairs, truth, drawn) in zip(grid.flat, _panels(numbers), strict=True):
        _panel(axes, drawn, truth, colours, config.task.test, whole=pairs == "all")
        is_panel = (summary[["beta", "pairs", "truth"]] == [what, pairs, truth]).all(axis=1)
        panel = summary[is_panel].set_index("statistic")["value"]
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


def measure_approximation(config: Experiment, console: Console | None = None) -> pd.DataFrame:
    """The numbers of Figure K.1, from `approximation_table`; evaluates what is not on disk.

    It costs, for each pair and split, a forward pass at every alpha (curvature=differences), or about ten of them
    (exact).

    Raises:
        UserError: the sweep is not finished, or has no rows for the pairs.
    """
    pairs = related_pairs(config, usable_pool(config))
    members = {each.row: each.folder for related in pairs for each in (related.pair.first, related.pair.second)}
    evaluate_all(config, [members[row] for row in sorted(members)], console or Console())
    evaluator = Evaluator(config)

    def is_done(pair: Pair) -> bool:
        return all(_place(evaluator, pair, split).exists() for split in config.task.reported)

    segments, title = [each.pair for each in pairs], "measuring {} segments between two models"
    do_missing(config, title, segments, partial(_measure, config), is_done, console=console)
    return approximation_table(config, evaluator, pairs)


def summarised(config: Experiment, numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What is written beside Figure K.1: `summary_table` as figurek1_summary.csv."""
    return {"summary": summary_table(numbers, config.analysis.seed)}
