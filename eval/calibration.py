"""Whether confidence matches accuracy, and the one number that makes it match (temperature scaling)."""

from dataclasses import dataclass

import scipy  # its parts are loaded when they are named
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics import check, correct, log_probabilities


def fit_beta(logits: Tensor, labels: Tensor) -> float:
    """The inverse temperature beta > 0 that minimises the cross-entropy of beta x logits, taken in float64.

    beta is in [1e-3, 1e3]; above 1 it sharpens, below 1 softens. Accuracy does not depend on it.

    Source: Guo et al. 2017, Section 4.2, whose T is 1 / beta.
    """
    check(logits, labels)
    wide = logits.double()

    def loss(log_beta: float) -> float:
        return F.cross_entropy(10**log_beta * wide, labels).item()

    # The loss is convex in beta, hence has one valley in its logarithm too.
    found = scipy.optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6})
    return float(10**found.x)


@dataclass(frozen=True)
class Bins:
    """Examples sorted by confidence into B bins, each a tensor of (B,)."""

    count: Tensor  # (B,) int64, examples
    confidence: Tensor  # (B,) float64, their mean confidence; NaN where there are none
    accuracy: Tensor  # (B,) float64, how many of them are right, in [0, 1]; NaN where there are none

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: |confidence - accuracy|, averaged over examples; 0 is calibrated."""
        gaps = (self.confidence - self.accuracy).abs().nan_to_num(0.0)
        return ((self.count * gaps).sum() / self.count.sum()).item()


def reliability_bins(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Bins:
    """Sort examples into B bins of equal mass by confidence, the largest probability of the softmax in float64.

    Examples of equal confidence share the bin that the first of them falls in, so their order does not matter, and with
    many ties bins are uneven or empty. How many bins the paper used for Figure B.2 is not known; 15 is Guo's.

    Source: Guo et al. 2017, eq. 3; Roelofs et al. 2022, Section 3.
    """
    if bins < 1:
        raise ValueError(f"need at least one bin, got {bins}")
    right = correct(logits, labels).double().cpu()
    confidence = log_probabilities(logits).max(dim=1).values.exp().cpu()  # (N,)
    less_confident = torch.searchsorted(confidence.sort().values, confidence)  # (N,) how many examples are
    which = less_confident * bins // len(confidence)
    count = torch.bincount(which, minlength=bins)
    sums = [torch.bincount(which, weights=values, minlength=bins) for values in (confidence, right)]
    return Bins(count, sums[0] / count, sums[1] / count)


@dataclass(frozen=True)
class Calibration:
    """One model before and after temperature scaling."""

    beta: float  # inverse temperature
    before: Bins
    after: Bins


def calibrate(held_out: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, bins: int = 15) -> Calibration:
    """Fit the temperature on held-out logits and labels, and bin the test's before and after; raises as these."""
    beta = fit_beta(*held_out)
    logits, labels = test
    before = reliability_bins(logits, labels, bins=bins)
    return Calibration(beta, before, reliability_bins(beta * logits.double(), labels, bins=bins))
