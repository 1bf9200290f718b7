"""Forward passes, once for each model and image."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import Experiment
from eval.metrics import correct
from models.classifier import Classifier, pretrained
from store.logits import cached_logits
from store.runs import RunFolder, digest_of
from store.weights import Weights, load_weights
from tasks.load import class_names, load_split
from tasks.split import Split

BATCH = 128


@torch.inference_mode()
def forward(model: Classifier, images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 images to (N, C) float32 logits."""
    model.eval()
    return torch.cat([model(chunk) for chunk in images.split(BATCH)])


@torch.inference_mode()
def extract_features(model: Classifier, images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 images to (N, width) features of unit norm."""
    model.eval()
    return torch.cat([model.features(chunk) for chunk in images.split(BATCH)])


@dataclass(frozen=True)
class Count:
    """A result on a split as two integers, from which any accuracy follows exactly."""

    correct: int
    n: int

    @property
    def top1(self) -> float:
        """Accuracy in [0, 1]."""
        return self.correct / self.n


class Evaluator:
    """Logits of any weights of one experiment on any of its splits; images and the module are loaded once."""

    def __init__(self, config: Experiment):
        self.config = config
        self.run = RunFolder.of(config)
        self._splits: dict[str, Split] = {}

    @cached_property
    def model(self) -> Classifier:
        """The module that weights are loaded into."""
        return pretrained(self.config.model, self.class_names)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The label space."""
        return class_names(self.config.task)

    def split(self, name: str) -> Split:
        """The images and labels of a split."""
        if name not in self._splits:
            self._splits[name] = load_split(self.config.task, name)
        return self._splits[name]

    def fresh_logits(self, weights: Weights, split: str, rows: Tensor | None = None) -> Tensor:
        """(N, C) float32 logits by a forward pass, not kept; for candidates that are tried once.

        Args:
            weights: of the model.
            split: of the experiment's task.
            rows: (N,) which of its images; all where None.
        """
        self.model.load_state_dict(dict(weights), strict=True)
        images = self.split(split).images
        return forward(self.model, images if rows is None else images[rows])

    def logits(self, digest: str, load: Callable[[], Weights], split: str) -> Tensor:
        """(N, C) float32 logits from the cache, or by a forward pass that fills it.

        Args:
            digest: of the weights.
            load: called only when a forward pass is needed.
            split: of the experiment's task.
        """
        data = self.split(split)
        key = digest_of(
            {"weights": digest, "images": data.digest, "size": self.config.model.image_size, "precision": "float32"}
        )
        shape = (len(data.labels), len(self.class_names))
        path = self.run.root / "logits" / split / f"{key}.npy"
        return cached_logits(path, shape, lambda: self.fresh_logits(load(), split))

    def logits_of_file(self, digest: str, path: Path, split: str) -> Tensor:
        """As `logits`, of a weights file whose recorded digest is known."""
        return self.logits(digest, lambda: load_weights(path, digest), split)

    def count(self, logits: Tensor, split: str) -> Count:
        """How many of a split's images these logits get right."""
        return Count(int(correct(logits, self.split(split).labels).sum()), len(logits))
