"""From a finished sweep to soups and ensembles on disk."""

from functools import partial
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from pydantic import TypeAdapter
from rich.console import Console

from configs.errors import UserError
from configs.schema import Cooking, Ensemble, Experiment, Recipe
from eval.forward import Evaluator
from soups.experiment.pool import Mixed, member_logits, mix, pool_of, usable_pool
from soups.files.atomic import digest_of, read_json, replacing, write_json
from soups.files.weights import save_weights
from soups.ranks import from_first, this_rank
from store.provenance import provenance
from store.rows import score_of
from store.runs import Ingredient, RunFolder, sole_writer
from store.workers import spread

# Kept as lists of members; their logits are means of cached ones.
ENSEMBLES = get_args(Ensemble)
GREEDY = ("ties", "shortcut", "ahead", "chunk", "significance", "min_sigma")
SETTINGS = {  # what of `cooking` each recipe depends on
    "subset": ("rows",),
    "greedy": GREEDY,
    "greedy_random_order": ("ties",),
    "greedy_with_replacement": ("rounds",),
    "greedy_ensemble": ("ties",),
    "ensemble_with_replacement": ("rounds",),
    "learned": ("learned",),
    "learned_by_layer": ("learned",),
    "learned_by_tensor": ("learned",),
    "wise_ft": ("of", "alpha"),
}


def outputs_of(config: Experiment, recipe: str) -> list[str]:
    """What a recipe makes: itself, or one soup for each random order."""
    if recipe == "greedy_random_order":
        return [f"{recipe}/{order}" for order in range(config.cooking.orders)]
    return [recipe]


def job_recipes(config: Experiment) -> tuple[Recipe, ...]:
    """The recipes whose soups this job makes: the one that is named, else its share of the experiment's list.

    An interpolation is made by the job that makes its soup.
    """
    if config.recipe:
        return (config.recipe,)
    places = {recipe: place for place, recipe in enumerate(config.recipes)}
    if "wise_ft" in places:
        places["wise_ft"] = places.get(config.cooking.of, places["wise_ft"])
    return tuple(recipe for recipe in config.recipes if places[recipe] % config.share.of == config.share.index)


def identity_of(config: Experiment, name: str, pool: list[Ingredient], held_out: str) -> str:
    """32 hex digits over the recipe, the settings it depends on, the pool and the held-out split's digest."""
    recipe = name.partition("/")[0]
    cooking = TypeAdapter(Cooking).dump_python(config.cooking, mode="json")
    parts: dict[str, Any] = {"recipe": name, "held_out": held_out, "pool": [(i.row, i.digest) for i in pool]}
    parts["settings"] = {field: cooking[field] for field in SETTINGS.get(recipe, ())}
    if recipe == "wise_ft":
        soup = RunFolder.of(config).soup(config.cooking.of) / "soup.json"
        parts["end"] = read_json(soup)["digest"] if soup.exists() else None
    if recipe == "greedy_random_order":
        parts["seed"] = config.sweep.seed
    return digest_of(parts)


def place_of(config: Experiment, name: str, split: str) -> Path:
    """The folder of an output; one that was selected on another split than held-out says so in its name."""
    return RunFolder.of(config).soup(name if split == config.task.held_out else f"{name}@{split}")


def make_soup(name: str, evaluator: Evaluator, split: str | None = None) -> dict[str, Any]:
    """Make one of `outputs_of`, or find it made from the same pool with the same settings; returns its soup.json.

    Args:
        name: one of `outputs_of`.
        evaluator: of the experiment.
        split: selects; held-out where None.

    Raises:
        UserError: a pool that is not finished, damaged files, or models that do not fit together.
    """
    config = evaluator.config
    split = split or config.task.held_out
    pool, folder = pool_of(config, name), place_of(config, name, split)
    identity = identity_of(config, name, pool, evaluator.split(split).digest)
    with sole_writer(folder):
        if (folder / "soup.json").exists():
            soup: dict[str, Any] = read_json(folder / "soup.json")
            if soup["identity"] == identity:
                return soup
            _clear(folder)
        try:
            mixed = mix(name, pool, evaluator, folder, identity, split=split)
        except (UserError, ValueError) as error:
            raise UserError(f"recipe {name} on {RunFolder.of(config).root}: {error}") from None
        soup = _record(name, mixed, pool, evaluator, folder, split=split) | {"identity": identity}
        write_json(folder / "soup.json", soup)
        (folder / "state.pt").unlink(missing_ok=True)
        return soup


def _clear(folder: Path) -> None:
    """Remove what was made from another pool or with other settings, its record first."""
    for name in ("soup.json", "journal.jsonl", "state.pt", "scores.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for journal in folder.glob("journal.*.jsonl"):
        journal.unlink()


def make_soup_together(config: Experiment) -> None:
    """Recipe 1 by the processes of torchrun: each scores its part of the next candidates, the first writes."""
    if config.recipe != "greedy" or config.cooking.shortcut != "speculative":
        raise UserError(
            "processes of torchrun share recipe=greedy with cooking.shortcut=speculative and no other recipe: type "
            "both, or start python -m soups without torchrun"
        )
    evaluator, split = Evaluator(config), config.task.held_out
    pool, folder = pool_of(config, "greedy"), RunFolder.of(config).soup("greedy")
    identity = identity_of(config, "greedy", pool, evaluator.split(split).digest)
    is_first = this_rank()[0] == 0
    if is_first and (folder / "soup.json").exists() and read_json(folder / "soup.json")["identity"] != identity:
        _clear(folder)  # before another process reads its journal
    if from_first(is_made(config, "greedy") if is_first else None):
        return
    if is_first:
        make_soup("greedy", evaluator)
    else:
        mix("greedy", pool, evaluator, folder, identity, split=split)


def _record(
    name: str, mixed: Mixed, pool: list[Ingredient], evaluator: Evaluator, folder: Path, *, split: str
) -> dict[str, Any]:
    """Write weights and coefficients, score the result on the split that selects; soup.json without its identity."""
    soup = mixed.soup
    if name in ENSEMBLES:
        logits, digest = soup.weights["logits"], None
    else:
        digest = save_weights(folder / "weights.safetensors", soup.weights)
        logits = evaluator.logits(digest, lambda: soup.weights, split)
    if mixed.coefficients is not None:
        groups, shares = mixed.coefficients
        table = pd.DataFrame(shares.numpy(), columns=[f"row {i.row}" for i in pool])
        table.insert(0, "group", list(groups))
        with replacing(folder / "coefficients.csv") as temporary:
            table.to_csv(temporary, index=False)
    scored = evaluator.scored(logits, split)
    counted = "score" not in scored  # the score is the share of right answers
    return mixed.notes | {
        "recipe": name,
        "digest": digest,
        "ingredients": [
            {"row": pool[i].row, "kind": pool[i].kind, "digest": pool[i].digest, "weight": weight}
            for i, weight in zip(soup.ingredients, soup.mixing, strict=True)
        ],
        "trials": [
            {
                "row": pool[t.candidate].row,
                "score": t.score,
                **({"correct": round(t.score * scored["n"])} if counted else {}),
                "accepted": t.accepted,
                "exact": t.exact,
                "versus": vars(t.versus) if t.versus else None,
            }
            for t in soup.trials
        ],
        "selected_on": {"split": split, "digest": evaluator.split(split).digest},
        "held_out": scored,
        "provenance": provenance(),
    }


def logits_of(soup: dict[str, Any], split: str, evaluator: Evaluator) -> torch.Tensor:
    """(N, C) logits of what a recipe made, by its soup.json: its own forward pass, or the mean of its members'."""
    if soup["digest"] is not None:
        folder = place_of(evaluator.config, soup["recipe"], soup["selected_on"]["split"])
        from_file = folder / "weights.safetensors"
        return evaluator.logits_of_file(soup["digest"], from_file, split)
    pool = {ingredient.row: ingredient for ingredient in usable_pool(evaluator.config)}
    members = soup["ingredients"]
    betas = soup.get("betas", [1.0] * len(members))
    total: torch.Tensor | None = None
    for member, beta in zip(members, betas, strict=True):
        # One member at a time, so that 72 sets of logits never stand in memory together.
        term = member["weight"] * beta * member_logits(evaluator, pool[member["row"]], split)["logits"].double()
        total = term if total is None else total + term
    assert total is not None  # every recipe has an ingredient
    return total.float()


def describe(soup: dict[str, Any]) -> str:
    """One line about a soup or ensemble."""
    score, rows = soup["held_out"], [member["row"] for member in soup["ingredients"]]
    chose = soup["selected_on"]["split"].replace("_", "-")
    what = f"rows {', '.join(map(str, rows))}" if len(rows) < 9 else f"{len(rows)} models"
    return f"{soup['recipe']}: {chose} {100 * score_of(score):.1f} % (n = {score['n']}), {what}"


def summary(config: Experiment, recipes: tuple[str, ...]) -> str:
    """One line about each output of these recipes, all of which are made."""
    names = [name for recipe in recipes for name in outputs_of(config, recipe)]
    return "\n".join(describe(read_json(RunFolder.of(config).soup(name) / "soup.json")) for name in names)


def make_soup_in_worker(config: Experiment, name: str, split: str) -> None:
    """`make_soup` in a worker process."""
    make_soup(name, Evaluator(config), split)


def is_made(config: Experiment, name: str, split: str | None = None) -> bool:
    """Whether an output is there, from this pool and with these settings, selected on held-out or on `split`."""
    split = split or config.task.held_out
    path = place_of(config, name, split) / "soup.json"
    if not path.exists():
        return False
    digest = Evaluator(config).split(split).digest
    return bool(read_json(path)["identity"] == identity_of(config, name, pool_of(config, name), digest))


def make_soups(
    config: Experiment, recipes: tuple[str, ...], console: Console | None = None, split: str | None = None
) -> None:
    """Make what is not made yet, over the cluster's worker processes; interpolations come after their soups.

    The console shows progress; `split` selects, held-out where None.
    """
    split = split or config.task.held_out
    names = [name for recipe in recipes for name in outputs_of(config, recipe)]
    later = [name for name in names if name == "wise_ft"]
    for batch in ([name for name in names if name not in later], later):
        missing = [name for name in batch if not is_made(config, name, split)]
        # The longest first, so that no worker is left alone with one at the end.
        slow = ("greedy_with_replacement", "learned", "greedy")
        missing.sort(key=lambda name: next((i for i, part in enumerate(slow) if name.startswith(part)), len(slow)))
        spread(
            f"making {len(missing)} soups and ensembles",
            [partial(make_soup_in_worker, config, name, split) for name in missing],
            workers=config.cluster.workers,
            threads=config.cluster.threads,
            units=len(missing),
            done_units=partial(_records, config, missing, split),
            report=None,  # `summary` has their lines, in order
            console=console or Console(),
        )


def _records(config: Experiment, names: list[str], split: str) -> int:
    return sum((place_of(config, name, split) / "soup.json").exists() for name in names)
