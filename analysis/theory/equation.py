"""Soups beside ensembles of two models (Section 4, Appendix K): what is true, and what the paper's formula says of it.

On the segment theta_a = (1 - a) theta_0 + a theta_1 the soup answers f(x; theta_a) and the ensemble answers
(1 - a) f(x; theta_0) + a f(x; theta_1). Losses are cross-entropies of beta times these logits, in nats.

Networks with kinks (relu, relu6) have second derivatives that hold only between two kinks: how the slope changes at
one is no part of f'', however many kinks lie close together. For those, central differences (`on_grid`) see what the
exact derivative (`compare`) does not, and the integral of f'' is not the whole logit difference.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.theory.derivatives import along
from eval.calibration import fit_beta
from eval.metrics import check, top1
from soups.average import mixture
from soups.files.weights import Weights

Projection = Callable[[Tensor], Tensor]
AT_ONCE = 2**22  # logits that are widened to float64 at once: 32 MiB


@dataclass(frozen=True)
class Segment:
    """Two models of the same network, and the line between them."""

    start: Weights  # theta_0
    end: Weights  # theta_1

    def at(self, alpha: float) -> dict[str, Tensor]:
        """The soup (1 - alpha) start + alpha end, summed in float64; alpha may be outside [0, 1].

        Raises:
            ValueError: the two do not fit together, or hold NaN or infinity.
        """
        return mixture([self.start, self.end], lambda name: (1 - alpha, alpha))

    def direction(self) -> dict[str, Tensor]:
        """delta = end - start of every floating-point tensor, buffers among them, subtracted in float64."""
        floating = (name for name, tensor in self.start.items() if tensor.is_floating_point())
        return {n: (self.end[n].double() - self.start[n].double()).to(self.start[n].dtype) for n in floating}


@dataclass(frozen=True)
class Line:
    """Logits at a point of the segment and how they move along it: each (N, C), derivatives by alpha."""

    value: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Curvature:
    """d^2/da^2 of the mean loss at fixed beta, in its two parts."""

    bend: float  # mean of beta (p - e_y)^T f'', how the logits curve
    spread: float  # mean of beta^2 Var_{Y ~ p}[f'_Y], what is left where logits are straight; at least 0

    @property
    def total(self) -> float:
        """d^2/da^2 of the loss."""
        return self.bend + self.spread


@dataclass(frozen=True)
class Comparison:
    """Losses of soup and ensemble at one alpha and one beta, and approximation (1) of their difference."""

    alpha: float
    beta: float
    soup_loss: float
    ensemble_loss: float
    curvature: float  # d^2/da^2 of the soup's loss
    curvature_error: float | None  # estimated, of central differences with points enough; None of the exact one
    variance: float  # mean over x of Var_{Y ~ p(beta f(x; theta_a))}[f_Y(x; theta_1) - f_Y(x; theta_0)]

    @property
    def difference(self) -> float:
        """The truth: soup minus ensemble. Positive where the ensemble is better."""
        return self.soup_loss - self.ensemble_loss

    @property
    def convexity_term(self) -> float:
        """The first of (1): in favour of the soup where its loss is convex along the segment."""
        return -self.alpha * (1 - self.alpha) / 2 * self.curvature

    @property
    def variance_term(self) -> float:
        """The second of (1), at least 0: in favour of the ensemble, unless the two agree or the soup is confident."""
        return self.alpha * (1 - self.alpha) / 2 * self.beta**2 * self.variance

    @property
    def approximation(self) -> float:
        """Equation (1)."""
        return self.convexity_term + self.variance_term


@dataclass(frozen=True)
class Point:
    """All numbers of one pair, alpha and split: a marker in each panel of Figure K.1."""

    alpha: float
    n: int  # examples
    soup_error: float  # in [0, 1]
    ensemble_error: float
    calibrated: Comparison  # at the beta that minimises the soup's loss
    plain: Comparison  # at beta = 1

    @property
    def error_difference(self) -> float:
        """Soup minus ensemble. Positive where the ensemble is better."""
        return self.soup_error - self.ensemble_error


# ---- of logits alone


def ensemble(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """(N, C) logits (1 - alpha) first + alpha second, in float64."""
    return (1 - alpha) * first.double() + alpha * second.double()


def loss(logits: Tensor, labels: Tensor, beta: float) -> float:
    """Mean cross-entropy of beta x logits, in float64; raises as `eval.metrics.check`."""
    check(logits, labels)
    parts = _rows(logits, labels)
    return sum(F.cross_entropy(beta * f, y, reduction="sum").item() for f, y in parts) / len(labels)


def variance(logits: Tensor, values: Tensor, beta: float) -> float:
    """The mean over N examples of Var_{Y ~ softmax(beta logits)}[values_Y]; both (N, C)."""
    return sum(_variances((beta * f).softmax(dim=1), v).sum().item() for f, v in _rows(logits, values)) / len(logits)


def curvature(line: Line, labels: Tensor, beta: float) -> Curvature:
    """Exactly d^2/da^2 of the mean loss, from logits and their derivatives: no further forward pass.

    Source: Appendix K.1; the chain rule with gradient p - e_y and Hessian diag(p) - p p^T of the cross-entropy.
    """
    check(line.value, labels)
    bend = spread = 0.0
    for f, f1, f2, y in _rows(line.value, line.first, line.second, labels):
        p = (beta * f).softmax(dim=1)
        bend += beta * ((p * f2).sum() - f2.gather(1, y.unsqueeze(1)).sum()).item()
        spread += beta**2 * _variances(p, f1).sum().item()
    return Curvature(bend / len(labels), spread / len(labels))


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


def point(
    alpha: float,
    ends: tuple[Tensor, Tensor],
    soup: Tensor,
    labels: Tensor,
    curved: Callable[[float], tuple[float, float | None]],
) -> Point:
    """All numbers of one point, from logits.

    Args:
        alpha: of the soup.
        ends: (N, C) logits of the two models.
        soup: (N, C) logits of their soup at alpha.
        labels: (N,) class ids.
        curved: beta -> d^2/da^2 of the soup's loss, and its error where that is known.

    Raises:
        ValueError: as `eval.metrics.check`.
    """
    both = ensemble(*ends, alpha)
    moved = ends[1].double() - ends[0].double()

    def at(beta: float) -> Comparison:
        losses = loss(soup, labels, beta), loss(both, labels, beta)
        return Comparison(alpha, beta, *losses, *curved(beta), variance(soup, moved, beta))

    errors = 1 - top1(soup, labels), 1 - top1(both, labels)
    return Point(alpha, len(labels), *errors, at(fit_beta(soup, labels)), at(1.0))


def on_grid(logits: Sequence[Tensor], labels: Tensor) -> list[Point]:
    """The points of one pair by central differences, from cached logits of its soups alone: no forward pass.

    Args:
        logits: (N, C) of the soups at A equidistant alphas from 0 to 1, so that the first and last are the two models.
        labels: (N,) class ids.

    Returns:
        A - 2 points; at the ends soup and ensemble are the same model, and both sides of (1) are 0.
    """
    step = 1 / (len(logits) - 1)

    def curved(place: int, beta: float) -> tuple[float, float | None]:
        begin = min(max(place - 2, 0), max(len(logits) - 5, 0))
        near = [loss(each, labels, beta) for each in logits[begin : begin + 5]]
        return central_difference(near, place - begin, step)

    ends = logits[0], logits[-1]
    return [
        point(i * step, ends, logits[i], labels, lambda beta, i=i: curved(i, beta))  # type: ignore[misc]
        for i in range(1, len(logits) - 1)
    ]


# ---- of networks


@torch.no_grad()
def logits_at(
    network: nn.Module, weights: Weights, batches: Iterable[Tensor], project: Projection | None = None
) -> Tensor:
    """(N, C) logits on the CPU of a network with these weights, in evaluation mode; its own are not touched.

    Raises:
        ValueError: weights that are not the network's.
    """
    network.eval()
    _check(network, weights)
    here = _beside(network, weights)
    found = (torch.func.functional_call(network, here, (_to(network, batch),), strict=False) for batch in batches)
    return torch.cat([(logits if project is None else project(logits)).cpu() for logits in found])


def line_at(
    network: nn.Module, segment: Segment, alpha: float, batches: Iterable[Tensor], project: Projection | None = None
) -> Line:
    """Logits of the soup at alpha and their exact derivatives along the segment, on the CPU; see `along`.

    Raises:
        ValueError: models that do not fit together, or are not this network's.
        UserError: an operation whose second derivative torch does not know.
    """
    network.eval()
    _check(network, segment.start)
    weights, direction = _beside(network, segment.at(alpha)), _beside(network, segment.direction())
    found = [along(network, weights, direction, _to(network, batch), project) for batch in batches]
    return Line(*(torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True)))


def logit_difference(second: Callable[[float], Tensor], alpha: float, nodes: int = 8) -> Tensor:
    """Ensemble minus soup, exactly, from the second derivative of smooth logits: the integral of w_alpha(t) f''(t).

    Args:
        second: t in (0, 1) -> (N, C) second derivatives at theta_t, for example `line_at(...).second`.
        alpha: of both, in [0, 1].
        nodes: of Gauss-Legendre on either side of alpha, where w_alpha has its kink; exact for polynomials in t of
            degree 2 nodes - 2. `second` is called for each.

    Returns:
        (N, C) in float64.

    Source: Appendix K.2; w_alpha(t) = min((1 - alpha) t, alpha (1 - t)), which integrates to alpha (1 - alpha) / 2.
    """
    places, shares = np.polynomial.legendre.leggauss(nodes)
    total: Tensor | None = None
    for low, high in ((0.0, alpha), (alpha, 1.0)):
        for place, share in zip(places, shares, strict=True):
            t = low + (high - low) * (1 + float(place)) / 2
            weight = (high - low) / 2 * float(share) * min((1 - alpha) * t, alpha * (1 - t))
            part = weight * second(t).double()
            total = part if total is None else total + part
    assert total is not None
    return total


def compare(
    network: nn.Module,
    pair: tuple[Weights, Weights],
    batches: Callable[[], Iterable[Tensor]],
    labels: Tensor,
    alpha: float,
    *,
    ends: tuple[Tensor, Tensor] | None = None,
    project: Projection | None = None,
) -> Point:
    """All numbers of one pair, alpha and split, with the exact curvature.

    Args:
        network: put in evaluation mode; its own weights are not touched.
        pair: theta_0 and theta_1.
        batches: called for every pass over the split; batches of inputs in the order of the labels.
        labels: (N,) class ids, in the label space of the split.
        alpha: in [0, 1].
        ends: (N, C) projected logits of both models where they are known; two more passes otherwise.
        project: from the network's logits to the label space of the split, linear or a maximum over classes.

    Raises:
        ValueError: models that do not fit together or are not this network's; alpha out of range; as
            `eval.metrics.check`.
        UserError: an operation whose second derivative torch does not know; take `on_grid` then.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is between the two models, in [0, 1], got {alpha}")
    if ends is None:
        first, second = (logits_at(network, weights, batches(), project) for weights in pair)
        ends = first, second
    line = line_at(network, Segment(*pair), alpha, batches(), project)
    return point(alpha, ends, line.value, labels, lambda beta: (curvature(line, labels, beta).total, None))


def _check(network: nn.Module, weights: Weights) -> None:
    """Refuse weights of another network, and what would leave a tensor as the network happens to have it.

    Raises:
        ValueError: one is too many or missing, which is named.
    """
    parameters, buffers = network.named_parameters(remove_duplicate=False), network.named_buffers()
    own = {name: id(tensor) for name, tensor in (*parameters, *buffers)}
    unknown = sorted(weights.keys() - own.keys())
    given = {own[name] for name in weights if name in own}
    missing = [name for name in network.state_dict() if own[name] not in given]
    if unknown or missing:
        raise ValueError(f"these weights are not this network's: {(unknown + missing)[0]!r} is in one of them alone")


def _beside(network: nn.Module, weights: Weights) -> dict[str, Tensor]:
    return {name: _to(network, tensor) for name, tensor in weights.items()}


def _to(network: nn.Module, tensor: Tensor) -> Tensor:
    """On the device of the network."""
    where = next(islice(network.parameters(), 1), None)
    return tensor if where is None else tensor.to(where.device)
