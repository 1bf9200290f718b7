"""Soups beside ensembles of two models (Section 4, Appendix K): the truth, and the paper's approximation (1) of it.

On the segment theta_a = (1 - a) theta_0 + a theta_1 the soup answers f(x; theta_a) and the ensemble answers
(1 - a) f(x; theta_0) + a f(x; theta_1). Losses are cross-entropies of beta times these logits, in nats.

In networks with kinks (relu, relu6) the exact derivative (`line_at`) misses how the slope changes at a kink; central
differences (`on_grid`) see it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from configs.errors import UserError
from eval.calibration import fit_beta
from eval.metrics import check, top1
from soups.average import mixture
from soups.files.weights import Weights

AT_ONCE = 2**22  # logits that are widened to float64 at once: 32 MiB


def soup_at(pair: tuple[Weights, Weights], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) theta_0 + alpha theta_1, summed in float64; raises as `soups.average.mixture`."""
    return mixture(pair, lambda name: (1 - alpha, alpha))


def direction(pair: tuple[Weights, Weights]) -> dict[str, Tensor]:
    """theta_1 - theta_0 of every floating-point tensor, buffers among them, subtracted in float64."""
    start, end = pair
    return {n: (end[n].double() - t.double()).to(t.dtype) for n, t in start.items() if t.is_floating_point()}


# ---- of logits alone


def loss(logits: Tensor, labels: Tensor, beta: float) -> float:
    """Mean cross-entropy of beta x logits, in float64; raises as `eval.metrics.check`."""
    check(logits, labels)
    parts = _rows(logits, labels)
    return sum(F.cross_entropy(beta * f, y, reduction="sum").item() for f, y in parts) / len(labels)


def variance(logits: Tensor, values: Tensor, beta: float) -> float:
    """The mean over N examples of Var_{Y ~ softmax(beta logits)}[values_Y]; both (N, C)."""
    return sum(_variances((beta * f).softmax(dim=1), v).sum().item() for f, v in _rows(logits, values)) / len(logits)


def curvature(line: tuple[Tensor, Tensor, Tensor], labels: Tensor, beta: float) -> float:
    """Exactly d^2/da^2 of the mean loss at fixed beta, from (N, C) logits and their two derivatives by alpha.

    It is the mean of beta (p - e_y)^T f'', how the logits curve, and of beta^2 Var_{Y ~ p}[f'_Y], what is left where
    they are straight (Appendix K.1).
    """
    check(line[0], labels)
    bend = spread = 0.0
    for f, f1, f2, y in _rows(*line, labels):
        p = (beta * f).softmax(dim=1)
        bend += beta * ((p * f2).sum() - f2.gather(1, y.unsqueeze(1)).sum()).item()
        spread += beta**2 * _variances(p, f1).sum().item()
    return bend / len(labels) + spread / len(labels)


def _variances(p: Tensor, values: Tensor) -> Tensor:
    """(N,) of Y ~ p, both (N, C); from centred values, so that it is not the difference of two large numbers."""
    centred = values - (p * values).sum(dim=1, keepdim=True)
    return (p * centred.square()).sum(dim=1)


def _rows(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time; floats as float64, class ids as int64."""
    rows = max(1, AT_ONCE // logits.shape[1])
    for parts in zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True):
        yield tuple(part.double() if part.is_floating_point() else part.long() for part in parts)


def central_difference(losses: Sequence[float], place: int, step: float) -> tuple[float, float | None]:
    """d^2/da^2 of a loss that is known at equidistant alphas, at one that is neither the first nor the last.

    Beside it the size of what it leaves out, step^2 / 12 times the fourth derivative, from the five nearest points;
    None with fewer than five. Rounding of the losses comes on top: 4 / step^2 of theirs.
    """
    second = float(np.diff(losses[place - 1 : place + 2], 2)[0]) / step**2
    if len(losses) < 5:
        return second, None
    begin = min(max(place - 2, 0), len(losses) - 5)
    fourth = float(np.diff(losses[begin : begin + 5], 4)[0])
    return second, abs(fourth) / (12 * step**2)


def compare(
    alpha: float,
    ends: tuple[Tensor, Tensor],
    soup: Tensor,
    labels: Tensor,
    curved: Callable[[float], tuple[float, float | None]],
) -> dict[str, Any]:
    """All numbers of one pair, alpha in [0, 1] and split: a marker in each panel of Figure K.1.

    `ends` and `soup` are (N, C) logits of the two models and of their soup; `curved` is beta -> d^2/da^2 of the soup's
    loss, and its error where that is known.

    Returns:
        alpha, n, soup_error, ensemble_error (fractions), and under `calibrated` (the beta that minimises the soup's
        loss) and `plain` (beta = 1) beta, soup_loss, ensemble_loss, curvature, curvature_error, and the two terms of
        (1), convexity_term and variance_term, whose sum approximates the loss of the soup minus that of the ensemble.
    """
    start, end = (each.double() for each in ends)
    both, moved, half = (1 - alpha) * start + alpha * end, end - start, alpha * (1 - alpha) / 2

    def at(beta: float) -> dict[str, float | None]:
        second, error = curved(beta)
        return {
            "beta": beta,
            "soup_loss": loss(soup, labels, beta),
            "ensemble_loss": loss(both, labels, beta),
            "curvature": second,
            "curvature_error": error,
            "convexity_term": -half * second,
            "variance_term": half * beta**2 * variance(soup, moved, beta),
        }

    errors = {"soup_error": 1 - top1(soup, labels), "ensemble_error": 1 - top1(both, labels)}
    betas = {"calibrated": at(fit_beta(soup, labels)), "plain": at(1.0)}
    return {"alpha": alpha, "n": len(labels)} | errors | betas


def on_grid(logits: Sequence[Tensor], labels: Tensor) -> list[dict[str, Any]]:
    """`compare` by central differences, from (N, C) logits of one pair's soups at A equidistant alphas from 0 to 1.

    There are A - 2 points: at the ends soup and ensemble are the same model, and both sides of (1) are 0.
    """
    step, ends = 1 / (len(logits) - 1), (logits[0], logits[-1])

    @cache
    def losses(beta: float) -> list[float]:
        return [loss(each, labels, beta) for each in logits]

    def curved(place: int, beta: float) -> tuple[float, float | None]:
        return central_difference(losses(beta), place, step)

    return [compare(i * step, ends, logits[i], labels, partial(curved, i)) for i in range(1, len(logits) - 1)]


# ---- of networks


class _WrittenOut(TorchFunctionMode):
    """Norms as sums and products: torch 2.14 is silently wrong in layer norms, and lets no running statistics move."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.instance_norm:
            raise NotImplementedError("instance norm")
        return {F.layer_norm: _layer_norm, F.batch_norm: _batch_norm}.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    normal = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return normal * (1 if weight is None else weight) + (0 if bias is None else bias)


def _batch_norm(
    x: Tensor, mean: Any, variance: Any, *, weight: Any, bias: Any, training: bool, eps: float, **_: Any
) -> Tensor:
    if training:
        raise NotImplementedError("statistics of a batch")
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return x * scale.view(-1, *(1,) * (x.ndim - 2)) + shift.view(-1, *(1,) * (x.ndim - 2))


def along(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    inputs: Tensor,
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' = d^2/dt^2 f(inputs; weights + t direction) at t = 0, by torch's forward mode within itself.

    At the kink of a relu the derivative is that of one side, and what the slope jumps by there is no part of f''. The
    network is put in evaluation mode, and its own weights are not touched: `weights` has every parameter and buffer by
    name, of tied ones one. What `direction` lacks does not move. `project` is applied to the answer.

    Raises:
        UserError: an operation whose second derivative torch does not know, which is named.
    """
    network.eval()

    def answer(moved: dict[str, Tensor]) -> Tensor:
        logits: Tensor = torch.func.functional_call(network, {**weights, **moved}, (inputs,), strict=False)
        return logits if project is None else project(logits)

    def with_slope(moved: dict[str, Tensor]) -> Any:
        return torch.func.jvp(answer, (moved,), (direction,))

    try:
        with sdpa_kernel(SDPBackend.MATH), _WrittenOut():
            found: Any = torch.func.jvp(with_slope, ({n: weights[n].detach() for n in direction},), (direction,))
    except NotImplementedError as error:
        unknown = str(error).partition(" that ")[0].removeprefix("Trying to use forward AD with ")
        raise UserError(f"no second derivative of {unknown}: take analysis.theory.curvature=differences") from error
    (value, first), (_, second) = found
    return value, first, second


def line_at(
    network: nn.Module,
    pair: tuple[Weights, Weights],
    alpha: float,
    batches: Iterable[Tensor],
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C) logits of the soup at alpha and their two exact derivatives along the segment, on the CPU; see `along`.

    The network is given the weights of theta_0. `project` is linear or a maximum over classes.

    Raises:
        RuntimeError: weights that are not this network's; those that are too many or missing are named.
        UserError: as `along` and `soup_at`.
    """
    network.load_state_dict(dict(pair[0]), strict=True)
    device = next(network.parameters()).device
    soup, step = ({n: t.to(device) for n, t in each.items()} for each in (soup_at(pair, alpha), direction(pair)))
    found = [along(network, soup, step, batch.to(device), project) for batch in batches]
    logits, slope, bend = (torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True))
    return logits, slope, bend
