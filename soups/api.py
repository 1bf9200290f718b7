"""The recipes as functions of models in any form: paths, patterns, dicts, modules, loaders, in any mixture.

`import soups` has them, as in `soups.greedy("run/*.ckpt", score=wer, goal="min").save("soup/")`. `start` is the
initialisation that models were fine-tuned from. Beside its own settings each recipe takes those of
`soups.averaging.open_pool`: dtype, batch_norm, init, key, exclude, only_common, allow_unrelated, threads and base; and
`images=soups.images(...)`, on which batch_norm="recompute" measures.
"""

from collections.abc import Mapping, Sequence
from math import fsum, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soups.along import shares
from soups.averaging import Averaging, Models, by_tensor, open_pool, writer
from soups.conformance import common_layout
from soups.errors import UserError, one_of
from soups.files.opening import opened
from soups.files.reading import Reading
from soups.geometry import slerp_weights
from soups.merging import Merging, undivided
from soups.scored import choices, greedy, images, learned, perplexity, random_order, texts, user_loss, with_replacement
from soups.soup import Soup
from soups.sources import Pool, Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Soup", "UserError", "load"]
__all__ += ["arithmetic", "dare", "model_stock", "slerp", "ties", "uniform", "weighted", "wise_ft"]
__all__ += ["greedy", "learned", "random_order", "user_loss", "with_replacement"]
__all__ += ["choices", "images", "perplexity", "texts"]  # held-out examples


def _mixed(recipe: str, pool: Pool, weights: Sequence[float], how: Averaging, *, normalize: bool = True) -> Soup:
    total = fsum(weights) if normalize else 1.0
    shares = {name: weight / total for name, weight in zip(pool.names, weights, strict=True)}
    note = {} if normalize else {"normalize": False}
    return Soup(recipe, pool, writer(pool, list(weights), how, merging=None if normalize else undivided), shares, note)


def load(path: str | Path, *, key: str | None = None) -> "Mapping[str, Tensor]":
    """The weights of a file or folder, whatever wrote it: a mapping that reads each tensor when it is asked for."""
    from soups.files.weights import LazyWeights  # noqa: PLC0415  # torch takes seconds

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

    t = 0 is the first model. Tensors at a cosine of more than 0.9995, and batch-norm statistics, are interpolated on
    the line between them.

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

    `batch_norm="keep"` keeps the statistics of `start`.
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
    """Between the initialisation and the mean of at least two models, tensor by tensor, as the angles between them say.

    Source: Jang et al. 2024, Section 4.
    """
    from soups.files.weights import LazyWeights  # noqa: PLC0415
    from soups.stock import ratio, stock_cosines, stock_row  # noqa: PLC0415

    pool, how, first = open_pool(models, settings, start)
    assert first is not None  # start is one
    if len(pool) < 2:
        raise UserError("model_stock needs at least two fine-tuned models, whose angle says how far to go")
    with opened([*first.paths, *pool.paths], pool.reading) as checkpoints:
        begin, *ends = [LazyWeights(checkpoint) for checkpoint in checkpoints]
        ratios = {name: ratio(cosine, len(pool)) for name, cosine in stock_cosines(begin, ends, pool.reading).items()}
    weights = by_tensor(pool, first.paths, lambda name: stock_row(ratios.get(name, 1.0), len(pool)))
    shares: dict[str, float | None] = dict.fromkeys([first.names[0], *pool.names])
    note = {"init": first.names[0], "mean_ratio": fsum(ratios.values()) / max(1, len(ratios))}
    return Soup("model_stock", pool, writer(pool, weights, how, start=first), shares, note)


def arithmetic(start: Source, models: Models, scales: Sequence[float], **settings: Any) -> Soup:
    """The initialisation plus scaled changes of the models from it; a negative scale takes a task away.

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
        density: share of each model's changes that is kept, in (0, 1]; one number, or one for each model.
        scale: what the merged changes are multiplied by.
        weights: of the models, in their order; equal if None.
        per: "model" ranks all changes of a model together; "tensor" those of each tensor, as mergekit does: exactly the
            share is kept, and where the changes sum to zero the positive ones are taken.
        normalize: divide by the weights of those that agree; else they are summed.

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
        density: share of each model's changes that is kept, in (0, 1]; 1 - p of the paper. One, or one for each model.
        scale: what the mean change is multiplied by.
        scales: what each model's change is multiplied by, in their order, for their sum in place of the mean.
        rescale: how what is left is scaled up: "density" divides by it; "l1" gives each tensor's changes the sum of
            magnitudes that they had, as mergekit does; "none" leaves them.

    Source: Yu et al. 2024, equation 3.
    """
    one_of("rescale", rescale, "density", "l1", "none")
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

    kept = density if isinstance(density, (int, float)) else for_each("density", density)
    for share in kept.values() if isinstance(kept, dict) else [kept]:
        if not 0 < share <= 1:
            raise UserError(f"density is a share in (0, 1], got {share}")
    one_of("per", per, "model", "tensor")
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
