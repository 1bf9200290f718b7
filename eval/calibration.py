"""Temperature scaling: one number that makes confidence match accuracy."""

import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor


def fit_beta(logits: Tensor, labels: Tensor) -> float:
    """The inverse temperature beta > 0 that minimises the cross-entropy of beta x logits.

    Args:
        logits: (N, C), any float dtype; the loss is taken in float64.
        labels: (N,) class ids in [0, C), of the held-out split.

    Returns:
        beta in [1e-3, 1e3]; above 1 sharpens, below 1 softens. Accuracy does not depend on it.

    Raises:
        ValueError: N is 0, or the shapes do not agree.

    Source: Guo et al. 2017, Section 4.2, whose T is 1 / beta.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"need (N, C) logits, (N,) labels, N > 0; got {tuple(logits.shape)}, {tuple(labels.shape)}")
    wide = logits.double()

    def loss(log_beta: float) -> float:
        return F.cross_entropy(10**log_beta * wide, labels).item()

    # The loss is convex in beta, hence has one valley in its logarithm too.
    return float(10 ** minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6}).x)
