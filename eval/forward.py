"""Forward passes, once for each model and image."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import Experiment
from eval.metrics import correct
from models.classifier import Classifier, architecture
from store.arrays import cached_array
from store.runs import RunFolder, digest_of
from store.weights import Weights, digest, load_weights
from tasks.fixed import fixed_batches, of_model
from tasks.load import load_split
from tasks.split import Images

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of_this_process() -> torch.device:
    """The GPU of its local rank under torchrun, the first one alone, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@torch.no_grad()  # not inference mode, whose tensors FSDP cannot reuse
def forward(model: Classifier, batches: Iterable[Tensor], precision: str = "fp32") -> Tensor:
    """Batches of (b, 3, H, W) uint8 images to (N, C) float32 logits on the CPU; none, where there are no images."""
    return _apply(model, model, batches, precision)


@torch.no_grad()  # not inference mode, whose tensors FSDP cannot reuse
def extract_features(model: Classifier, batches: Iterable[Tensor], precision: str = "fp32") -> Tensor:
    """Batches of (b, 3, H, W) uint8 images to (N, width) float32 features, as the head gets them, on the CPU."""
    return _apply(model, model.features, batches, precision)


def _apply(
    model: Classifier, function: Callable[[Tensor], Tensor], batches: Iterable[Tensor], precision: str
) -> Tensor:
    model.eval()
    device, kind = model.head.weight.device, DTYPES[precision]
    found = []
    for batch in batches:
        with torch.autocast(device.type, kind, enabled=precision != "fp32"):
            found.append(function(batch.to(device, non_blocking=True)).float().cpu())
    return torch.cat(found) if found else torch.empty(0, model.head.out_features)


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
        self._splits: dict[str, Images] = {}

    @cached_property
    def model(self) -> Classifier:
        """The module that weights are loaded into, with random ones, on this process's device."""
        model = architecture(self.config.model, self.config.task.size)
        return model.channels_last(self.config.compute.channels_last).to(device_of_this_process())

    def split(self, name: str) -> Images:
        """The images and labels of a split."""
        if name not in self._splits:
            self._splits[name] = load_split(self.config.task, name)
        return self._splits[name]

    def batches(self, split: str, rows: Tensor | None = None) -> Iterator[Tensor]:
        """(b, 3, S, S) uint8 images of a split under the model's evaluation transform, in order.

        Args:
            split: of the experiment's task.
            rows: (N,) which of its images; all where None.
        """
        compute = self.config.compute
        return fixed_batches(
            self.split(split),
            of_model(self.config.model),
            batch=compute.eval_batch,
            rows=rows,
            workers=compute.loader_workers,
            decoded=compute.decoded,
        )

    def features(self, split: str) -> Tensor:
        """(N, width) float32 features of a split by the model's tower as it is, from the cache or to fill it."""
        tower = digest({name: tensor.cpu() for name, tensor in self.model.tower.state_dict().items()})
        shape = (len(self.split(split)), self.model.head.in_features)

        def compute() -> Tensor:
            return extract_features(self.model, self.batches(split), self.config.compute.precision)

        return cached_array(self._cache("features", split, tower), shape, compute)

    def _cache(self, what: str, split: str, weights: str) -> Path:
        """Where an array is kept, named by all that its numbers depend on."""
        transform, precision = of_model(self.config.model).key, self.config.compute.precision
        parts = {"weights": weights, "images": self.split(split).digest, "transform": transform, "precision": precision}
        return self.run.root / what / split / f"{digest_of(parts)}.npy"

    def fresh_logits(self, weights: Weights, split: str, rows: Tensor | None = None) -> Tensor:
        """(N, C) float32 logits by a forward pass, not kept; for candidates that are tried once.

        Args:
            weights: of the model.
            split: of the experiment's task.
            rows: (N,) which of its images; all where None.
        """
        self.model.load_state_dict(dict(weights), strict=True)
        return forward(self.model, self.batches(split, rows), self.config.compute.precision)

    def logits(self, name: str, load: Callable[[], Weights], split: str) -> Tensor:
        """(N, C) float32 logits from the cache, or by a forward pass that fills it.

        Args:
            name: the digest of the weights.
            load: called only when a forward pass is needed.
            split: of the experiment's task.
        """
        shape = (len(self.split(split)), self.config.task.size)
        return cached_array(self._cache("logits", split, name), shape, lambda: self.fresh_logits(load(), split))

    def logits_of_file(self, name: str, path: Path, split: str) -> Tensor:
        """As `logits`, of a weights file whose recorded digest is known."""
        return self.logits(name, lambda: load_weights(path, name), split)

    def count(self, logits: Tensor, split: str) -> Count:
        """How many of a split's images these logits get right."""
        return Count(int(correct(logits, self.split(split).labels).sum()), len(logits))
