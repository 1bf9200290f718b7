"""Value and first two derivatives of a network along a line of its weights, by torch's forward mode within itself."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from configs.errors import UserError


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
    """f, f' and f'' = d^2/dt^2 f(inputs; weights + t direction) at t = 0, each of the shape of the output.

    At the kink of a relu the derivative is that of one side, and what the slope jumps by there is no part of f''.

    Args:
        network: in evaluation mode; its own weights are not touched.
        weights: every parameter and buffer by name. Tied tensors need one of their names.
        direction: floating-point tensors by the same names, of the same shapes; what is absent does not move.
        inputs: one batch, the network's only argument.
        project: applied to the answer, where something else than it is wanted.

    Raises:
        ValueError: the network is in training mode.
        UserError: an operation whose second derivative torch does not know, which is named.
    """
    if network.training:
        raise ValueError("derivatives are of the network in evaluation mode: call .eval() first")

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
