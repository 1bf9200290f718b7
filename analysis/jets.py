"""Numbers that carry two derivatives along a line through whatever torch computes of them.

A `Jet` is x(t) up to the second order. Every aten operation that meets one has a rule in `analysis.jet_rules` or
`analysis.jet_functions`, or is refused by name: nothing is taken for a constant in silence. What torch offers was tried
first and is not used: nested `torch.func.jvp` goes wrong without a word in the native layer norm (torch 2.14), and
does not know silu and the fused attentions.

Source: Griewank and Walther 2008, Chapter 13 (univariate Taylor propagation).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ORDERS = 3  # value, first and second
Coefficients = tuple[Tensor, ...]
RULES: dict[Any, Callable[..., Any]] = {}  # an aten operation without its overload -> its rule


class Jet(torch.Tensor):
    """x(t) = c[0] + c[1] t + c[2] t^2, of which those that are missing at the end are 0; so x''(0) = 2 c[2]."""

    c: Coefficients

    @staticmethod
    def __new__(cls, c: Sequence[Tensor]) -> "Jet":  # noqa: D102
        value = c[0]
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=value.device
        )
        made.c = tuple(c[:ORDERS])
        return made

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Jet({self.c})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch calls it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            return _in_place(func, args, kwargs)
        rule = RULES.get(func.overloadpacket)
        if rule is None:
            raise NotImplementedError(
                f"no second derivative is known of {func}, which this network computes; add its rule to "
                "analysis/jet_rules.py, or take central differences"
            )
        return rule(func, *args, **kwargs)


def coefficients(x: Any) -> Coefficients:
    """Of a jet, or of what is constant along the line."""
    return x.c if isinstance(x, Jet) else (x,)


def jet(c: Sequence[Tensor]) -> Tensor:
    """A jet, or a plain tensor where nothing but the value is left."""
    return Jet(c) if len(c) > 1 else c[0]


def rule(*operations: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register how these operations treat jets; the rule gets the overload that was called, then its arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(operations, function))
        return function

    return register


def stacked(c: Sequence[Tensor]) -> Tensor:
    """(n, ...) coefficients in one tensor, without a copy where they already lie evenly in one."""
    first = c[0]
    if len(c) == 1:
        return first.unsqueeze(0)
    apart = c[1].storage_offset() - first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for i, other in enumerate(c):
        even = other.storage_offset() == first.storage_offset() + i * apart
        if not even or other.stride() != first.stride() or other.untyped_storage().data_ptr() != storage:
            return torch.stack(list(c))
    return first.as_strided((len(c), *first.shape), (apart, *first.stride()))


def _in_place(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """relu_ is relu, written into the coefficients where they are, so that views of them see it too."""
    target, name = args[0], func.overloadpacket.__name__
    if not isinstance(target, Jet) or not name.endswith("_"):
        raise NotImplementedError(f"{func} writes numbers that move along the line into a tensor that does not")
    if name == "copy_":
        made = args[1].broadcast_to(target.shape)
    else:
        functional = getattr(torch.ops.aten, name[:-1])
        made = getattr(functional, func._overloadname)(*args, **kwargs)
    new = coefficients(made)
    if len(new) > len(target.c):
        raise NotImplementedError(f"{func} into a tensor whose second derivative was 0 until then")
    for i, old in enumerate(target.c):
        if i < len(new):
            old.copy_(new[i])
        else:
            old.zero_()
    return target
