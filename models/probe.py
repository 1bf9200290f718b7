"""Linear probe: the head that the paper's fine-tuned models start from (LP initialisation, Section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_ITERATIONS = 200


@dataclass(frozen=True)
class Probe:
    """A fitted head and how it was chosen."""

    weight: Tensor  # (C, width)
    bias: Tensor  # (C,)
    c: float
    tried: tuple[tuple[float, float], ...]  # (inverse regularisation, held-out accuracy)


def linear_probe(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], classes: int, inverse_regularisation: Sequence[float]
) -> Probe:
    """Multinomial logistic regression on frozen features, regularisation chosen on the held-out split.

    Args:
        train: (N, width) features and (N,) class ids; every class occurs.
        held_out: the same of the held-out split; it never trains the head, it only chooses.
        classes: C.
        inverse_regularisation: scikit-learn's C to try; the smallest of equals is taken.

    Raises:
        ValueError: a class without a training example.

    Source: Kumar et al. 2022, as the paper's Section 3.1 uses it; its solver is not given there, this is L-BFGS.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  # only the initialisation waits for it

    features, labels = (part.numpy() for part in train)
    absent = sorted(set(range(classes)) - set(labels.tolist()))
    if absent:
        raise ValueError(f"classes {absent[:5]} have no training example, so a linear probe cannot learn them")
    # Coordinates of unit-norm features are tiny; of about 1, the solver's tolerance and C mean what they usually do.
    scale = features.shape[1] ** 0.5
    fits = []
    for c in sorted(inverse_regularisation):
        fit = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(scale * features.astype(np.float64), labels)
        # Two classes come back as one row; a head has a row for each.
        rows = (-fit.coef_, fit.coef_) if classes == 2 else (fit.coef_,)
        biases = (-fit.intercept_, fit.intercept_) if classes == 2 else (fit.intercept_,)
        weight = torch.from_numpy(scale * np.concatenate(rows)).float()
        bias = torch.from_numpy(np.concatenate(biases)).float()
        predicted = (held_out[0] @ weight.T + bias).argmax(dim=1)
        fits.append(Probe(weight, bias, c, ((c, (predicted == held_out[1]).double().mean().item()),)))
    best = max(fits, key=lambda probe: probe.tried[0][1])
    return Probe(best.weight, best.bias, best.c, tuple(probe.tried[0] for probe in fits))
