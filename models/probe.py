"""Linear probe: the head that the paper's fine-tuned models start from (LP initialisation, Section 3.1)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from configs.errors import InterruptedBySignalError, UserError
from soups.files.atomic import digest_of, replacing
from store.arrays import cached_array

SMALL = 2**33  # examples x width x classes, up to which the whole fit is in float64
TIGHT = 1e-13  # a small fit ends this near its optimum, relative to the loss: float32 heads hardly see the rest
TOLERANCE = 1e-6  # a large fit ends this near
HISTORY = 10  # steps that the curvature is estimated from
MAX_STEPS = 1000
MAX_TRIALS = 30  # lengths of a step
CHUNK = 2**20  # numbers in a chunk of features or logits: larger ones leave the processor's cache
KEEP_SECONDS = 60  # between two writes of a fit that lasts
PASSES = 85  # over the training features for a value of C: about what C = 10 takes; smaller values take fewer
Loss = Literal["softmax", "bce"]
METHOD = 1  # part of the names of files: heads of another method are not taken for this one's


@dataclass(frozen=True)
class Probe:
    """A fitted head and how it was chosen."""

    weight: Tensor  # (C, width)
    bias: Tensor  # (C,)
    c: float
    tried: tuple[tuple[float, float], ...]  # (inverse regularisation, held-out accuracy)


@dataclass(frozen=True)
class Fit:
    """The state of L-BFGS between two steps: all that it needs to continue."""

    point: Tensor  # (C, width + 1) float64 in the coordinates of a `Problem`
    steps: tuple[Tensor, ...] = ()  # the last HISTORY differences of points
    changes: tuple[Tensor, ...] = ()  # the differences of gradients that belong to them
    taken: int = 0
    exact: bool = False  # whether it goes on in float64


class NotConvergedError(RuntimeError):
    """Too many steps, or no length of a step that is good."""


class Problem:
    """The mean loss and the penalty of a head on some features.

    The coordinates of a head are its weights along the principal axes of the features, and its biases at their mean:
    (C, width + 1). There the curvature is near to diagonal, and neither the penalty nor the optimum is another.

    Args:
        features: (N, width) float32, on the device that computes.
        labels: (N,) class ids, on the same.
        classes: C.
        loss: cross-entropy of the softmax, or binary cross-entropy summed over the classes.
        check: called before each chunk; may raise to end the fit.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, loss: Loss, check: Callable[[], None]):
        self.features, self.labels, self.classes, self.loss, self.check = features, labels, classes, loss, check
        self.n, self.width = features.shape
        self.rows = max(1, CHUNK // max(classes, self.width))
        self.passes = 0
        self.mean = torch.zeros(self.width, dtype=torch.float64, device=features.device)
        for chunk in self._chunks():
            self.mean += chunk.double().sum(dim=0) / self.n
        scatter = torch.zeros(self.width, self.width, dtype=torch.float64, device=features.device)
        for chunk in self._chunks():
            centred = chunk.double() - self.mean
            scatter += centred.T @ centred / self.n
        spread, self.axes = torch.linalg.eigh(scatter)
        self.spread = torch.cat([spread.clamp(min=0), spread.new_ones(1)])  # (width + 1,), 1 for biases

    def _chunks(self) -> Iterator[Tensor]:
        for chunk in self.features.split(self.rows):
            self.check()
            yield chunk

    def point(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The coordinates of a head, (C, width) and (C,)."""
        weight, bias = weight.to(self.mean), bias.to(self.mean)
        return torch.cat([weight @ self.axes, (bias + weight @ self.mean)[:, None]], dim=1)

    def head(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """(C, width) weights and (C,) biases, float64."""
        weight = point[:, :-1] @ self.axes.T
        return weight, point[:, -1] - weight @ self.mean

    def penalty(self, c: float) -> Tensor:
        """(width + 1,) factors of half the square of each coordinate in the mean loss: scikit-learn's 1 / (C n).

        scikit-learn's features would be scaled to a mean square of about 1, where C means what it usually does, hence
        the width. Its logistic regression of two classes has one vector, the difference of ours, hence the factor 2.
        """
        one_vector = self.loss == "softmax" and self.classes == 2
        penalty = torch.full_like(self.spread, (2 if one_vector else 1) / (c * self.n * self.width))
        penalty[-1] = 0
        return penalty

    def __call__(self, point: Tensor, penalty: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
        """The loss and its (C, width + 1) gradient; products are computed in `dtype` and added up in float64."""
        self.passes += 1
        weight, bias = self.head(point)
        cast_weight, cast_bias = weight.to(dtype), bias.to(dtype)
        slope, total, loss = torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(bias[0])
        buffer = torch.empty(min(self.rows, self.n), self.classes, dtype=dtype, device=bias.device)
        for chunk, labels in zip(self._chunks(), self.labels.split(self.rows), strict=True):
            features, column = chunk.to(dtype), labels[:, None]
            logits = torch.addmm(cast_bias, features, cast_weight.T, out=buffer[: len(chunk)])
            at_label = logits.gather(1, column)
            if self.loss == "softmax":
                top = logits.amax(dim=1, keepdim=True)
                norm = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
                residual = logits.div_(norm)
                loss += (top - at_label + norm.log()).sum(dtype=torch.float64)
            else:
                loss += softplus(logits).sum(dtype=torch.float64) - at_label.sum(dtype=torch.float64)
                residual = logits.sigmoid_()
            residual.scatter_add_(1, column, residual.new_full(column.shape, -1.0))
            slope += residual.T @ features
            total += residual.sum(dim=0, dtype=torch.float64)
        slope -= total.outer(self.mean)  # the biases are those at the mean
        gradient = torch.cat([slope @ self.axes, total[:, None]], dim=1) / self.n + penalty * point
        return (loss / self.n + (penalty * point.square()).sum() / 2).item(), gradient


def _dot(a: Tensor, b: Tensor) -> float:
    return a.flatten().dot(b.flatten()).item()


def _direction(fit: Fit, gradient: Tensor, spread: Tensor, penalty: Tensor) -> Tensor:
    """Minus the inverse curvature times the gradient, by the two loops of L-BFGS over a diagonal first guess.

    The guess is the spread of the features along each axis, times half, which bounds the curvature of the losses
    from above (Böhning 1992), or times what the last step found; plus the penalty.

    Source: Nocedal and Wright 2006, algorithm 7.4.
    """
    factor, shrink = 0.5, 1.0
    if fit.steps:
        step, change = fit.steps[-1], fit.changes[-1]
        factor = _dot(step, change - penalty * step) / _dot(step, spread * step)
    diagonal = min(max(factor, 1e-10), 0.5) * spread + penalty
    if fit.steps:
        shrink = _dot(step, change) / _dot(change, change / diagonal)
    found, factors = gradient.clone(), []
    pairs = [(step, change, 1 / _dot(step, change)) for step, change in zip(fit.steps, fit.changes, strict=True)]
    for step, change, scale in reversed(pairs):
        factors.append(scale * _dot(step, found))
        found.sub_(change, alpha=factors[-1])
    found *= shrink / diagonal
    for (step, change, scale), along in zip(pairs, reversed(factors), strict=True):
        found.add_(step, alpha=along - scale * _dot(change, found))
    return -found


def _next_trial(length: float, low: tuple[float, float], high: tuple[float, float] | None) -> float:
    """A length between one that is too short and one that is too long, each with its slope; doubled without one."""
    if high is None:
        return 2 * length
    root = low[0] + (high[0] - low[0]) * low[1] / (low[1] - high[1])
    margin = (high[0] - low[0]) / 10
    return min(max(root, low[0] + margin), high[0] - margin)


def _descend(
    problem: Problem, penalty: Tensor, fit: Fit, keep: Callable[[Fit], None], *, dtype: torch.dtype, tolerance: float
) -> Fit:
    """Steps until the optimum is, by the estimated curvature, lower by no more than `tolerance` times the loss.

    A step's length is judged by the slope along it alone, which rounding hurts less than differences of losses: the
    slope of a convex function grows, and where it is nearly zero along the step the loss is lower.

    Raises:
        NotConvergedError: MAX_STEPS or MAX_TRIALS were not enough.
    """
    value, gradient = problem(fit.point, penalty, dtype)
    for _ in range(MAX_STEPS):
        direction = _direction(fit, gradient, problem.spread, penalty)
        slope = _dot(gradient, direction)
        if -slope / 2 <= tolerance * value:
            return fit
        low: tuple[float, float] = (0.0, slope)
        high: tuple[float, float] | None = None
        length = 1.0
        for _ in range(MAX_TRIALS):
            value, there = problem(fit.point + length * direction, penalty, dtype)
            reached = _dot(there, direction)
            if reached > -slope / 2:
                high = (length, reached)
            elif reached < 0.9 * slope:
                low = (length, reached)
            else:
                break
            length = _next_trial(length, low, high)
        else:
            raise NotConvergedError
        step = length * direction
        steps, changes = (*fit.steps, step)[-HISTORY:], (*fit.changes, there - gradient)[-HISTORY:]
        fit, gradient = Fit(fit.point + step, steps, changes, fit.taken + 1, fit.exact), there
        keep(fit)
    raise NotConvergedError


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Products of float32 on a GPU with all their digits, whatever the training is set to."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _continued(path: Path, start: Tensor) -> Fit:
    """The fit that was interrupted, or one that begins at `start`; a file that cannot be read is named, and left."""
    if not path.exists():
        return Fit(start)
    try:
        fit = Fit(**torch.load(path, weights_only=True, map_location=start.device))
        if any(tensor.shape != start.shape for tensor in (fit.point, *fit.steps, *fit.changes)):
            raise ValueError("another shape")
    except Exception as error:  # torch raises anything for a damaged file
        print(f"{path} is damaged ({type(error).__name__}): this part of the linear probe begins anew", flush=True)
        return Fit(start)
    return fit


def _fitted(problem: Problem, c: float, start: Tensor, path: Path) -> Tensor:
    """(C, width + 1) float32 on the CPU: weights and biases of the optimum, from `start` or where `path` has got to.

    Raises:
        UserError: it does not converge.
    """
    penalty, small = problem.penalty(c), problem.n * problem.width * problem.classes <= SMALL
    kept_at, fit = time.monotonic(), _continued(path, start)

    def write() -> None:
        with replacing(path) as temporary:
            torch.save(vars(fit), temporary)

    def keep(reached: Fit) -> None:
        nonlocal fit, kept_at
        fit = reached
        if time.monotonic() - kept_at > KEEP_SECONDS:
            write()
            kept_at = time.monotonic()

    try:
        if not small and not fit.exact:
            with suppress(NotConvergedError):  # float64 goes on from where float32 has got to
                fit = _descend(problem, penalty, fit, keep, dtype=torch.float32, tolerance=TOLERANCE)
        fit, tolerance = replace(fit, exact=True), TIGHT if small else TOLERANCE
        fit = _descend(problem, penalty, fit, keep, dtype=torch.float64, tolerance=tolerance)
    except InterruptedBySignalError:
        write()
        raise
    except NotConvergedError:
        raise UserError(
            f"the linear probe with C = {c:g} does not converge in {fit.taken} steps: leave {c:g} out of model.probe_c"
        ) from None
    weight, bias = problem.head(fit.point)
    return torch.cat([weight, bias[:, None]], dim=1).float().cpu()


def linear_probe(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    classes: int,
    inverse_regularisation: Sequence[float],
    folder: Path,
    *,
    loss: Loss = "softmax",
    device: torch.device | None = None,
    check: Callable[[], None] = lambda: None,
) -> Probe:
    """Logistic regression on frozen features, regularisation chosen on the held-out split.

    A value of C starts from the head of the one before it. Up to SMALL all is in float64; beyond, in float32 to the
    same criterion, which is then checked, and met, in float64.

    Args:
        train: (N, width) float32 features and (N,) class ids; every class occurs.
        held_out: the same of the held-out split; it never trains the head, it only chooses.
        classes: C.
        inverse_regularisation: scikit-learn's C to try, for features times the square root of their width; the
            smallest of equals is taken.
        folder: the head of each C is kept there, and a fit that is interrupted; its name depends on everything that
            features and labels depend on.
        loss: softmax is multinomial logistic regression, bce is one against the rest for each class.
        device: where it is computed; the CPU where None.
        check: called many times a second; what it raises ends the fit, which InterruptedBySignalError saves.

    Raises:
        ValueError: a class without a training example.
        UserError: a value of C with which the fit does not converge.

    Source: Kumar et al. 2022, as the paper's Section 3.1 uses it; its solver is not given there, this is L-BFGS.
    """
    absent = (torch.bincount(train[1], minlength=classes) == 0).nonzero().flatten().tolist()
    if absent:
        raise ValueError(f"classes {absent[:5]} have no training example, so a linear probe cannot learn them")
    width, values = train[0].shape[1], sorted(inverse_regularisation)
    names = [digest_of({"method": METHOD, "loss": loss, "c": values[: i + 1]}) for i in range(len(values))]
    paths = [folder / f"{name}.npy" for name in names]
    problem: Problem | None = None
    heads = [torch.zeros(classes, width + 1)]
    with _no_tf32():
        for c, path in zip(values, paths, strict=True):

            def fit(c: float = c, path: Path = path) -> Tensor:
                nonlocal problem
                problem = problem or Problem(train[0].to(device), train[1].to(device), classes, loss, check)
                start = problem.point(heads[-1][:, :-1], heads[-1][:, -1])
                return _fitted(problem, c, start, path.with_suffix(".pt"))

            heads.append(cached_array(path, (classes, width + 1), fit))
            path.with_suffix(".pt").unlink(missing_ok=True)
    tried = []
    for c, head in zip(values, heads[1:], strict=True):
        predicted = (held_out[0] @ head[:, :-1].T + head[:, -1]).argmax(dim=1)
        tried.append((c, (predicted == held_out[1]).double().mean().item()))
    best = max(range(len(tried)), key=lambda i: tried[i][1])
    head = heads[1:][best]
    return Probe(head[:, :-1].clone(), head[:, -1].clone(), values[best], tuple(tried))


def fit_flops(examples: int, width: int, classes: int, values: int) -> int:
    """FLOPs of a linear probe for so many values of C: PASSES over the features for each, and their covariance.

    A pass is two matrix products, one for the logits and one for the gradient.
    """
    return values * PASSES * 4 * examples * width * classes + 2 * examples * width**2
