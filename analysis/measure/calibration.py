"""How far confidence is from what is right: NLL, Brier score and calibration errors, each with its interval."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from analysis.measure.methods import bootstrap_groups
from eval.calibration import reliability_bins
from eval.forward import Evaluator
from eval.metrics import log_probabilities
from eval.significance import Difference, paired_bootstrap


def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) negative log-likelihoods in nats and (N,) Brier scores in [0, 2], both float64, of (N, C) logits.

    Source: Brier 1950, eq. 2.
    """
    logs = log_probabilities(logits)
    at_label = logs.gather(1, labels.unsqueeze(1)).squeeze(1)
    probabilities = logs.exp()
    brier = probabilities.square().sum(dim=1) - 2 * at_label.exp() + 1
    return -at_label, brier


def debiased_error(logits: Tensor, labels: Tensor, bins: int) -> float:
    """The root mean square calibration error, without what few examples a bin add to it by chance; in [0, 1].

    Source: Kumar et al. 2019, Definition 5.2, of the label that is predicted, with equal-mass bins.
    """
    found = reliability_bins(logits, labels, bins=bins)
    several = found.count > 1
    count, confidence, accuracy = found.count[several], found.confidence[several], found.accuracy[several]
    squares = (confidence - accuracy).square() - accuracy * (1 - accuracy) / (count - 1)
    return float(((count * squares).sum() / found.count.sum()).clamp(min=0).sqrt())


def calibration_of(evaluator: Evaluator, logits: Callable[[str], Tensor], splits: Sequence[str]) -> dict[str, float]:
    """ece, ece_debiased, nll and brier of a model, of several splits their means; nll and brier with their intervals.

    An interval is the percentile interval of the paired bootstrap that accuracies have, against 0. Calibration errors
    have none: resampled examples are less calibrated than those that they are drawn from. `logits` of a split are
    (N, C), in its label space.
    """
    seen = [(logits(split), evaluator.split(split).labels) for split in splits]
    settings, size = evaluator.config.analysis, len(splits)
    found = {
        "ece": sum(reliability_bins(*each, bins=settings.bins).ece for each in seen) / size,
        "ece_debiased": sum(debiased_error(*each, settings.bins) for each in seen) / size,
    }
    units, resampling = bootstrap_groups(evaluator, splits), {"resamples": settings.resamples, "seed": settings.seed}
    for name, values in zip(("nll", "brier"), zip(*(losses(*each) for each in seen), strict=True), strict=True):
        zeros = [torch.zeros_like(each) for each in values]
        interval: Difference = paired_bootstrap(values, zeros, units, **resampling)
        found |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return found
