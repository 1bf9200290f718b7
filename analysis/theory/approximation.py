"""Figure K.1: does approximation (1) predict where a soup of two models beats their ensemble, and by how much?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import rankdata

from analysis.figures.style import SETTINGS
from analysis.measure.methods import titled
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


def _agreement(answers: np.ndarray, truth: np.ndarray) -> float:
    """The share of points of equal sign among those whose truth is not 0; NaN where all are."""
    decided = truth != 0
    return float((np.sign(answers[decided]) == np.sign(truth[decided])).mean()) if decided.any() else float("nan")


def _statistics(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Correlation, rank correlation and sign agreement of the approximation, and how often each baseline is right."""
    is_flat = len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0
    both = [float("nan")] * 2 if is_flat else [np.corrcoef(x, y)[0, 1], np.corrcoef(rankdata(x), rankdata(y))[0, 1]]
    found = dict(zip(STATISTICS, (*both, _agreement(x, y)), strict=True))
    return found | {name: _agreement(np.full_like(y, sign), y) for name, sign in BASELINES.items()}


def summary_table(tidy: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row per panel and statistic, with a 95 % bootstrap interval.

    Statistics: correlation, rank correlation and sign agreement of the approximation; beside the last, how often
    answers without it are right: always the ensemble, always the soup.

    Pairs of models are resampled, with all their alphas and splits, which are not independent.
    """
    rows = []
    for what, pairs, truth, drawn in _panels(tidy):
        groups = [(g["approximation"].to_numpy(), g[truth].to_numpy()) for _, g in drawn.groupby(["first", "second"])]
        generator = np.random.Generator(np.random.PCG64(seed))
        whole = _statistics(drawn["approximation"].to_numpy(), drawn[truth].to_numpy())
        draws = []
        for _ in range(RESAMPLES):
            some = [groups[i] for i in generator.integers(len(groups), size=len(groups))]
            draws.append(_statistics(*(np.concatenate(parts) for parts in zip(*some, strict=True))))
        ends = pd.DataFrame(draws).quantile([0.025, 0.975])
        head = {"beta": what, "pairs": pairs, "truth": truth, "n_pairs": len(groups), "n_points": len(drawn)}
        for name, value in whole.items():
            low, high = ends[name]
            rows.append(head | {"statistic": name, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def _panel(axes: Axes, drawn: pd.DataFrame, truth: str, colours: dict[float, str], test: str) -> None:
    scale = 100 if truth == "error_difference" else 1
    for lr, colour in colours.items():
        for is_test, marker in ((False, "o"), (True, "^")):
            part = drawn[(drawn["highest_lr"] == lr) & ((drawn["split"] == test) == is_test)]
            axes.scatter(
                part["approximation"],
                scale * part[truth],
                s=9 if is_test else 5,
                c=colour,
                marker=marker,
                lw=0,
                alpha=0.55,
                zorder=3 if is_test else 2,
                label=f"lr {lr:g}, {'test' if is_test else 'shifts'}",
            )
    if truth == "loss_difference":
        ends = axes.get_xlim()
        axes.axline((0, 0), slope=1, color="black", lw=0.7, ls="--", zorder=1)
        axes.set_xlim(ends)
    for line in (axes.axhline, axes.axvline):
        line(0, color="#999999", lw=0.6, zorder=1)


def approximation_figure(tidy: pd.DataFrame, summary: pd.DataFrame, test: str, title: str) -> Figure:
    """Six panels: beta from the soup above and 1 below; loss of all pairs, of those without the highest learning rate,
    and their error.

    Args:
        tidy: from `approximation_table`.
        summary: from `summary_table`.
        test: name of the test split.
        title: of the benchmark.
    """
    rates = sorted(tidy["highest_lr"].unique())
    palette = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
    colours = {lr: palette[i % len(palette)] for i, lr in enumerate(rates)}
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(7.2, 4.9), layout="constrained")
        grid = figure.subplots(2, 3)
        for axes, (what, pairs, truth, drawn) in zip(grid.flat, _panels(tidy), strict=True):
            _panel(axes, drawn, truth, colours, test)
            rows = summary.query("beta == @what and pairs == @pairs and truth == @truth")
            panel = rows.set_index("statistic")["value"]
            ensemble = panel.get("always the ensemble")  # absent in older tables
            beside = "" if ensemble is None else f" (always ensemble {100 * ensemble:.0f} %)"
            axes.set_title(
                f"{'all pairs' if pairs == 'all' else f'without lr {rates[-1]:g}'}; {BETAS[what]}\n"
                f"r = {panel['correlation']:.2f}, rank {panel['rank correlation']:.2f}\n"
                f"sign {100 * panel['sign agreement']:.0f} %{beside}",
                fontsize=7,
            )
            axes.set_xlabel("approximation (1) (nats)")
            is_loss = truth == "loss_difference"
            axes.set_ylabel(f"{'loss' if is_loss else 'error'}, soup − ensemble ({'nats' if is_loss else 'points'})")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncol=3, fontsize=6.5, frameon=False)
        figure.suptitle(
            f"{title}: positive where the ensemble is better; calibrated β minimises the soup's loss", fontsize=8
        )
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


def draw_approximation(config: Experiment, numbers: pd.DataFrame) -> Figure:
    """Figure K.1 of an experiment."""
    summary = summary_table(numbers, config.analysis.seed)
    return approximation_figure(numbers, summary, config.task.test, titled(config.task.name))


def summarised(config: Experiment, numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What is written beside Figure K.1: `summary_table` as figurek1_summary.csv."""
    return {"summary": summary_table(numbers, config.analysis.seed)}
