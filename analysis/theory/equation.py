"""Soups beside ensembles of two models (Section 4, Appendix K): what is true, and what the paper's formula says of it.

On the segment theta_a = (1 - a) theta_0 + a theta_1 the soup answers f(x; theta_a) and the ensemble answers
(1 - a) f(x; theta_0) + a f(x; theta_1). Losses are cross-entropies of beta times these logits, in nats.

Networks with kinks (relu, relu6) have second derivatives that hold only between two kinks: how the slope changes at
one is no part of f'', however many kinks lie close together. For those, central differences (`on_grid`) see what the
exact derivative (`line_at`) does not.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.theory.derivatives import along
from eval.calibration import fit_beta
from eval.metrics import check, top1
from soups.average import mixture
from soups.files.weights import Weights

AT_ONCE = 2**22  # logits that are widened to float64 at once: 32 MiB


def soup_at(pair: tuple[Weights, Weights], alpha: float) -> dict[str, Tensor]:
    """The soup (1 - alpha) theta_0 + alpha theta_1, summed in float64; alpha may be outside [0, 1].

    Raises:
        UserError: the two do not fit together, or hold NaN or infinity.
    """
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
    """Exactly d^2/da^2 of the mean loss at fixed beta: no further forward pass.

    It is the mean of beta (p - e_y)^T f'', how the logits curve, and of beta^2 Var_{Y ~ p}[f'_Y], what is left where
    they are straight.

    Args:
        line: (N, C) logits and their two derivatives by alpha, from `line_at`.
        labels: (N,) class ids.
        beta: the inverse temperature.

    Source: Appendix K.1; the chain rule with gradient p - e_y and Hessian diag(p) - p p^T of the cross-entropy.
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
    """d^2/da^2 of a loss that is known at equidistant alphas.

    Args:
        losses: at 3 alphas or more.
        place: which of them; neither the first nor the last.
        step: between two alphas.

    Returns:
        The second difference, and the size of what it leaves out, step^2 / 12 times the fourth derivative, told by the
        five points around (the five nearest, at a border); None with fewer than five. Rounding of the losses comes on
        top: 4 / step^2 of theirs.

    Raises:
        ValueError: a place without neighbours.
    """
    if not 0 < place < len(losses) - 1:
        raise ValueError(f"central differences need a neighbour on either side; place {place} of {len(losses)}")
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
    """All numbers of one pair, alpha and split: a marker in each panel of Figure K.1.

    Args:
        alpha: of the soup, in [0, 1].
        ends: (N, C) logits of the two models.
        soup: (N, C) logits of their soup at alpha.
        labels: (N,) class ids.
        curved: beta -> d^2/da^2 of the soup's loss, and its error where that is known.

    Returns:
        alpha, n, soup_error, ensemble_error (fractions), and under `calibrated` (the beta that minimises the soup's
        loss) and `plain` (beta = 1): beta, soup_loss, ensemble_loss, curvature, curvature_error, and the two terms of
        (1), whose sum approximates the loss of the soup minus that of the ensemble. The convexity_term is in favour of
        the soup where its loss is convex along the segment; the variance_term, at least 0, is in favour of the
        ensemble, unless the two models agree or the soup is confident.

    Raises:
        ValueError: alpha out of range, or as `eval.metrics.check`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is between the two models, in [0, 1], got {alpha}")
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
    """`compare` by central differences, from cached logits of one pair's soups alone: no forward pass.

    Args:
        logits: (N, C) of the soups at A equidistant alphas from 0 to 1, so that the first and last are the two models.
        labels: (N,) class ids.

    Returns:
        A - 2 points; at the ends soup and ensemble are the same model, and both sides of (1) are 0.
    """
    step, ends = 1 / (len(logits) - 1), (logits[0], logits[-1])

    @cache
    def losses(beta: float) -> list[float]:
        return [loss(each, labels, beta) for each in logits]

    def curved(place: int, beta: float) -> tuple[float, float | None]:
        return central_difference(losses(beta), place, step)

    return [compare(i * step, ends, logits[i], labels, partial(curved, i)) for i in range(1, len(logits) - 1)]


# ---- of networks


def line_at(
    network: nn.Module,
    pair: tuple[Weights, Weights],
    alpha: float,
    batches: Iterable[Tensor],
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the soup at alpha and their exact derivatives along the segment, each (N, C) on the CPU; see `along`.

    Args:
        network: put in evaluation mode; its own weights are not touched.
        pair: theta_0 and theta_1.
        alpha: of the soup.
        batches: of inputs.
        project: from the network's logits to the label space of the split, linear or a maximum over classes.

    Raises:
        ValueError: weights that are not this network's; one that is too many or missing is named.
        UserError: models that do not fit together, or an operation whose second derivative torch does not know; take
            `on_grid` then.
    """
    network.eval()
    _check(network, pair[0])
    device = next(network.parameters()).device
    soup, step = ({n: t.to(device) for n, t in each.items()} for each in (soup_at(pair, alpha), direction(pair)))
    found = [along(network, soup, step, batch.to(device), project) for batch in batches]
    value, first, second = (torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True))
    return value, first, second


def _check(network: nn.Module, weights: Weights) -> None:
    """Refuse weights of another network, and what would leave a tensor as the network happens to have it."""
    parameters, buffers = network.named_parameters(remove_duplicate=False), network.named_buffers()
    own = {name: id(tensor) for name, tensor in (*parameters, *buffers)}
    unknown = sorted(weights.keys() - own.keys())
    given = {own[name] for name in weights if name in own}
    missing = [name for name in network.state_dict() if own[name] not in given]
    if unknown or missing:
        raise ValueError(f"these weights are not this network's: {(unknown + missing)[0]!r} is in one of them alone")
