"""Value and first two derivatives along a line, carried through a network together: a forward pass, exact, no graph.

A `Jet` is x(t) up to the second order. Every aten operation that meets one has a rule in `analysis.jet_rules` or
`analysis.jet_functions`, or is refused by name: nothing is taken for a constant in silence. What torch offers was tried
first and is not used: nested `torch.func.jvp` goes wrong without a word in the native layer norm (torch 2.14), and
does not know silu and the fused attentions.

Source: Griewank and Walther 2008, Chapter 13 (univariate Taylor propagation).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


@contextmanager
def _in_small_steps() -> Iterator[None]:
    """Attention as matrix products and a softmax, whatever a library would fuse it to."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def along(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    inputs: Tensor,
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the network answers at these weights, and its first two derivatives along a direction of all of them.

    About five forward passes of time, and of memory three times a forward pass's activations.

    Args:
        network: in evaluation mode; its own weights are not touched.
        weights: every parameter and buffer by name. Tied tensors need one of their names.
        direction: by the same names, of the same shapes; integers and names that are absent do not move.
        inputs: one batch, the network's only argument.
        project: applied to the answer, where something else than it is wanted.

    Returns:
        f, f' and f'' = d^2/dt^2 f(inputs; weights + t direction) at t = 0, each of the shape of the output. At the
        kink of a relu it is the derivative of one side, and what the slope jumps by there is no part of f''.

    Raises:
        ValueError: the network is in training mode; weights that are not the network's; a direction of other names or
            shapes.
        NotImplementedError: an operation whose derivative is not known here, which is named.
    """
    if network.training:
        raise ValueError("derivatives are of the network in evaluation mode: call .eval() first")
    check_weights(network, weights)
    moving: dict[str, Tensor] = {}
    for name, step in direction.items():
        if name not in weights or weights[name].shape != step.shape:
            raise ValueError(f"the direction moves {name!r}, {tuple(step.shape)}, and the weights have no such tensor")
        if step.is_floating_point():
            moving[name] = Jet((weights[name], step.to(weights[name])))
    with _in_small_steps():
        answer = torch.func.functional_call(network, {**weights, **moving}, (inputs,), strict=False)
        found = coefficients(answer if project is None else project(answer))
    zero = torch.zeros_like(found[0])
    value, first, second = (*found, zero, zero)[:ORDERS]
    return value, first, 2 * second


def check_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
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
