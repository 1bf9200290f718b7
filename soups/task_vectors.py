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


def ties(
    start: Source,
    models: Models,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    *,
    weights: Sequence[float] | None = None,
    per: str = "model",
    normalize: bool = True,
    **settings: Any,
) -> Soup:
    """Of each model's changes from the initialisation the largest; where their signs agree, the mean of those.

    Args:
        start: the initialisation.
        models: fine-tuned from it.
        density: share of each model's changes that is kept, in (0, 1]; one number, or one for each model.
        scale: what the merged changes are multiplied by.
        weights: of the models, in their order; equal if None.
        per: "model" ranks all changes of a model together; "tensor" those of each tensor, as mergekit does: exactly the
            share is kept, and where the changes sum to zero the positive ones are taken.
        normalize: divide by the weights of those that agree; else they are summed.
        settings: of the averaging.

    Source: Yadav et al. 2023, Algorithm 1.
    """
    more: dict[str, Any] = {"weights": weights, "per": per, "normalize": normalize}
    return _merged("ties", start, models, settings, scale=scale, density=density, **more)


def dare(
    start: Source,
    models: Models,
    density: float | Sequence[float] = 0.1,
    scale: float = 1.0,
    seed: int = 0,
    *,
    scales: Sequence[float] | None = None,
    rescale: str = "density",
    **settings: Any,
) -> Soup:
    """The initialisation plus the mean of the models' changes, of which chance leaves a share, scaled up.

    Args:
        start: the initialisation.
        models: fine-tuned from it.
        density: share of each model's changes that is kept, in (0, 1]; 1 - p of the paper. One, or one for each model.
        scale: what the mean change is multiplied by.
        seed: of the choice.
        scales: what each model's change is multiplied by, in their order, for their sum in place of the mean.
        rescale: how what is left is scaled up: "density" divides by it; "l1" gives each tensor's changes the sum of
            magnitudes that they had, as mergekit does; "none" leaves them.
        settings: of the averaging.

    Source: Yu et al. 2024, equation 3.
    """
    if rescale not in ("density", "l1", "none"):
        raise UserError(f"rescale={rescale!r}: write density, l1 or none")
    more: dict[str, Any] = {"scales": scales, "seed": seed, "rescale": rescale}
    return _merged("dare", start, models, settings, scale=scale, density=density, **more)


def _merged(
    recipe: str,
    start: Source,
    models: Models,
    settings: Mapping[str, Any],
    *,
    scales: Sequence[float] | None = None,
    scale: float = 1.0,
    density: float | Sequence[float] = 1.0,
    weights: Sequence[float] | None = None,
    per: str = "model",
    **more: Any,
) -> Soup:
    """A soup on changes from the initialisation; `more` are fields of `Merging`."""
    pool, how, first = open_pool(models, settings, start)
    assert first is not None  # start is one
    begin, names = first.names[0], pool.names
    if how.kept_from is not None and how.kept_from not in [*first.paths, *pool.paths]:
        raise UserError(f"--from {how.kept_from}: of {recipe} it is one of the models or the initialisation")

    def for_each(name: str, values: Sequence[float]) -> dict[str, float]:
        if len(values) != len(pool):
            raise UserError(f"{name}: need one for each of {len(pool)} models, got {len(values)}")
        if not all(map(isfinite, values)):
            raise UserError(f"{name}: need finite numbers, got {list(values)}")
        return dict(zip(names, map(float, values), strict=True))

    kept = for_each("density", density) if isinstance(density, Sequence) else density
    for share in kept.values() if isinstance(kept, dict) else [kept]:
        if not 0 < share <= 1:
            raise UserError(f"density is a share in (0, 1], got {share}")
    if per not in ("model", "tensor"):
        raise UserError(f"per={per!r}: write model or tensor")
    equal = [scale / len(pool) if recipe == "dare" else scale] * len(pool)
    each = equal if scales is None else [scale * one for one in scales]
    factors, shares_of = for_each("scales", each), {} if weights is None else for_each("weights", weights)
    merging = Merging(recipe, factors, kept, weights=shares_of, per=per, **more)
    usual, always = Merging("", {}), {"arithmetic": (), "ties": ("density",), "dare": ("density", "seed")}[recipe]
    values = {name: value for name, value in vars(merging).items() if name in always or value != getattr(usual, name)}
    note = {"init": begin, **values}
    note.pop("recipe")  # which stands in every note
    shares: dict[str, float | None] = dict.fromkeys([begin, *names])
    if recipe == "arithmetic":
        shares = {begin: 1 - fsum(each), **merging.scales}
    rest = [0.0, *[1.0] * len(pool)]  # weights of what is no task vector
    return Soup(recipe, pool, writer(pool, rest, how, start=first, merging=merging), shares, note)
