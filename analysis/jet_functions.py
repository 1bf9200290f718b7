"""What functions of one number, softmax and norms do to jets: see `analysis.jets`; importing registers the rules."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from analysis.jets import ORDERS, Jet, coefficients, jet, rule, stacked

aten: Any = torch.ops.aten
Slopes = tuple[Tensor, Tensor, Tensor | None]  # value, first derivative, half of the second; None is 0


# ---- functions of one number


def _tanh(x: Tensor) -> Slopes:
    y = x.tanh()
    slope = 1 - y * y
    return y, slope, -y * slope


def _sigmoid(x: Tensor) -> Slopes:
    y = x.sigmoid()
    slope = y * (1 - y)
    return y, slope, slope * (0.5 - y)


def _silu(x: Tensor) -> Slopes:
    y, slope, half = _sigmoid(x)
    assert half is not None
    return x * y, y + x * slope, slope + x * half


def _exp(x: Tensor) -> Slopes:
    y = x.exp()
    return y, y, y / 2


def _log(x: Tensor) -> Slopes:
    slope = x.reciprocal()
    return x.log(), slope, -slope * slope / 2


def _power(x: Tensor, exponent: float) -> Slopes:
    first = exponent * x ** (exponent - 1) if exponent != 1 else torch.ones_like(x)
    if exponent in (1, 2):  # where the general formula would divide by 0
        return x**exponent, first, torch.full_like(x, float(exponent - 1))
    return x**exponent, first, exponent * (exponent - 1) / 2 * x ** (exponent - 2)


def _erf(x: Tensor) -> Slopes:
    slope = 2 / math.sqrt(math.pi) * (-x * x).exp()
    return x.erf(), slope, -x * slope


def _gelu(x: Tensor, approximate: str = "none") -> Slopes:
    if approximate == "tanh":
        return _tanh_gelu(x)
    square = x * x
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    share = (x * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
    value = x * share
    slope = share.addcmul_(x, density)
    return value, slope, density.mul_(square.mul_(-0.5).add_(1))


def _tanh_gelu(x: Tensor) -> Slopes:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    inner, inner_slope, inner_half = scale * (x + cubic * x**3), scale * (1 + 3 * cubic * x * x), scale * 3 * cubic * x
    y, slope, half = _tanh(inner)
    assert half is not None
    first = slope * inner_slope
    second = half * inner_slope * inner_slope + slope * inner_half
    return 0.5 * x * (1 + y), 0.5 * (1 + y + x * first), 0.5 * (first + x * second)


def _kinked(x: Tensor, low: float | None, high: float | None) -> Slopes:
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside &= x > low
    if high is not None:
        inside &= x < high
    return x.clamp(low, high), inside.to(x.dtype), None


FUNCTIONS: dict[Any, Callable[..., Slopes]] = {
    aten.tanh: _tanh,
    aten.sigmoid: _sigmoid,
    aten.silu: _silu,
    aten.exp: _exp,
    aten.log: _log,
    aten.erf: _erf,
    aten.gelu: _gelu,
    aten.pow: _power,
    aten.rsqrt: lambda x: _power(x, -0.5),
    aten.sqrt: lambda x: _power(x, 0.5),
    aten.reciprocal: lambda x: _power(x, -1),
    aten.relu: lambda x: _kinked(x, 0, None),
    aten.abs: lambda x: (x.abs(), x.sign(), None),
    aten.hardtanh: lambda x, low=-1, high=1: _kinked(x, low, high),
    aten.clamp: lambda x, low=None, high=None: _kinked(x, low, high),
    aten.clamp_min: lambda x, low: _kinked(x, low, None),
}


@rule(*FUNCTIONS)
def _function(func: Any, x: Jet, *args: Any, **kwargs: Any) -> Tensor:
    """Of f(x): f' x1 and f' x2 + f'' x1^2 / 2."""
    value, slope, half = FUNCTIONS[func.overloadpacket](x.c[0], *args, **kwargs)
    orders = len(x.c) if half is None else ORDERS
    made = value.new_empty(orders, *value.shape)
    made[0] = value
    torch.mul(stacked(x.c[1:]), slope, out=made[1 : len(x.c)])
    if half is not None:
        if len(x.c) < ORDERS:
            made[2] = 0
        made[2].addcmul_(half.mul_(x.c[1]), x.c[1])
    return jet(made.unbind())


# ---- over whole rows


@rule(aten.linalg_vector_norm)
def _norm(func: Any, x: Jet, ord: float = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    if ord != 2:
        raise NotImplementedError("only the Euclidean norm has a second derivative here")
    return (x * x).sum(dim, keepdim).sqrt()


@rule(aten._softmax, aten._safe_softmax)
def _softmax(func: Any, x: Jet, dim: int, *args: Any) -> Tensor:
    value, first = func(x.c[0], dim, *args), x.c[1]
    made = value.new_empty(ORDERS, *value.shape)
    made[0] = value
    centred = first - (value * first).sum(dim, keepdim=True)
    torch.mul(value, centred, out=made[1])
    half = centred.square_().mul_(0.5)  # the second coefficient of exp(centred t)
    if len(x.c) == ORDERS:
        half += x.c[2]
    half -= (value * half).sum(dim, keepdim=True)
    torch.mul(value, half, out=made[2])
    return jet(made.unbind())


@rule(aten._log_softmax)
def _log_softmax(func: Any, x: Jet, dim: int, *args: Any) -> Tensor:
    value, first = func(x.c[0], dim, *args), x.c[1]
    share = value.exp()
    centred = first - (share * first).sum(dim, keepdim=True)
    mean = (share * (centred.square() / 2)).sum(dim, keepdim=True)
    if len(x.c) < ORDERS:
        return jet([value, centred, (-mean).expand_as(value)])
    return jet([value, centred, x.c[2] - (share * x.c[2]).sum(dim, keepdim=True) - mean])


@rule(aten.native_layer_norm)
def _layer_norm(func: Any, x: Any, shape: Sequence[int], *args: Any) -> tuple[Any, ...]:
    """Of a row (x0 + x1 t + x2 t^2 - mean) / sd, with u = (x1, x2 - means) / sd the variance is by
    1 + 2 a t + (2 b + c) t^2 of what it was.
    """
    weight, bias, eps = args
    c, dims = coefficients(x), tuple(range(-len(shape), 0))
    normal, _, inverse = func(c[0], shape, None, None, eps)
    made = normal.new_empty(ORDERS if len(c) > 1 else 1, *normal.shape)
    made[0] = normal
    if len(c) > 1:
        moved = stacked(c[1:])
        torch.mul(moved - moved.mean(dims, keepdim=True), inverse, out=made[1 : len(c)])
        if len(c) < ORDERS:
            made[2] = 0
        a, b = (normal * made[1:]).mean(dims, keepdim=True)
        g = 1.5 * a * a - b - made[1].square().mean(dims, keepdim=True) / 2
        made[2].addcmul_(made[1], a, value=-1).addcmul_(normal, g)
        made[1].addcmul_(normal, a, value=-1)
    answer: Tensor = jet(made.unbind())
    answer = answer if weight is None else answer * weight
    return answer if bias is None else answer + bias, normal.new_empty(0), normal.new_empty(0)


@rule(aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm)
def _batch_norm(func: Any, x: Any, weight: Any, bias: Any, *args: Any) -> tuple[Any, ...]:
    """With the running statistics, which may move too."""
    mean, variance, training, _, eps = args
    if training:
        raise NotImplementedError("a batch norm with the statistics of the batch: call .eval() first")
    shape = (1, -1, *(1,) * (x.ndim - 2))
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    unused = [coefficients(x)[0].new_empty(0)] * (len(func._schema.returns) - 1)
    return x * scale.view(shape) + shift.view(shape), *unused
