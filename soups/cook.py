"""From a finished sweep to soups and ensembles on disk."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.schema import Experiment, Recipe
from eval.forward import Evaluator
from soups.recipes import Soup, best, greedy, mean_of, uniform
from store.atomic import read_json, read_jsonl, write_json, write_jsonl
from store.provenance import provenance
from store.runs import Ingredient, RunFolder, digest_of, read_pool, sole_writer
from store.weights import Weights, digest, save_weights

ENSEMBLES = ("ensemble", "greedy_ensemble")  # kept as lists of members; their logits are means of cached ones


class Journal:
    """Scores of candidates already tried, on disk as they come, so that a killed greedy run pays for none twice."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = read_jsonl(path) if path.exists() else []

    def remembered(self, score: Callable[[Weights], float]) -> Callable[[Weights], float]:
        """`score`, but looked up where the same weights were scored before."""

        def lookup(weights: Weights) -> float:
            name = digest(weights)
            known = {row["weights"]: float(row["score"]) for row in self.rows}
            if name not in known:
                known[name] = score(weights)
                self.rows.append({"weights": name, "score": known[name]})
                write_jsonl(self.path, self.rows)
            return known[name]

        return lookup


def usable_pool(config: Experiment) -> list[Ingredient]:
    """The pool without diverged rows.

    Raises:
        UserError: rows are missing, or all of them diverged.
    """
    pool = [ingredient for ingredient in read_pool(RunFolder.of(config), config.sweep.rows) if ingredient.usable]
    if not pool:
        raise UserError(f"every row of {RunFolder.of(config).root} diverged: lower optim.lr in the sweep")
    return pool


def mix(recipe: Recipe, pool: list[Ingredient], evaluator: Evaluator, journal: Journal) -> Soup:
    """Run one recipe over a pool; the only split it sees is held-out."""
    split = evaluator.config.task.held_out
    held_out = [ingredient.held_out_top1 for ingredient in pool]
    files = [ingredient.load for ingredient in pool]
    logits = [partial(_logits, evaluator, ingredient, split) for ingredient in pool]

    def soup_accuracy(weights: Weights) -> float:
        return evaluator.count(evaluator.fresh_logits(weights, split), split).top1

    def ensemble_accuracy(mean: Weights) -> float:
        return evaluator.count(mean["logits"], split).top1

    match recipe:
        case "best":
            return best(files, held_out)
        case "uniform":
            return uniform(files, held_out)
        case "greedy":
            return greedy(files, held_out, journal.remembered(soup_accuracy))
        case "ensemble":
            return uniform(logits, held_out)
        case "greedy_ensemble":
            return greedy(logits, held_out, ensemble_accuracy)


def _logits(evaluator: Evaluator, ingredient: Ingredient, split: str) -> Weights:
    return {"logits": evaluator.logits(ingredient.digest, ingredient.load, split)}


def cook(config: Experiment, recipe: Recipe, evaluator: Evaluator) -> dict[str, Any]:
    """Cook one recipe, or find it cooked from the same pool; returns its soup.json.

    Raises:
        UserError: a pool that is not finished, damaged files, or models that do not fit together.
    """
    run, split = RunFolder.of(config), config.task.held_out
    pool = usable_pool(config)
    folder = run.soup(recipe)
    identity = digest_of(
        {"recipe": recipe, "held_out": evaluator.split(split).digest, "pool": [(i.row, i.digest) for i in pool]}
    )
    with sole_writer(folder):
        if (folder / "soup.json").exists():
            cooked = read_json(folder / "soup.json")
            if cooked["identity"] == identity:
                return cooked
        try:
            soup = mix(recipe, pool, evaluator, Journal(folder / "journal.jsonl"))
        except ValueError as error:
            raise UserError(f"recipe {recipe} on {run.root}: {error}") from None
        if recipe in ENSEMBLES:
            logits, name = soup.weights["logits"], None
        else:
            name = save_weights(folder / "weights.safetensors", soup.weights)
            logits = evaluator.logits(name, lambda: soup.weights, split)
        count = evaluator.count(logits, split)
        cooked = {
            "identity": identity,
            "recipe": recipe,
            "digest": name,
            "ingredients": [{"row": pool[i].row, "digest": pool[i].digest} for i in soup.ingredients],
            "mixing_weight": 1 / len(soup.ingredients),
            "trials": [{"row": pool[t.candidate].row, "score": t.score, "accepted": t.accepted} for t in soup.trials],
            "selected_on": {"split": split, "digest": evaluator.split(split).digest},
            "held_out": {"split": split, "correct": count.correct, "n": count.n},
            "provenance": provenance(),
        }
        write_json(folder / "soup.json", cooked)
        return cooked


def logits_of(config: Experiment, cooked: dict[str, Any], split: str, evaluator: Evaluator) -> torch.Tensor:
    """(N, C) logits of what a recipe made: its own forward pass, or for an ensemble the mean of its members'.

    Args:
        config: the experiment.
        cooked: a soup.json.
        split: any split of the task.
        evaluator: of the experiment.
    """
    if cooked["digest"] is not None:
        from_file = RunFolder.of(config).soup(cooked["recipe"]) / "weights.safetensors"
        return evaluator.logits_of_file(cooked["digest"], from_file, split)
    pool = {ingredient.row: ingredient for ingredient in usable_pool(config)}
    members = [pool[member["row"]] for member in cooked["ingredients"]]
    return mean_of(partial(_logits, evaluator, member, split) for member in members)["logits"]


def describe(cooked: dict[str, Any]) -> str:
    """One line about a soup or ensemble."""
    score, rows = cooked["held_out"], [member["row"] for member in cooked["ingredients"]]
    what = f"rows {', '.join(map(str, rows))}" if len(rows) < 9 else f"{len(rows)} models"
    return f"{cooked['recipe']}: held-out {100 * score['correct'] / score['n']:.1f} % (n = {score['n']}), {what}"
