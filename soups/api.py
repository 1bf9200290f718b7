"""The recipes as functions of models in any form: paths, patterns, dicts, modules, loaders, in any mixture.

`import soups` has them, as in `soups.greedy("run/*.ckpt", score=wer, goal="min").save("soup/")`. Beside its own each
takes the settings of `soups.averaging.open_pool`: dtype, batch_norm, init, key, exclude, only_common, allow_unrelated,
threads and base; and `images=soups.images(...)`, on which batch_norm="recompute" measures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import fsum, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soups.along import shares
from soups.averaging import Averaging, Models, by_tensor, open_pool, writer
from soups.conformance import common_layout
from soups.errors import UserError
from soups.files.opening import opened
from soups.files.reading import Reading
from soups.geometry import slerp_weights
from soups.heldout import HeldOut
from soups.journal import Journal
from soups.merging import undivided
from soups.ranks import this_rank
from soups.scores import Given, Scores, digests_of, given_scores, reduced, to_stderr
from soups.scoring import Scorer, gain_of
from soups.selection import Goal, Mixture, Selection, Ties, add_in_order, add_with_replacement, best_first
from soups.selection import random_order as random_places
from soups.soup import Decision, Report, Soup
from soups.sources import Pool, Source

if TYPE_CHECKING:
    from torch import Tensor

Score = str | Callable[..., Any] | Scorer | HeldOut


def _mixed(recipe: str, pool: Pool, weights: Sequence[float], how: Averaging, *, normalize: bool = True) -> Soup:
    """A soup of one weight a model."""
    total = fsum(weights) if normalize else 1.0
    shares = {name: weight / total for name, weight in zip(pool.names, weights, strict=True)}
    note = {} if normalize else {"normalize": False}
    return Soup(recipe, pool, writer(pool, list(weights), how, merging=None if normalize else undivided), shares, note)


def load(path: str | Path, *, key: str | None = None) -> "Mapping[str, Tensor]":
    """The weights of a file or folder, whatever wrote it: a mapping that reads each tensor when it is asked for.

    Raises:
        UserError: it is missing, damaged, or no weights.
    """
    from soups.files.tensors import LazyWeights  # noqa: PLC0415  # torch takes seconds

    return LazyWeights(Path(path), reading=Reading(key=key))


def uniform(models: Models, **settings: Any) -> Soup:
    """The equal-weight mean of all models (Table 2)."""
    pool, how, _ = open_pool(models, settings)
    return _mixed("uniform", pool, [1.0] * len(pool), how)


def weighted(models: Models, weights: Sequence[float] | str, *, normalize: bool = True, **settings: Any) -> Soup:
    """The mean with a weight for each model, in the order in which they are given, in any scale.

    Args:
        models: of one run, the earliest first, where `weights` are "1-sqrt" or "ema:0.9".
        weights: numbers; or what `soups.along.factors` knows.
        normalize: False is the weighted sum, in which a weight may be negative if the sum of all is above 0.
        settings: of the averaging.

    Raises:
        UserError: not one weight a model; not finite, below 0, or all of them 0.
    """
    pool, how, _ = open_pool(models, settings)
    weights = shares(weights, len(pool)) if isinstance(weights, str) else weights
    if len(weights) != len(pool):
        raise UserError(f"weights: need one for each of {len(pool)} models, got {len(weights)}")
    values = [float(weight) for weight in weights]
    if not all(isfinite(value) and (value >= 0 or not normalize) for value in values) or not fsum(values) > 0:
        least = " of at least 0" if normalize else ""
        raise UserError(f"weights: need finite numbers{least} whose sum is above 0, got {values}")
    return _mixed("weighted", pool, values, how, normalize=normalize)


def slerp(models: Models, t: float = 0.5, **settings: Any) -> Soup:
    """Two models on the great circle between them, tensor by tensor: where weights keep their length.

    Tensors at a cosine of more than 0.9995, and batch-norm statistics, are interpolated on the line between them.

    Args:
        models: two.
        t: in [0, 1]; 0 is the first model.
        settings: of the averaging.

    Raises:
        UserError: not two models, or t outside [0, 1].

    Source: Shoemake 1985; a cosine is of all weights of a tensor, as in mergekit.
    """
    pool, how, _ = open_pool(models, settings)
    if len(pool) != 2:
        raise UserError(f"slerp is between two models, and these are {len(pool)}")
    if not 0 <= t <= 1:
        raise UserError(f"t is in [0, 1], 0 for the first model and 1 for the second; got {t}")
    with opened(pool.paths, pool.reading) as (one, other):
        layout = common_layout([one, other], pool.reading)
        weights = {name: [1 - t, t] for name in layout.kept}  # which are not averaged
        weights |= {name: slerp_weights(one, other, name, layout, t) for name in layout.entries.keys() - weights.keys()}
    note = {"t": t, "normalize": False}
    return Soup("slerp", pool, writer(pool, weights, how, merging=undivided), dict.fromkeys(pool.names), note)


def wise_ft(start: Source, models: Models, alpha: float = 0.5, **settings: Any) -> Soup:
    """(1 - alpha) of the initialisation and alpha of the mean of the models (Wortsman et al. 2021).

    Args:
        start: the initialisation.
        models: fine-tuned from it.
        alpha: in [0, 1].
        settings: of the averaging; `batch_norm="keep"` keeps the statistics of `start`.

    Raises:
        UserError: alpha outside [0, 1], or models that do not fit together.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is in [0, 1], 0 for the initialisation and 1 for the models; got {alpha}")
    pool, how, first = open_pool(models, settings, start)
    assert first is not None  # start is one
    weights = [1 - alpha, *[alpha / len(pool)] * len(pool)]
    shares = dict(zip([first.names[0], *pool.names], weights, strict=True))
    note = {"alpha": alpha, "init": first.names[0]}
    return Soup("wise_ft", pool, writer(pool, weights, how, start=first), shares, note)


def model_stock(start: Source, models: Models, **settings: Any) -> Soup:
    """Between the initialisation and the mean of the models, tensor by tensor, as the angles between them say.

    Args:
        start: the initialisation.
        models: at least two, fine-tuned from it.
        settings: of the averaging.

    Source: Jang et al. 2024, Section 4.
    """
    from soups.files.tensors import LazyWeights  # noqa: PLC0415
    from soups.stock import ratio, stock_cosines  # noqa: PLC0415

    pool, how, first = open_pool(models, settings, start)
    assert first is not None  # start is one
    if len(pool) < 2:
        raise UserError("model_stock needs at least two fine-tuned models, whose angle says how far to go")
    with opened([*first.paths, *pool.paths], pool.reading) as checkpoints:
        begin, *ends = [LazyWeights(checkpoint) for checkpoint in checkpoints]
        ratios = {name: ratio(cosine, len(pool)) for name, cosine in stock_cosines(begin, ends, pool.reading).items()}

    def row(name: str) -> list[float]:
        share = ratios.get(name, 1.0)
        return [1 - share, *[share / len(pool)] * len(pool)]

    weights = by_tensor(pool, first.paths, row)
    shares: dict[str, float | None] = dict.fromkeys([first.names[0], *pool.names])
    note = {"init": first.names[0], "mean_ratio": fsum(ratios.values()) / max(1, len(ratios))}
    return Soup("model_stock", pool, writer(pool, weights, how, start=first), shares, note)


def _scores(
    models: Models,
    score: Score,
    goal: Goal | None,
    *,
    scores: Given = None,
    min_sigma: float = 0.0,
    report: Score | None = None,
    journal: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Scores:
    """How a pool is scored, with every file read once before the first forward pass; settings as in `greedy`.

    Raises:
        UserError: a score that is none, two that do not fit together, or a model with NaN or infinity.
    """
    if not (isfinite(min_sigma) and min_sigma >= 0):
        raise UserError(f"--min-sigma is a number of standard deviations, at least 0; got {min_sigma}")
    if min_sigma and scores:
        raise UserError("--min-sigma needs a number for each example, which --scores does not have: leave out one")
    pool, how, _ = open_pool(models, settings, score=score)
    scorer = _scorer(score, goal, pool)
    others = None if report is None else _scorer(report, goal, pool)
    if others is not None and others.key == scorer.key:
        raise UserError("--report is the data that the soup is selected on: name others")
    if others is not None and (others.metric, others.goal) != (scorer.metric, scorer.goal):
        raise UserError(f"--report is of {others.metric}, and the score that selects of {scorer.metric}: take one")
    if how.batch_norm == "recompute" and how.measured_on is None:
        how = replace(how, measured_on=scorer)
    place = Path(journal) if journal is not None else None
    told = (lambda line: None) if quiet else to_stderr
    kept, digests = Journal(place), digests_of(pool, pool.paths)
    found = Scores(pool, scorer, how, kept, digests, given_scores(scores, pool.paths, pool.names), told, min_sigma)
    if others is not None:
        found.report = Scores(pool, others, how, kept, digests, {}, told)
    return found


def _scorer(score: Score, goal: Goal | None, pool: Pool) -> Scorer:
    if isinstance(score, HeldOut):
        scorer = score.scorer(pool)
        if goal is not None and goal != scorer.goal:
            raise UserError(f"{score.kind} is a score whose goal is {scorer.goal}: leave the goal away")
        return scorer
    from soups.scorers.outside import scorer_of  # noqa: PLC0415

    return scorer_of(score, goal)


def _beside_best(scores: Scores, mixture: Mixture, alone: Mapping[int, float]) -> Report:
    """A soup's score beside that of the model which is best on the held-out examples, where all of them are known."""
    (found,) = scores.of([mixture])
    n = scores.scorer.n or (None if found.answers is None else len(found.answers))
    if len(alone) < len(scores.pool):
        return Report(found.value, n)
    (single,) = scores.of([(best_first(list(alone.values()), scores.scorer.goal)[0],)])
    return Report(found.value, n, single.value, gain_of(scores.scorer, found, single))


def _chosen(recipe: str, scores: Scores, selection: Selection, alone: Mapping[int, float], **note: Any) -> Soup:
    """A greedy recipe's soup, with its table and what it gains."""
    pool, scorer = scores.pool, scores.scorer
    counts = reduced(selection.mixture)
    weights = [float(counts.get(i, 0)) for i in range(len(pool))]
    total = fsum(weights)
    decisions = tuple(
        Decision(pool.names[trial.candidate], alone.get(trial.candidate), trial.score, trial.accepted, trial.versus)
        for trial in selection.trials
    )
    found = _beside_best(scores, selection.mixture, alone)
    return Soup(
        recipe,
        pool,
        writer(pool, weights, scores.how),
        {pool.names[i]: weights[i] / total for i in counts},
        note,
        decisions,
        {pool.names[i]: value for i, value in alone.items()},
        found.score,
        scorer.metric,
        scorer.goal,
        found.n,
        found.gain,
        None if scores.report is None else _beside_best(scores.report, selection.mixture, alone),
    )


def _alone(scores: Scores) -> dict[int, float]:
    """Of every model by itself."""
    singles: list[Mixture] = [(i,) for i in range(len(scores.pool))]
    return {i: found.value for i, found in enumerate(scores.of(singles))}


def greedy(
    models: Models,
    score: Score,
    goal: Goal | None = None,
    *,
    scores: Given = None,
    ties: Ties = "keep",
    min_sigma: float = 0.0,
    report: Score | None = None,
    journal: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Soup:
    """Add models best-first, keeping each one that does not make the held-out score worse (Recipe 1).

    Under torchrun the next candidates are scored ahead, one by each process; the decisions are those of one.

    Args:
        models: of which at least one ends up in the soup.
        score: a function of a state dict to a number, or to one number for each example; a shell command with {soup}
            in it that prints a number as its last line; "module:function"; or `soups.images(...)` and its like.
        goal: "max" or "min"; of held-out examples it is known.
        scores: scores of single models that are known: a dict, or a .json, .jsonl or .csv file. Others are computed.
        ties: what becomes of a model that leaves the score exactly as it was; the paper keeps it, the authors' script
            drops it.
        min_sigma: add a model only if its gain is at least this many standard deviations of luck; it needs a number
            for each example. 0 is the paper's rule.
        report: a score of the same kind on other examples, by which the soup is compared with the best single model.
        journal: a file for every score as it comes; the same call continues from it.
        quiet: print no score as it comes.
        settings: of the averaging.

    Raises:
        UserError: models that do not fit together, or a score that fails or is NaN.

    Source: Wortsman et al. 2022, Recipe 1.
    """
    asked: dict[str, Any] = {"scores": scores, "min_sigma": min_sigma, "report": report, "journal": journal}
    found = _scores(models, score, goal, quiet=quiet, **asked, **settings)
    alone, aim = _alone(found), found.scorer.goal
    order = best_first(list(alone.values()), aim)
    chosen = add_in_order(order, alone[order[0]], found.results, ahead=this_rank()[1], ties=ties, goal=aim)
    return _chosen("greedy", found, chosen, alone, ties=ties)


def random_order(
    models: Models, score: Score, goal: Goal | None = None, *, seed: int = 0, ties: Ties = "keep", **settings: Any
) -> Soup:
    """The same from a pool that is not sorted by its scores, but in an order that `seed` draws (Table 3).

    The first model always enters, so the soup may be worse than the best model; other models are not scored alone.
    Further settings are `min_sigma`, `report`, `journal` and `quiet` of `greedy`, and those of the averaging.
    """
    found = _scores(models, score, goal, **settings)
    order = random_places(len(found.pool), seed, 0)
    (first,) = found.of([(order[0],)])
    chosen = add_in_order(order, first.value, found.results, ahead=this_rank()[1], ties=ties, goal=found.scorer.goal)
    return _chosen("random_order", found, chosen, {order[0]: first.value}, seed=seed, ties=ties)


def with_replacement(
    models: Models, score: Score, goal: Goal | None = None, *, rounds: int = 20, **settings: Any
) -> Soup:
    """Add, again and again, the model of the whole pool that helps most; one that is added twice weighs twice.

    Further settings are `scores`, `min_sigma`, `report`, `journal` and `quiet` of `greedy`, and those of the averaging.
    """
    found = _scores(models, score, goal, **settings)
    alone = _alone(found)
    chosen = add_with_replacement(list(alone.values()), found.results, rounds=rounds, goal=found.scorer.goal)
    return _chosen("with_replacement", found, chosen, alone, rounds=rounds)


def images(root: str | Path, network: str, **settings: Any) -> HeldOut:
    """Labelled images as a score: root/<class>/<image>, by the network timm:NAME, open_clip:NAME, ..."""
    return HeldOut("images", Path(root), network, **settings)


def texts(path: str | Path, network: str | None = None, **settings: Any) -> HeldOut:
    """Labelled texts in a .tsv, .csv or .jsonl as a score, by a classifier of transformers."""
    return HeldOut("texts", Path(path), network, **settings)


def choices(path: str | Path, network: str | None = None, **settings: Any) -> HeldOut:
    """Multiple choice in a .jsonl as a score, by a causal or masked language model of transformers."""
    return HeldOut("choices", Path(path), network, **settings)


def perplexity(path: str | Path, network: str | None = None, **settings: Any) -> HeldOut:
    """Perplexity on a text or .jsonl file as a score, by a causal or masked language model of transformers."""
    return HeldOut("perplexity", Path(path), network, **settings)
