"""Sharpness-aware minimisation: the gradient is taken at the worst point nearby."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def _norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean length over all tensors."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded parameters


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    """Move parameters uphill by `rho` along their gradient, over all of them together; afterwards back, to the bit.

    Args:
        parameters: those with a gradient move.
            Among several processes these are the mean over all of them, or each process's own (m-sharpness).
        rho: length of the move; nothing moves where the gradient is zero.

    Source: Foret et al. 2021, Equation 2 and Section 4.1; Appendix J.2.3 of the paper has both kinds.
    """
    moving = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in moving if parameter.grad is not None]
    norm = _norm(gradients)
    kept = [parameter.detach().clone() for parameter in moving]
    if norm > 0:
        with torch.no_grad():
            for parameter, gradient in zip(moving, gradients, strict=True):
                parameter.add_(gradient * (rho / norm))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, original in zip(moving, kept, strict=True):
                parameter.copy_(original)
