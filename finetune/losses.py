"""What is minimised: on labels, and on the predictions of teachers."""

import torch.nn.functional as F
from torch import Tensor

from configs.training import Optim


def classification_loss(optim: Optim, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of the loss against soft labels.

    Args:
        optim: `softmax` takes the cross-entropy; `bce` the sum over classes of binary ones, each class a question of
            its own, as ViT-G/14 was fine-tuned with (Appendix J.2.3); `likelihood` is minus the log-probability of
            the label's answer over all that a language model may say, its own loss (Appendix J.5), summed over tokens.
        logits: (B, C) unnormalised; of `likelihood`, log-probabilities of the answers.
        targets: (B, C) in [0, 1]; smoothing and mixing are in them.
    """
    match optim.loss:
        case "softmax":
            return F.cross_entropy(logits, targets)
        case "bce":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()
        case "likelihood":
            return -(targets * logits).sum(dim=1).mean()


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of the cross-entropy of the student against the teacher's probabilities, times T^2.

    Of equal logits at temperature 1 it is the teacher's entropy. The factor keeps gradients of one size whatever T is.

    Args:
        student: (B, C) logits.
        teacher: (B, C) logits, without gradient.
        temperature: T, of both.

    Source: Hinton et al. 2015, Section 2.
    """
    return temperature**2 * F.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1))
