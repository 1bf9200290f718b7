"""Value and first two derivatives of a network along a line of its weights: one forward pass, exact, no graph."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import analysis.jet_functions  # these two register what every operation does to derivatives
import analysis.jet_rules  # noqa: F401
from analysis.jets import ORDERS, Jet, coefficients


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
