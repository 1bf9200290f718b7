"""Each recipe, run over the pool of an experiment. The only split that is looked at here is the one that selects.

That is held-out, but for a measurement in which held-out and test change places (analysis/claims.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Cooking, Experiment, Single
from eval.calibration import fit_beta
from eval.forward import Evaluator
from eval.metrics import correct
from soups.average import Loader, mixture
from soups.descent import LearnedSettings, learned, shuffled
from soups.files.atomic import digest_of
from soups.files.weights import LazyWeights, Weights, digest, load_weights
from soups.ranks import this_rank
from soups.recipes import (
    GrowingLogits,
    Soup,
    best,
    equal,
    greedy,
    greedy_counted,
    greedy_with_replacement,
    subset,
    uniform,
    uniform_ensemble,
    wise_ft,
)
from soups.scores import Journal
from soups.selection import random_order
from soups.stock import ratio, stock_cosines, stock_row
from store.runs import Ingredient, RunFolder, read_pool
from store.workers import little_memory

SINGLE = get_args(Single)  # recipes that give one of the models


@dataclass(frozen=True)
class Mixed:
    """What a recipe gave, and what only this recipe has to say."""

    soup: Soup
    notes: dict[str, Any] = field(default_factory=dict)  # of soup.json
    coefficients: tuple[tuple[str, ...], Tensor] | None = None  # groups (G) and (G, K) of a learned soup


def usable_pool(config: Experiment, *, initialisation: bool = True) -> list[Ingredient]:
    """The initialisation, unless it is left out, and the rows that did not diverge.

    Raises:
        UserError: rows are missing, of other settings, or all of them diverged.
    """
    pool = [each for each in read_pool(config) if each.usable and (each.row or initialisation)]
    if not pool:
        raise UserError(f"every row of {RunFolder.of(config).root} diverged: lower optim.lr in the sweep")
    return pool


def ingredients_of(config: Experiment) -> list[Ingredient]:
    """What recipes choose from: the usable pool, without the initialisation where `cooking` leaves it out.

    Raises:
        UserError: as `usable_pool`, or nothing but the initialisation is usable and it is left out.
    """
    return usable_pool(config, initialisation=config.cooking.initialisation)


def individuals_of(config: Experiment) -> list[Ingredient]:
    """What single models are chosen from: the ingredients, or of each row every kind of `cooking.individuals`.

    Raises:
        UserError: as `ingredients_of`, or a row has no weights of such a kind.

    Source: Wortsman et al. 2022, Section 3.3.2: the best single model is of either EMA, soups are of the low one.
    """
    kinds, found = config.cooking.individuals, []
    for each in ingredients_of(config):
        own = each.kinds() if kinds and each.row else {}  # row 0 is not trained: there is one kind of it
        missing = [kind for kind in kinds if kind not in own] if each.row else []
        if missing:
            raise UserError(f"{each.folder} has no weights of kind {missing[0]}, which cooking.individuals names")
        found += [own[kind] for kind in kinds] if own else [each]
    return found


def pool_of(config: Experiment, recipe: str) -> list[Ingredient]:
    """What a recipe chooses from; raises as `individuals_of`."""
    return individuals_of(config) if recipe in SINGLE else ingredients_of(config)


def member_logits(evaluator: Evaluator, ingredient: Ingredient, split: str) -> Weights:
    """Cached logits of a member of an ensemble, in the form that recipes take."""
    return {"logits": evaluator.logits(ingredient.digest, ingredient.load, split)}


@dataclass
class PoolContext:
    """What a recipe works with."""

    pool: list[Ingredient]
    evaluator: Evaluator
    folder: Path  # for the journal or state from which a killed recipe continues
    identity: str  # names recipe, settings, pool and the split that selects
    order: int  # of greedy_random_order, which of its orders
    split: str  # which selects

    @cached_property
    def start(self) -> Ingredient:
        """The initialisation, row 0, whether it is in the pool or not."""
        return usable_pool(self.evaluator.config)[0]

    @property
    def cooking(self) -> Cooking:
        """The settings of all recipes."""
        return self.evaluator.config.cooking

    @cached_property
    def held_out(self) -> list[float]:
        """(K,) scores on the split that selects, by the task's metric, that models are sorted by."""
        if self.split == self.evaluator.config.task.held_out:
            return [ingredient.held_out_score for ingredient in self.pool]
        return [self.evaluator.score(load()["logits"], self.split) for load in self.logits]

    @property
    def models(self) -> list[Loader]:
        """Loaders of weights, for soups."""
        return [ingredient.load for ingredient in self.pool]

    @property
    def logits(self) -> list[Loader]:
        """Loaders of logits on the split that selects, for ensembles."""
        return [partial(member_logits, self.evaluator, ingredient, self.split) for ingredient in self.pool]

    @cached_property
    def journal(self) -> Journal:
        """Candidates tried before a stop."""
        rank = this_rank()[0]  # one writer a file
        return Journal(self.folder / (f"journal.{rank}.jsonl" if rank else "journal.jsonl"))

    def accuracy(self, weights: Weights) -> float:
        """Held-out score of candidate weights, by a forward pass unless the journal has it."""

        def score() -> float:
            return self.evaluator.score(self.evaluator.fresh_logits(weights, self.split), self.split)

        return float(self.journal.lookup(digest(weights), score))

    def ensemble_accuracy(self, mean: Weights) -> float:
        """Held-out score of mean logits."""
        return self.evaluator.score(mean["logits"], self.split)


def chosen_rows(cooking: Cooking, pool: list[Ingredient]) -> list[int]:
    """Positions in the pool of the rows that `cooking.rows` names.

    Raises:
        UserError: no rows named, or one that is not in the pool.
    """
    places = {ingredient.row: place for place, ingredient in enumerate(pool)}
    missing = [row for row in cooking.rows if row not in places]
    if missing or not cooking.rows:
        raise UserError(f"recipe=subset needs cooking.rows=[...] of rows {sorted(places)}; got {list(cooking.rows)}")
    return [places[row] for row in cooking.rows]


def _greedy(context: PoolContext) -> Mixed:
    """Recipe 1, plain or by a shortcut that takes the same decisions."""
    cooking, evaluator, split = context.cooking, context.evaluator, context.evaluator.split(context.split)
    if cooking.shortcut == "hard_first":
        metric = evaluator.config.task.metrics.get(context.split, "top1")
        if metric != "top1":
            raise UserError(f"cooking.shortcut=hard_first counts right answers, and {metric} is no such count")
        known = torch.stack([correct(load()["logits"], split.labels) for load in context.logits])

        def images_correct(weights: Weights, images: Tensor) -> Tensor:
            def compute() -> list[bool]:
                return correct(evaluator.fresh_logits(weights, context.split, images), split.labels[images]).tolist()

            return torch.tensor(context.journal.lookup(f"{digest(weights)}/{digest_of(images.tolist())}", compute))

        soup, forwards = greedy_counted(
            context.models,
            known,
            images_correct,
            ties=cooking.ties,
            chunk=cooking.chunk,
            significance=cooking.significance,
            min_sigma=cooking.min_sigma,
        )
    else:
        world, forwards = this_rank()[1], 0  # no process is without a candidate
        ahead = -(-cooking.ahead // world) * world if cooking.shortcut == "speculative" else 1
        soup = greedy(context.models, context.held_out, context.accuracy, ahead=ahead, ties=cooking.ties)
    if cooking.shortcut == "none":
        return Mixed(soup)
    spent = {"evaluations": soup.evaluations, "rounds": soup.rounds, "image_forwards": forwards}
    return Mixed(soup, {"shortcut": cooking.shortcut, "spent": spent})


def _random_order(context: PoolContext) -> Mixed:
    """One order of Table 3's three; each has a seed of its own, so that it can be made alone."""
    order = random_order(len(context.pool), context.evaluator.config.sweep.seed + context.order, 0)
    soup = greedy(context.models, context.held_out, context.accuracy, order=order, ties=context.cooking.ties)
    return Mixed(soup, {"order": context.order})


def _learned(per: Literal["model", "layer", "tensor"], context: PoolContext) -> Mixed:
    """Appendix I; the coefficients of all groups are kept, and their mean is what soup.json lists."""
    from models.classifier import speed_up_depthwise  # noqa: PLC0415  # seconds that other recipes need not wait for

    split, settings = context.evaluator.split(context.split), context.cooking.learned
    files: list[Loader] = [partial(LazyWeights, i.folder / "weights.safetensors") for i in context.pool]
    network = context.evaluator.model
    images, labels = context.evaluator.together(context.split), split.labels.to(network.device)
    descent = LearnedSettings(per, **vars(settings))
    if network.device.type == "cpu":
        speed_up_depthwise(network)
    with little_memory():
        learnt = learned(
            network,
            files,
            shuffled(images, labels, settings.batch_size, context.identity),
            descent,
            state_path=context.folder / "state.pt",
            identity=context.identity,
        )
    shares = tuple(learnt.coefficients.mean(dim=0).tolist())
    notes = {"beta": learnt.beta, "first_loss": learnt.losses[0], "last_loss": learnt.losses[-1]}
    return Mixed(Soup(learnt.weights, tuple(range(len(shares))), shares), notes, (learnt.groups, learnt.coefficients))


def _model_stock(context: PoolContext) -> Mixed:
    """Of the fine-tuned models and the initialisation, row 0."""
    tuned = [place for place, ingredient in enumerate(context.pool) if ingredient.row]
    if len(tuned) < 2:
        raise ValueError(f"an angle needs at least two fine-tuned models, got {len(tuned)}")
    start, models = context.start.load(), [context.pool[place].load() for place in tuned]
    cosines = stock_cosines(start, models)
    ratios = {name: ratio(cosine, len(models)) for name, cosine in cosines.items()}
    weights = mixture([start, *models], lambda name: stock_row(ratios[name], len(models)))
    moved = [ratios[name] for name, cosine in cosines.items() if cosine < 1]
    return Mixed(Soup(weights, tuple(tuned), equal(len(tuned))), {"mean_ratio": sum(moved) / max(1, len(moved))})


def _wise_ft(context: PoolContext) -> Mixed:
    """Between row 0 and a soup that was made before."""
    cooking = context.cooking
    file = RunFolder.of(context.evaluator.config).soup(cooking.of) / "weights.safetensors"
    if not file.exists():
        raise UserError(f"{file} is missing: run python -m soups recipe={cooking.of} first, or choose cooking.of")
    weights = wise_ft(context.start.load, lambda: load_weights(file), cooking.alpha)
    return Mixed(Soup(weights, (0,), (1.0,)), {"of": cooking.of, "alpha": cooking.alpha})


def _calibrated(context: PoolContext) -> Mixed:
    """All members, each scaled by its own inverse temperature before the mean."""
    labels = context.evaluator.split(context.split).labels
    betas = [fit_beta(load()["logits"], labels) for load in context.logits]

    def scaled(load: Loader, beta: float) -> Loader:
        return lambda: {"logits": beta * load()["logits"]}

    soup = uniform_ensemble(list(map(scaled, context.logits, betas)), context.held_out)
    return Mixed(soup, {"betas": [betas[i] for i in soup.ingredients]})


RECIPES: dict[str, Callable[[PoolContext], Mixed]] = {
    "best": lambda c: Mixed(best(c.models, c.held_out)),
    "second_best": lambda c: Mixed(best(c.models, c.held_out, place=2)),
    "uniform": lambda c: Mixed(uniform(c.models, c.held_out)),
    "subset": lambda c: Mixed(subset(c.models, c.held_out, chosen_rows(c.cooking, c.pool))),
    "greedy": _greedy,
    "greedy_random_order": _random_order,
    "greedy_with_replacement": lambda c: Mixed(
        greedy_with_replacement(c.models, c.held_out, c.accuracy, rounds=c.cooking.rounds)
    ),
    "learned": partial(_learned, "model"),
    "learned_by_layer": partial(_learned, "layer"),
    "learned_by_tensor": partial(_learned, "tensor"),
    "model_stock": _model_stock,
    "wise_ft": _wise_ft,
    "ensemble": lambda c: Mixed(uniform_ensemble(c.logits, c.held_out)),
    "calibrated_ensemble": _calibrated,
    "greedy_ensemble": lambda c: Mixed(
        greedy(c.logits, c.held_out, c.ensemble_accuracy, grow=GrowingLogits, ties=c.cooking.ties)
    ),
    "ensemble_with_replacement": lambda c: Mixed(
        greedy_with_replacement(c.logits, c.held_out, c.ensemble_accuracy, grow=GrowingLogits, rounds=c.cooking.rounds)
    ),
}


def mix(name: str, pool: list[Ingredient], evaluator: Evaluator, folder: Path, identity: str, *, split: str) -> Mixed:
    """Run one recipe.

    Args:
        name: a recipe; of greedy_random_order one of its orders, as in `greedy_random_order/2`.
        pool: the ingredients.
        evaluator: of the experiment.
        folder: for the journal or state from which a killed recipe continues.
        identity: names recipe, settings, pool and the split that selects.
        split: selects.

    Raises:
        ValueError: models that do not fit together.
        UserError: settings that this pool cannot meet.
    """
    recipe, _, order = name.partition("/")
    return RECIPES[recipe](PoolContext(pool, evaluator, folder, identity, int(order or 0), split))
