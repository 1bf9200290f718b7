"""Soups of one's own checkpoints: no experiment, no model code, no torch unless a file needs it."""

import glob
from collections import Counter
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import OwnPool
from soups.files import FileSoup, average_files
from soups.refusals import refuse_unsuitable


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    root = Path(path.anchor)
    return sorted(root.glob(str(path.relative_to(root))))


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """Files that the patterns name, sorted within each.

    Raises:
        UserError: a pattern without a file, or a file named twice.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise UserError(f"ingredients: no file matches {pattern!r}")
        found += matches
    twice = [path for path, count in Counter(path.resolve() for path in found).items() if count > 1]
    if twice:
        raise UserError(f"ingredients: {twice[0].name} is named twice; to count it double, use recipe=weighted")
    return found


def cook_files(pool: OwnPool) -> FileSoup:
    """Cook and write the soup of `python -m soups recipe=... ingredients=[...] out=...`.

    Raises:
        UserError: as `refuse_unsuitable` and `average_files`; a pattern that matches nothing; `out` or `init` is an
            ingredient.
    """
    paths = expand(pool.ingredients)
    weights: list[float] = [1.0] * len(paths) if pool.weights is None else list(pool.weights)
    note: dict[str, Any] = {"recipe": pool.recipe, "batch_norm": pool.batch_norm}
    if pool.unrelated == "average":
        note["unrelated"] = pool.unrelated
    if len(weights) != len(paths):
        raise UserError(f"weights: need one per ingredient, got {len(weights)} for {len(paths)}")
    if pool.out.exists() and pool.out.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"out={pool.out} is one of the ingredients, and would be overwritten")
    keep_from = None
    if pool.init is not None:
        if pool.init.resolve() in [path.resolve() for path in paths]:
            raise UserError(f"init={pool.init} is one of the ingredients too")
        start = 0.0
        if pool.recipe == "wise_ft":
            start = 1 - pool.alpha
            weights = [pool.alpha / len(paths)] * len(paths)
            note |= {"alpha": pool.alpha, "init": pool.init.name}
        paths, weights = [pool.init, *paths], [start, *weights]
        keep_from = 0 if pool.batch_norm == "keep" else None
    refuse_unsuitable(paths, unrelated=pool.unrelated == "average")
    return average_files(
        paths, pool.out, weights=weights, dtype=pool.dtype, keep_from=keep_from, threads=pool.threads, note=note
    )


def describe(soup: FileSoup) -> str:
    """What was written, and what a reader would not guess, a line each."""
    used = [i for i in soup.ingredients if i.weight != 0]
    lines = [f"reads the {key!r} inside {name}" for name, key in sorted(soup.unwrapped.items())]
    names: dict[str, str] = {}
    for ingredient in soup.ingredients:
        same = names.setdefault(ingredient.digest, ingredient.file)
        if same != ingredient.file:
            lines.append(f"{ingredient.file} and {same} are the same model, which counts twice")
    lines += [f"{name} is tied to {kept} and written once" for name, kept in soup.layout.ties.items()]
    return "\n".join([*lines, f"{soup.path}: {len(used)} models of {soup.layout.parameters:,} parameters"])


def run(pool: OwnPool) -> None:
    """The command."""
    if pool.recipe == "greedy":
        # Imported here, since no other recipe needs torch and timm, which take seconds.
        from soups.own_greedy import cook_greedy  # noqa: PLC0415

        print(describe(cook_greedy(pool, expand(pool.ingredients))))
    else:
        print(describe(cook_files(pool)))
