"""A weighted mean of models whose weights may differ from tensor to tensor."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from soups.average import Average, rounded
from store.weights import Weights

Loader = Callable[[], Weights]


def check_names(models: Sequence[Weights]) -> None:
    """Refuse models that do not have the same tensors.

    Raises:
        ValueError: no models, or one lacks a tensor that another has.
    """
    if not models:
        raise ValueError("a recipe needs at least one model")
    for model in models[1:]:
        only = sorted(models[0].keys() ^ model.keys())
        if only:
            raise ValueError(f"models with different parameters cannot be averaged; {only[0]!r} is not in all of them")


def mixture(models: Sequence[Weights], coefficients: Callable[[str], Sequence[float]]) -> dict[str, Tensor]:
    """The weighted sum of K models, tensor by tensor, with the checks and the rules for integers of `Average`.

    Args:
        models: K models. A mapping that reads a tensor when asked keeps one tensor of each in memory, not K models.
        coefficients: the K numbers of a tensor of this name, which sum to 1; not asked for integer and bool tensors.

    Returns:
        Every tensor summed in float64 and rounded once, to the dtype it came in. Tied tensors come out equal, each
        with memory of its own.

    Raises:
        ValueError: no models; keys, shapes, dtypes or integer buffers differ; a tensor holds NaN or infinity.
    """
    check_names(models)
    return {name: _mixed(name, models, coefficients) for name in models[0]}


def _mixed(name: str, models: Sequence[Weights], coefficients: Callable[[str], Sequence[float]]) -> Tensor:
    average: Average | None = None
    dtype: torch.dtype | None = None
    shares: Sequence[float] = ()
    for i, model in enumerate(models):
        tensor = model[name]
        if dtype is None:
            dtype, shares = tensor.dtype, coefficients(name) if tensor.is_floating_point() else ()
        if tensor.dtype != dtype:
            raise ValueError(f"parameter {name!r}: {dtype} and {tensor.dtype}")
        # The mean of K x share x tensor is the weighted sum, so all that Average checks is checked here too.
        term = {name: tensor.double() * (shares[i] * len(models)) if tensor.is_floating_point() else tensor}
        average = Average.of(term) if average is None else average.plus(term)
    assert average is not None and dtype is not None  # check_names saw at least one model
    mean = average.weights()[name]
    return rounded(mean, dtype) if dtype.is_floating_point else mean
