"""What sums, products and choices do to jets: see `analysis.jets`. Importing this module registers the rules.

In every rule c[0], c[1], c[2] are Taylor coefficients: of a product they are sums over i + j = k.
"""

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from analysis.jets import ORDERS, Coefficients, Jet, coefficients, jet, rule, stacked

aten: Any = torch.ops.aten


# ---- linear in the one argument that moves


@rule(
    *(aten.permute, aten.transpose, aten.t, aten.expand, aten.slice, aten.select, aten.unsqueeze, aten.squeeze),
    *(aten.clone, aten.detach, aten.alias, aten.neg, aten.mean, aten.sum, aten.repeat, aten.gather, aten.index),
    *(aten.index_select, aten._to_copy, aten.unbind, aten.split, aten.split_with_sizes, aten.flip, aten.roll),
    *(aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.embedding, aten.cumsum, aten.lift_fresh, aten.chunk),
    *(aten._upsample_bicubic2d_aa, aten._upsample_bilinear2d_aa, aten.upsample_bicubic2d, aten.upsample_bilinear2d),
)
def _linear(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    parts = [func(c, *args, **kwargs) for c in coefficients(x)]
    if isinstance(parts[0], Tensor):
        return jet(parts)
    return [jet(several) for several in zip(*parts, strict=True)]


@rule(aten.view, aten._unsafe_view, aten.reshape)
def _view(func: Any, x: Jet, shape: Sequence[int]) -> Tensor:
    return jet([c.reshape(shape) for c in x.c])  # a view wherever strides let it be one


@rule(aten.constant_pad_nd)
def _pad(func: Any, x: Jet, pad: Sequence[int], value: float = 0) -> Tensor:
    return jet([func(x.c[0], pad, value), *(func(c, pad, 0) for c in x.c[1:])])


@rule(aten.cat, aten.stack)
def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    parts = [coefficients(x) for x in tensors]
    orders = max(map(len, parts))
    return jet([func([c[i] if i < len(c) else torch.zeros_like(c[0]) for c in parts], dim) for i in range(orders)])


@rule(
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full),
    *(aten.new_empty, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isnan, aten.isinf, aten.argmax),
    *(aten.sign, aten.floor, aten.ceil, aten.round, aten.isfinite),
)
def _constant(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What does not move with its arguments."""
    return func(*(coefficients(x)[0] for x in args), **kwargs)


@rule(aten._fused_sdp_choice)
def _math_attention(func: Any, *args: Any, **kwargs: Any) -> int:
    return torch.nn.attention.SDPBackend.MATH.value


# ---- choices between values


@rule(aten.where)
def _where(func: Any, condition: Tensor, x: Any, y: Any) -> Tensor:
    pairs = zip_longest(coefficients(x), coefficients(y))
    chosen = [(0.0 if a is None else a, 0.0 if b is None else b) for a, b in pairs]
    return jet([torch.where(condition, a, b) for a, b in chosen])


@rule(aten.masked_fill)
def _masked_fill(func: Any, x: Any, mask: Tensor, value: Any) -> Tensor:
    first, *rest = coefficients(x)
    return jet([func(first, mask, value), *(c.masked_fill(mask, 0.0) for c in rest)])


@rule(aten.minimum)
def _minimum(func: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x < y, x, y)


@rule(aten.maximum)
def _maximum(func: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > y, x, y)


@rule(aten.amax)
def _amax(func: Any, x: Jet, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    (only,) = dim if isinstance(dim, Sequence) else (dim,)
    first = x.c[0].argmax(dim=only, keepdim=True)
    found = [c.gather(only, first) for c in x.c]
    return jet(found if keepdim else [c.squeeze(only) for c in found])


@rule(aten.max_pool2d_with_indices)
def _max_pool(func: Any, x: Jet, *args: Any) -> tuple[Tensor, Tensor]:
    value, where = func(x.c[0], *args)
    rest = [c.flatten(2).gather(2, where.flatten(2)).view_as(value) for c in x.c[1:]]
    return jet([value, *rest]), where


# ---- sums and products


@rule(aten.add, aten.sub)
def _add(func: Any, x: Any, y: Any, alpha: float = 1) -> Tensor:
    a, b = coefficients(x), coefficients(y)
    made = []
    for i in range(max(len(a), len(b))):
        if i < min(len(a), len(b)):
            made.append(func(a[i], b[i], alpha=alpha))
        else:
            sign = 1 if func.overloadpacket is aten.add else -1
            alone = a[i] if i < len(a) else sign * alpha * b[i]
            # A copy: what writes into the sum must not write into the summand.
            made.append(alone.broadcast_to(made[0].shape).clone())
    return jet(made)


@rule(aten.mul)
def _mul(func: Any, x: Any, y: Any) -> Tensor:
    a, b = coefficients(x), coefficients(y)
    made: list[Tensor] = []
    for i in range(min(ORDERS, len(a) + len(b) - 1)):
        terms = [(a[j], b[i - j]) for j in range(len(a)) if 0 <= i - j < len(b)]
        total = torch.mul(*terms[0])
        for one, other in terms[1:]:
            total.addcmul_(one, other)
        made.append(total)
    return jet(made)


@rule(aten.div)
def _div(func: Any, x: Any, y: Any) -> Tensor:
    return x * y.reciprocal() if isinstance(y, Jet) else jet([func(c, y) for c in x.c])


@rule(aten.mm)
def _mm(func: Any, x: Any, y: Any) -> Tensor:
    """One product for each coefficient of the second factor, with all of the first below one another."""
    a, b = coefficients(x), coefficients(y)
    if len(a) == ORDERS and len(b) == 2:
        scale = _balance(a, b)
        if 0 < scale < math.inf:
            return _in_four_products(a, b, scale)
    orders = min(ORDERS, len(a) + len(b) - 1)
    columns = b[0].shape[1]
    made = a[0].new_zeros(orders, a[0].shape[0], columns)
    for i, factor in enumerate(b):
        part = stacked(a[: orders - i]).reshape(-1, a[0].shape[1])
        made[i : i + len(a)].view(-1, columns).addmm_(part, factor)
    return jet(made.unbind())


def _balance(a: Coefficients, b: Coefficients) -> float:
    """How far to go along the line for the larger of both relative changes to be 1; NaN where nothing changes."""
    sizes = torch.stack([torch.linalg.vector_norm(c) for c in (*a[:2], *b[:2])])
    return float((sizes[::2] / sizes[1::2]).min())


def _in_four_products(a: Coefficients, b: Coefficients, scale: float) -> Tensor:
    """What a moving layer does to moving inputs, with 4 large products and not 5: 15 % of a ViT's time.

    a0 b1 + a1 b0 is taken from (a0 + s a1)(b0 + s b1). With s so that neither moves by more than its size, rounding
    stays in proportion to the larger of a0 b1 and a1 b0; in float32 no digit was lost.

    Source: Karatsuba and Ofman 1962.
    """
    made = a[0].new_empty(ORDERS, a[0].shape[0], b[0].shape[1])
    torch.mm(a[0], b[0], out=made[0])
    corner = torch.mm(a[1], b[1])
    torch.addmm(corner, a[2], b[0], out=made[2])
    torch.mm(torch.add(a[0], a[1], alpha=scale), torch.add(b[0], b[1], alpha=scale), out=made[1])
    made[1].sub_(made[0]).mul_(1 / scale).sub_(corner, alpha=scale)
    return jet(made.unbind())


@rule(aten.addmm)
def _addmm(func: Any, bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        return beta * bias + alpha * torch.mm(x, y)
    return _plus_bias(coefficients(torch.mm(x, y)), bias)


def _plus_bias(fresh: Sequence[Tensor], bias: Any) -> Tensor:
    """Added in place, so that the coefficients stay in one tensor."""
    b = coefficients(bias)
    if len(b) > len(fresh):
        return jet(fresh) + bias
    return jet([x.add_(b[i]) if i < len(b) else x for i, x in enumerate(fresh)])


@rule(aten.bmm)
def _bmm(func: Any, x: Any, y: Any) -> Tensor:
    a, b = coefficients(x), coefficients(y)
    made = a[0].new_empty(min(ORDERS, len(a) + len(b) - 1), *a[0].shape[:2], b[0].shape[2])
    for i, into in enumerate(made):
        terms = [(a[j], b[i - j]) for j in range(len(a)) if 0 <= i - j < len(b)]
        torch.bmm(*terms[0], out=into)
        for one, other in terms[1:]:
            into.baddbmm_(one, other)
    return jet(made.unbind())


@rule(aten.convolution)
def _convolution(func: Any, x: Any, weight: Any, bias: Any, *args: Any) -> Tensor:
    a, b = coefficients(x), coefficients(weight)
    orders = min(ORDERS, len(a) + len(b) - 1)
    made: list[Tensor] = []
    for i, factor in enumerate(b):
        products = func(stacked(a[: orders - i]).flatten(0, 1), factor, None, *args).chunk(min(len(a), orders - i))
        for old, product in zip(made[i:], products, strict=False):
            old.add_(product)
        made.extend(products[len(made) - i :])
    return jet(made) if bias is None else _plus_bias(made, bias.view(1, -1, *(1,) * (made[0].ndim - 2)))
