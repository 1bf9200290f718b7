"""A pretrained image tower with a linear head: what is fine-tuned, souped and evaluated."""

import copy
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn

from configs.training import Model
from models.emoji_clip.model import MEAN, STD, TEMPLATES, text_features
from models.emoji_clip.model import load as load_emoji_clip

ROOT = Path(__file__).resolve().parents[1]


class Classifier(nn.Module):
    """Logits = head(unit-norm features of the tower), the authors' wrapper around CLIP.

    Images are (N, 3, H, W) in 0..255, uint8 or float; they are normalised here, so that no caller can forget to.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, width: int, classes: int, mean: Tensor, std: Tensor):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(width, classes)
        # Not part of the weights: averaging models must not average constants.
        self.register_buffer("mean", 255 * mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * std.view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in 0..255 to (N, width) of unit norm."""
        normalised = (images.float() - self.mean) / self.std
        return F.normalize(self.tower(normalised.contiguous(memory_format=torch.channels_last)), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in 0..255 to (N, classes) logits."""
        return self.head(self.features(images))

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode, except that batch norms keep the pretrained statistics, in every ingredient the same."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def zero_shot_head(class_embeddings: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The head that classifies by similarity to text: weight (C, width) = scale x unit embeddings, bias (C,) = 0.

    Args:
        class_embeddings: (C, T, width) unit-norm text features of C class names in T templates.
        scale: CLIP's exp(logit_scale).

    Source: Radford et al. 2021, Section 3.1.4: mean over templates, then normalised.
    """
    weight = scale * F.normalize(class_embeddings.mean(dim=1), dim=-1)
    return weight, torch.zeros(len(weight))


@lru_cache(maxsize=1)
def _load_with_zero_shot_head(weights: Path, class_names: tuple[str, ...]) -> tuple[CLIP, Tensor, Tensor]:
    """The pretrained model and its (C, width) head and (C,) bias for these classes; read once in a process."""
    clip = load_emoji_clip(ROOT / weights)
    texts = [template.format(name) for name in class_names for template in TEMPLATES]
    embeddings = text_features(clip, texts).view(len(class_names), len(TEMPLATES), -1)
    return clip, *zero_shot_head(embeddings, clip.logit_scale.exp().item())


def pretrained(model: Model, class_names: tuple[str, ...]) -> Classifier:
    """The pretrained tower with its zero-shot head for these classes; the start of every fine-tuned model.

    Raises:
        WeightsError: the pretrained weights are missing or damaged.
    """
    clip, weight, bias = _load_with_zero_shot_head(model.weights, class_names)
    tower = copy.deepcopy(clip.visual)  # the caller will train it
    classifier = Classifier(tower, weight.shape[1], len(class_names), torch.tensor(MEAN), torch.tensor(STD))
    set_head(classifier, weight, bias)
    freeze_stages(classifier, model.frozen_stages)
    classifier.head.requires_grad_(model.train_head)
    return classifier.to(memory_format=torch.channels_last)


def set_head(classifier: Classifier, weight: Tensor, bias: Tensor) -> None:
    """Copy weight (C, width) and bias (C,) into the head."""
    with torch.no_grad():
        classifier.head.weight.copy_(weight)
        classifier.head.bias.copy_(bias)


def freeze_stages(classifier: Classifier, stages: int) -> None:
    """Take the gradient from the stem and the first `stages` stages of the tower; 0 leaves the model whole."""
    if stages == 0:
        return
    trunk = classifier.tower.get_submodule("trunk")
    for name in ("conv_stem", "bn1", *(f"blocks.{stage}" for stage in range(stages))):
        trunk.get_submodule(name).requires_grad_(False)
