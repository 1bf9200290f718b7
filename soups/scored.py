"""Recipes that choose or weigh models by held-out examples, which are a score or a loss; `soups.api` has them too."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import fsum, isfinite
from pathlib import Path
from typing import Any, Literal

from soups.averaging import Models, by_tensor, open_pool, writer
from soups.errors import UserError, one_of
from soups.files.opening import opened
from soups.mean import Mixing
from soups.ranks import this_rank
from soups.scorers.outside import code_of, function_named, scorer_of
from soups.scores import Given, Journal, Scores, digests_of, given_scores, reduced
from soups.scoring import HeldOut, Learning, Scorer, gain_of, key_of
from soups.selection import Goal, Mixture, Selection, Ties, add_in_order, add_with_replacement, best_first
from soups.selection import random_order as random_places
from soups.soup import Decision, Report, Soup
from soups.sources import Pool

Score = str | Callable[..., Any] | Scorer | HeldOut


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
    """How a pool is scored, with every file read once before the first forward pass; settings as in `greedy`."""
    if not (isfinite(min_sigma) and min_sigma >= 0):
        raise UserError(f"--min-sigma is a number of standard deviations, at least 0; got {min_sigma}")
    if min_sigma and scores:
        raise UserError("--min-sigma needs a number for each example, which --scores does not have: leave out one")
    pool, how, _ = open_pool(models, settings, score=score)
    scorer = _scorer(score, goal, pool)
    others = None if report is None else _scorer(report, goal, pool)
    if others is not None and callable(report) and report != score:
        others = replace(others, key=key_of("report", others.key))  # its code may be the same, on other examples
    if others is not None and others.key == scorer.key:
        raise UserError("--report is the data that the soup is selected on: name others")
    if others is not None and (others.metric, others.goal) != (scorer.metric, scorer.goal):
        raise UserError(f"--report is of {others.metric}, and the score that selects of {scorer.metric}: take one")
    if how.batch_norm == "recompute" and how.measured_on is None:
        how = replace(how, measured_on=scorer)
    kept, digests = Journal(None if journal is None else Path(journal)), digests_of(pool, pool.paths)
    found = Scores(pool, scorer, how, kept, digests, given_scores(scores, pool.paths, pool.names), quiet, min_sigma)
    if others is not None:
        found.report = Scores(pool, others, how, kept, digests, {}, quiet)
    return found


def _scorer(score: Score, goal: Goal | None, pool: Pool) -> Scorer:
    if not isinstance(score, HeldOut):
        return scorer_of(score, goal)
    scorer = score.scorer(pool)
    if goal is not None and goal != scorer.goal:
        raise UserError(f"{score.kind} is a score whose goal is {scorer.goal}: leave the goal away")
    return scorer


def _beside_best(scores: Scores, mixture: Mixture, alone: Mapping[int, float]) -> Report:
    """A soup's score, beside that of the model which is best on the held-out examples where all of them are known."""
    (found,) = scores.of([mixture])
    n = scores.scorer.n or (None if found.answers is None else len(found.answers))
    if len(alone) < len(scores.pool):
        return Report(found.value, n)
    (single,) = scores.of([(best_first(list(alone.values()), scores.scorer.goal)[0],)])
    return Report(found.value, n, single.value, gain_of(scores.scorer, found, single))


def _chosen(recipe: str, scores: Scores, selection: Selection, alone: Mapping[int, float], **note: Any) -> Soup:
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
    """Scores of every model by itself."""
    return {i: found.value for i, found in enumerate(scores.of([(i,) for i in range(len(scores.pool))]))}


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

    Raises:
        UserError: models that do not fit together, or a score that fails or is NaN.

    Source: Wortsman et al. 2022, Recipe 1.
    """
    asked: dict[str, Any] = {"scores": scores, "min_sigma": min_sigma, "report": report, "journal": journal}
    one_of("ties", ties, "keep", "drop")
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
    one_of("ties", ties, "keep", "drop")
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


def learned(
    models: Models,
    held_out: HeldOut | str | Learning,
    *,
    per: Literal["model", "layer", "tensor"] = "model",
    lr: float = 0.1,
    epochs: int = 3,
    weight_decay: float = 0.0,
    place: Literal["stream", "host", "device"] = "stream",
    state: str | Path | None = None,
    **settings: Any,
) -> Soup:
    """Learn how much each model weighs by gradient descent on held-out examples (Appendix I).

    Under torchrun each process holds every W-th model and works on its part of each minibatch. Their sums are rounded
    in another order than one process's, so the coefficients agree to about 5 digits and not in every bit.

    Args:
        held_out: `soups.images(...)`, `soups.texts(...)`, `soups.perplexity(...)`; or your loss, as
            `soups.user_loss(network, batches, loss)` or as "module:function", a function without arguments that returns
            these three.
        per: what shares one coefficient of a model.
        place: where models live: read from files at each step, or held on host or device.
        state: a file from which a killed run continues.

    Raises:
        UserError: models that do not fit the network, or a loss that is not finite.
    """
    from soups.descent import LearnedSettings, learn  # noqa: PLC0415
    from soups.files.weights import LazyWeights  # noqa: PLC0415
    from soups.scorers.networks import places  # noqa: PLC0415

    one_of("per", per, "model", "layer", "tensor")
    one_of("place", place, "stream", "host", "device")
    pool, how, _ = open_pool(models, settings, score=held_out if isinstance(held_out, HeldOut) else None)
    digests, size = digests_of(pool, pool.paths), held_out.batch_size if isinstance(held_out, HeldOut) else None
    if isinstance(held_out, HeldOut):
        scorer = held_out.scorer(pool)
        if scorer.learning is None:
            raise UserError(f"--{held_out.kind} has no loss whose gradient a soup could be learned by")
        learning, key = scorer.learning(size), scorer.key
        if how.batch_norm == "recompute" and how.measured_on is None:
            how = replace(how, measured_on=scorer)
    elif isinstance(held_out, str):
        build = function_named(held_out)
        learning, key = user_loss(*build()), code_of(build)
    else:
        learning, key = held_out, code_of(held_out.loss)
    with opened(pool.paths, pool.reading) as checkpoints:
        state_dict = learning.module.state_dict(keep_vars=True)
        try:
            found = learn(
                learning.module,
                [partial(LazyWeights, checkpoint) for checkpoint in checkpoints],
                learning.batches,
                LearnedSettings(per=per, lr=lr, epochs=epochs, weight_decay=weight_decay, place=place),
                state_path=None if state is None else Path(state),
                identity=key_of(key, digests, size),
                loss=learning.loss,
                names=places(checkpoints[0].names, state_dict, pool.names[0], learning.rename),
            )
        except ValueError as error:
            raise UserError(f"learned: {error}") from None
    mean = found.coefficients.mean(dim=0).tolist()
    note = {"per": per, "lr": lr, "epochs": epochs, "first_loss": found.losses[0], "last_loss": found.losses[-1]}
    mixing: Mixing = mean if per == "model" else by_tensor(pool, [], found.of)
    return Soup("learned", pool, writer(pool, mixing, how), dict(zip(pool.names, mean, strict=True)), note)


def user_loss(network: Any, batches: Any, loss: Any = None) -> Learning:
    """What a soup is learned by.

    Args:
        network: a module of torch, on its device; its weights do not matter.
        batches: a function of the epoch to batches, or a list of batches: tensors, or dicts and tuples of tensors.
        loss: of network and batch, a mean over its examples; None: cross-entropy of (inputs, labels).
    """
    from soups.descent import cross_entropy, mean_of  # noqa: PLC0415

    each = batches if callable(batches) else (lambda epoch: batches)
    return Learning(network, each, cross_entropy if loss is None else mean_of(loss))


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
