"""Forward passes, once for each model and image.

Networks are imported where one is built: their libraries take seconds, and cached logits need none of them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.schema import Experiment
from eval.batch_size import found_batch_size, largest_input
from eval.metrics import correct, correct_in_sets
from eval.scores import score
from eval.tokens import token_batches, token_split
from models.tokens import TokenSplit, longest_first
from store.arrays import cached_array
from store.processes import Processes, alone, least_of_all, wait_for_all
from store.runs import RunFolder, digest_of
from store.weights import Weights, digest, load_weights
from tasks.fixed import fixed_batches, of_model
from tasks.label_space import project
from tasks.load import load_annotations, load_split
from tasks.split import Examples, Images

if TYPE_CHECKING:
    from models.classifier import Classifier, Network

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()  # not inference mode, whose tensors FSDP cannot reuse
def forward(model: "Network", batches: Iterable[Tensor], precision: str = "fp32") -> Tensor:
    """Batches of (b, 3, H, W) uint8 images or (b, L) token ids to (N, C) float32 logits on the CPU; none of none."""
    return _apply(model, model, batches, precision)


@torch.no_grad()  # not inference mode, whose tensors FSDP cannot reuse
def extract_features(model: "Classifier", batches: Iterable[Tensor], precision: str = "fp32") -> Tensor:
    """Batches, as of `forward`, to (N, width) float32 features, as the head gets them, on the CPU."""
    return _apply(model, model.features, batches, precision)


def _apply(model: "Network", function: Callable[[Tensor], Tensor], batches: Iterable[Tensor], precision: str) -> Tensor:
    model.eval()
    found = [_look(model, function, batch, precision).cpu() for batch in batches]
    return torch.cat(found) if found else torch.empty(0, model.num_classes)


def _look(model: "Network", function: Callable[[Tensor], Tensor], batch: Tensor, precision: str) -> Tensor:
    with torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "fp32"):
        return function(batch.to(model.device, non_blocking=True)).float()


def shares_of_batches(order: Tensor, batch: int, world: int) -> list[Tensor]:
    """For each of W processes, which examples are in its batches: every W-th one.

    >>> shares_of_batches(torch.arange(5), batch=2, world=2)
    [tensor([0, 1, 4]), tensor([2, 3])]
    """
    batches = order.split(batch)
    return [torch.cat([torch.arange(0), *batches[rank::world]]) for rank in range(world)]


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
    """Logits of any weights of one experiment on any of its splits; images and the module are loaded once.

    Args:
        config: of the experiment.
        processes: that fill the cache together; all of them must ask for the same logits in the same order.
    """

    def __init__(self, config: Experiment, processes: Processes | None = None):
        self.config = config
        self.processes = processes or alone()
        self.run = RunFolder.of(config)
        self._splits: dict[str, Examples] = {}

    @cached_property
    def model(self) -> "Network":
        """The module that weights are loaded into, with random ones, on this process's device."""
        from models.classifier import architecture  # noqa: PLC0415

        model = architecture(self.config.model, self.config.task.size, self.config.task.options)
        return model.channels_last(self.config.compute.channels_last).to(self.processes.device)

    def split(self, name: str) -> Examples:
        """The examples and labels of a split."""
        if name not in self._splits:
            self._splits[name] = load_split(self.config.task, name)
        return self._splits[name]

    def inputs(self, split: str) -> Images | TokenSplit:
        """What the network is trained on and evaluated on: images, or texts as token ids."""
        if self.config.task.is_text:
            return token_split(self.config.model, self.config.task, split)
        return self.split(split)  # type: ignore[return-value]  # of tasks that are no texts

    def order(self, split: str) -> Tensor:
        """(N,) the order in which all examples of a split are looked at: texts are beside texts of their length."""
        inputs = self.inputs(split)
        return longest_first(inputs.lengths) if isinstance(inputs, TokenSplit) else torch.arange(len(inputs))

    def batches(self, split: str, rows: Tensor | None = None) -> Iterator[Tensor]:
        """(b, 3, S, S) uint8 images of a split under the model's evaluation transform, or (b, L) token ids, in order.

        Args:
            split: of the experiment's task.
            rows: (N,) which of its examples; all, as in `order`, where None.
        """
        compute, inputs = self.config.compute, self.inputs(split)
        rows = self.order(split) if rows is None else rows
        if isinstance(inputs, TokenSplit):
            return token_batches(inputs, rows, self.batch_size)
        return fixed_batches(
            inputs,
            of_model(self.config.model),
            batch=self.batch_size,
            rows=rows,
            workers=compute.loader_workers,
            # The training split is looked at once, for the linear probe, and is too large to keep.
            decoded=compute.decoded if split != self.config.task.train else None,
        )

    def together(self, split: str) -> Tensor:
        """All inputs of a small split in one tensor, in its own order: (N, 3, S, S) images, or (N, L) token ids."""
        inputs = self.inputs(split)
        return (
            inputs.batch(torch.arange(len(inputs)))
            if isinstance(inputs, TokenSplit)
            else torch.cat(list(self.batches(split)))
        )

    @cached_property
    def batch_size(self) -> int:
        """Examples a forward pass, of all processes alike: as the config says, or as many as fit on the GPU."""
        compute, model = self.config.compute, self.model
        if compute.eval_batch is not None:
            return compute.eval_batch
        with torch.no_grad():
            look = partial(_look, model.eval(), model, precision=compute.precision)
            return least_of_all(found_batch_size(look, largest_input(self.config.model), model.device), self.processes)

    def features(self, split: str) -> Tensor:
        """(N, width) float32 features of a split by the model's tower as it is, from the cache or to fill it."""
        from models.classifier import Classifier  # noqa: PLC0415

        model, order = self.model, self.order(split)
        assert isinstance(model, Classifier)  # a prompted language model has no head to be probed
        tower = digest({name: tensor.cpu() for name, tensor in model.tower.state_dict().items()})
        shape = (len(self.split(split)), model.head.in_features)

        def compute() -> Tensor:
            found = extract_features(model, self.batches(split, order), self.config.compute.precision)
            return torch.empty_like(found).index_copy_(0, order, found)

        return cached_array(self.place("features", split, tower), shape, compute)

    def place(self, what: str, split: str, weights: str) -> Path:
        """Where an array with a number or more for each example of a split is kept, named by all that it depends on.

        Args:
            what: the array is, e.g. logits.
            split: of the experiment's task.
            weights: names them, and whatever else the numbers depend on beside the examples and their transform.
        """
        inputs, precision = self.inputs(split), self.config.compute.precision
        transform = inputs.key if isinstance(inputs, TokenSplit) else of_model(self.config.model).key
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
        if rows is not None:
            return forward(self.model, self.batches(split, rows), self.config.compute.precision)
        order = self.order(split)
        found = forward(self.model, self.batches(split, order), self.config.compute.precision)
        return torch.empty_like(found).index_copy_(0, order, found)

    def logits(self, name: str, load: Callable[[], Weights], split: str) -> Tensor:
        """(N, C) float32 logits from the cache, or by a forward pass that fills it.

        Args:
            name: the digest of the weights.
            load: called only when a forward pass is needed.
            split: of the experiment's task.
        """
        shape = (len(self.split(split)), self.config.task.size)
        path = self.place("logits", split, name)
        if self.processes.world > 1 and not path.exists():
            self._fill_together(path, shape, load, split)
        return cached_array(path, shape, lambda: self.fresh_logits(load(), split))

    def _fill_together(self, path: Path, shape: tuple[int, int], load: Callable[[], Weights], split: str) -> None:
        """Each of W processes looks at every W-th batch: the batches, and so the bits, are those of one alone."""
        world = self.processes.world
        rows = shares_of_batches(self.order(split), self.batch_size, world)
        parts = [path.with_suffix(f".{rank}of{world}.npy") for rank in range(world)]
        rank = self.processes.rank
        own = (len(rows[rank]), shape[1])
        cached_array(parts[rank], own, lambda: self.fresh_logits(load(), split, rows[rank]))
        wait_for_all(self.processes)
        if self.processes.writes:
            whole = torch.empty(shape)
            for some, part in zip(rows, parts, strict=True):
                whole[some] = cached_array(part, (len(some), shape[1]), lambda: torch.empty(0))
            cached_array(path, shape, lambda: whole)
            for part in path.parent.glob(f"{path.stem}.*of*.npy"):
                part.unlink()
        wait_for_all(self.processes)

    def logits_of_file(self, name: str, path: Path, split: str) -> Tensor:
        """As `logits`, of a weights file whose recorded digest is known."""
        return self.logits(name, lambda: load_weights(path, name), split)

    def projected(self, logits: Tensor, split: str) -> Tensor:
        """(N, C') logits in the label space of a split, from raw ones."""
        return project(self.split(split).space, logits)

    def hits(self, logits: Tensor, split: str) -> Tensor:
        """(N,) bool: whether each image of a split is classified correctly in its label space."""
        return correct(self.projected(logits, split), self.split(split).labels)

    def predicted(self, logits: Tensor, split: str) -> Tensor:
        """(N,) class ids in the label space of a split."""
        return self.projected(logits, split).argmax(dim=1)

    def score(self, logits: Tensor, split: str) -> float:
        """In [0, 1]: what the task scores a split by."""
        images, metric = self.split(split), self.config.task.metrics.get(split, "top1")
        return score(metric, self.predicted(logits, split), images.labels, images.groups)

    def scored(self, logits: Tensor, split: str) -> dict[str, Any]:
        """What a record says of logits: how many of a split's examples are right, of how many; and the score, where the
        task scores the split by anything else.
        """
        count, metric = self.count(logits, split), self.config.task.metrics.get(split, "top1")
        record: dict[str, Any] = {"split": split, "correct": count.correct, "n": count.n}
        return record if metric == "top1" else record | {"metric": metric, "score": self.score(logits, split)}

    @cached_property
    def annotations(self) -> dict[str, Tensor]:
        """Annotation of the test split -> (N, C) bool, as `tasks.load.load_annotations`."""
        return load_annotations(self.config.task)

    def annotated_hits(self, logits: Tensor) -> dict[str, Tensor]:
        """Of each annotation (ReaL, multilabel) of the test split, (M,) bool: whether the prediction is among the
        answers that count as right, of the M images with such answers.

        Source: Beyer et al. 2020, Section 3; Shankar et al. 2020, Section 2.
        """
        if not self.annotations:
            return {}
        seen = self.projected(logits, self.config.task.test)
        return {name: correct_in_sets(seen, answers) for name, answers in self.annotations.items()}

    def annotated(self, logits: Tensor) -> dict[str, Count]:
        """Of each annotation, how many are right, of how many images with answers; as `annotated_hits`."""
        hits = self.annotated_hits(logits)
        return {name: Count(int(right.sum()), len(right)) for name, right in hits.items()}

    def count(self, logits: Tensor, split: str) -> Count:
        """How many of a split's images these logits get right."""
        return Count(int(self.hits(logits, split).sum()), len(logits))
