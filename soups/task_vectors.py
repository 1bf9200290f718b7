"""Recipes on task vectors, the models' changes from one initialisation; `soups.merging` has what they compute.

Each takes the initialisation, the models that were fine-tuned from it, and the settings of the averaging, where
`batch_norm="keep"` keeps the statistics of the initialisation. A UserError says what is out of range, or which models
do not fit together.
"""

from collections.abc import Mapping, Sequence
from math import fsum, isfinite
from typing import Any

from soups.averaging import Models, open_pool, writer
from soups.errors import UserError
from soups.merging import Merging
from soups.soup import Soup
from soups.sources import Source


def arithmetic(start: Source, models: Models, scales: Sequence[float], **settings: Any) -> Soup:
    """The initialisation plus scaled changes of the models from it; a negative scale takes a task away.

    Args:
        start: the initialisation.
        models: fine-tuned from it, in the order of `scales`.
        scales: one finite number for each model.
        settings: of the averaging.

    Source: Ilharco et al. 2023, Section 2.
    """
    return _merged("arithmetic", start, models, settings, scales=[float(scale) for scale in scales])


def ties(start: Source, models: Models, density: float = 0.2, scale: float = 1.0, **settings: Any) -> Soup:
    """Of each model's changes from the initialisation the largest; where their signs agree, the mean of those.

    Args:
        start: the initialisation.
        models: fine-tuned from it.
        density: share of each model's changes that is kept, in (0, 1].
        scale: what the merged changes are multiplied by.
        settings: of the averaging.

    Source: Yadav et al. 2023, Algorithm 1.
    """
    return _merged("ties", start, models, settings, scale=scale, density=density)


def dare(
    start: Source, models: Models, density: float = 0.1, scale: float = 1.0, seed: int = 0, **settings: Any
) -> Soup:
    """The initialisation plus the mean of the models' changes, of which chance leaves a share, scaled up.

    Args:
        start: the initialisation.
        models: fine-tuned from it.
        density: share of each model's changes that is kept, in (0, 1]; 1 - p of the paper.
        scale: what the mean change is multiplied by.
        seed: of the choice.
        settings: of the averaging.

    Source: Yu et al. 2024, equation 3.
    """
    return _merged("dare", start, models, settings, scale=scale, density=density, seed=seed)


def _merged(
    recipe: str,
    start: Source,
    models: Models,
    settings: Mapping[str, Any],
    *,
    scales: Sequence[float] | None = None,
    scale: float = 1.0,
    density: float = 1.0,
    seed: int = 0,
) -> Soup:
    """A soup on changes from the initialisation."""
    pool, how, first = open_pool(models, settings, start)
    assert first is not None  # start is one
    if scales is not None and len(scales) != len(pool):
        raise UserError(f"scales: need one for each of {len(pool)} models, got {len(scales)}")
    if not 0 < density <= 1:
        raise UserError(f"density is a share in (0, 1], got {density}")
    each = [scale / len(pool) if recipe == "dare" else scale] * len(pool) if scales is None else list(scales)
    if not all(map(isfinite, each)):
        raise UserError(f"scales: need finite numbers, got {each}")
    begin, names = first.names[0], pool.names
    merging = Merging(recipe, dict(zip(names, each, strict=True)), density, seed)
    note: dict[str, Any] = {"init": begin, "scales": dict(merging.scales)}
    note |= {"density": density} if recipe != "arithmetic" else {}
    note |= {"seed": seed} if recipe == "dare" else {}
    weights = [0.0, *[1.0] * len(pool)]  # of what is no task vector
    shares: dict[str, float | None] = dict.fromkeys([begin, *names])
    if recipe == "arithmetic":
        shares = {begin: 1 - fsum(each), **merging.scales}
    return Soup(recipe, pool, writer(pool, weights, how, start=first, merging=merging), shares, note)
