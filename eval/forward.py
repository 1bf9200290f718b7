"""Forward passes, once for each model and example. Networks are imported where one is built, which takes seconds."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.data import Task
from configs.errors import UserError
from configs.schema import Experiment
from configs.training import Model, arithmetic
from eval.metrics import correct, correct_in_sets, mean_by_group
from models.tokens import TokenSplit, longest_first
from soups.files.atomic import digest_of
from soups.files.weights import Weights, digest, load_weights
from soups.scorers.metrics import score
from store.arrays import cached_array, read_array, stored_array, write_array
from store.processes import (
    Processes,
    any_of,
    first_decides,
    from_the_first,
    least_of_all,
    on_the_first,
    send_tensors,
    single_process,
    use_kernels,
    wait_for_all,
)
from store.runs import RunFolder
from tasks.check import refuse_overlaps
from tasks.eval_images import eval_batches, eval_transform
from tasks.load import load_annotations, load_split
from tasks.split import Examples, ImageSplit, project
from tasks.texts import TextRows, pieces_of

if TYPE_CHECKING:
    from models.classifier import Classifier, Network

FEATURES_SHARD = 4096  # examples whose features are kept together: a minute of a ViT-G on one GPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST, LARGEST = 4, 1024  # examples; beyond the largest, a pass is no faster
ON_CPU = 128  # memory is no question there


@torch.no_grad()  # not inference mode, whose tensors FSDP cannot reuse
def forward(
    model: "Network",
    batches: Iterable[Tensor],
    precision: str = "fp32",
    outputs: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(N, C) float32 logits on the CPU, or other `outputs`, of uint8 images or token ids; (0, C) without batches.

    The model is left in eval mode; bf16 and fp16 are those of autocast.
    """
    model.eval()
    found = [_outputs(model, outputs or model, batch, precision).cpu() for batch in batches]
    return torch.cat(found) if found else torch.empty(0, model.num_classes)


def _outputs(model: "Network", function: Callable[[Tensor], Tensor], batch: Tensor, precision: str) -> Tensor:
    with torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "fp32"):
        return function(batch.to(model.device, non_blocking=True)).float()


def shares_of_batches(order: Tensor, batch: int, world: int) -> list[Tensor]:
    """For each of W processes, the examples in its batches, which are every W-th one.

    >>> shares_of_batches(torch.arange(5), batch=2, world=2)
    [tensor([0, 1, 4]), tensor([2, 3])]
    """
    batches = order.split(batch)
    return [torch.cat([torch.arange(0), *batches[rank::world]]) for rank in range(world)]


def largest_that_fits(attempt: Callable[[int], None]) -> int:
    """A power of two from 4 to 1024: half of the largest with which `attempt` has enough memory, or 1024.

    The half leaves room for what fragments and other processes may need on top; a UserError where not even 4 fit.
    """
    size = SMALLEST
    while size <= LARGEST:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            if size == SMALLEST:
                raise UserError(
                    f"not even {SMALLEST} examples fit into the memory: set compute.eval_batch lower"
                ) from None
            return max(SMALLEST, size // 4)
        size *= 2
    return LARGEST


def found_by_all(find: Callable[[], int], processes: Processes) -> int:
    """The smallest of the numbers that the processes find; where one's `find` raises a UserError, all raise one."""
    refused = UserError("another process found no memory for a forward pass: set compute.eval_batch lower")
    try:
        found = find()
    except UserError as error:
        found, refused = 0, error
    least = least_of_all(found, processes)
    if least == 0:
        raise refused
    return least


def largest_input(model: Model, training: bool = False) -> Tensor:
    """(1, 3, S, S) uint8, or (1, L) token ids: an example that no other needs more memory than."""
    if model.is_reader:
        return torch.ones(1, model.max_length, dtype=torch.int64)
    size = model.image_size if training else model.evaluated_at
    return torch.zeros(1, 3, size, size, dtype=torch.uint8)


def found_batch_size(outputs: Callable[[Tensor], Tensor], example: Tensor, device: torch.device) -> int:
    """Examples a forward pass by `outputs` of inputs like `example`, by trying on a GPU; on the CPU a fixed number."""
    if device.type == "cpu":
        return ON_CPU

    def attempt(examples: int) -> None:
        try:
            outputs(example.to(device).repeat(examples, *[1] * (example.ndim - 1)))
        finally:
            torch.cuda.empty_cache()

    return largest_that_fits(attempt)


@lru_cache(maxsize=16)
def token_split(model: Model, task: Task, name: str) -> TokenSplit:
    """One split of texts as token ids, read once in a process."""
    from models.hub import source, tokenizer_of  # noqa: PLC0415  # seconds that images need not wait for

    split = load_split(task, name)
    texts = split.stored
    assert isinstance(texts, TextRows)
    words, pieces = tokenizer_of(model, task.answers), pieces_of(task.template)
    # The kind of model is part of the key, and where its tokenizer is from: another one may split the same text alike.
    parts = {"pieces": pieces, "before": words.before, "after": words.after, "max_length": words.max_length}
    key = digest_of(parts | {"kind": model.kind, "source": source(model) if model.kind != "minilm" else "minilm"})
    return TokenSplit(words.encode(pieces, texts.columns, texts.fields), split.labels, words.pad, key)


@dataclass(frozen=True)
class Annotated:
    """Results on the M test images that an annotation (ReaL, multilabel) has answers for."""

    right: Tensor  # (M,) bool; with several random orders, in how many of them it is right, in [0, 1]
    classes: Tensor | None  # (M,) the images' own labels, where accuracy is the mean over classes

    @property
    def accuracy(self) -> float:
        """In [0, 1]: the mean over images, or over classes."""
        return (self.right.double() if self.classes is None else mean_by_group(self.right, self.classes)).mean().item()


class Evaluator:
    """Logits of any weights of one experiment on any of its splits; images and the module are loaded once.

    Several processes fill the cache together; all of them must ask for the same logits in the same order.
    """

    def __init__(self, config: Experiment, processes: Processes | None = None):
        self.config = config
        self.processes = processes or single_process()
        self.run = RunFolder.of(config)
        self._splits: dict[str, Examples] = {}

    @cached_property
    def model(self) -> "Network":
        """The network on this process's device, with random weights until others are loaded."""
        from models.classifier import architecture  # noqa: PLC0415

        use_kernels(self.config.compute, self.processes.device)
        model = architecture(self.config.model, self.config.task.size, self.config.task.answers)
        return model.channels_last(self.config.compute.channels_last).to(self.processes.device)

    def split(self, name: str) -> Examples:
        """The examples and labels of a split."""
        if name not in self._splits:
            refuse_overlaps(self.config.task, self.config.paths.runs)
            self._splits[name] = load_split(self.config.task, name)
        return self._splits[name]

    def inputs(self, split: str) -> ImageSplit | TokenSplit:
        """The network's inputs, in training and evaluation: images, or texts as token ids."""
        if self.config.task.is_text:
            self.split(split)
            return token_split(self.config.model, self.config.task, split)
        return self.split(split)  # type: ignore[return-value]  # images, since the task has no texts

    def order(self, split: str) -> Tensor:
        """(N,) the order in which a split's examples pass the network: texts are beside texts of their length."""
        inputs = self.inputs(split)
        return longest_first(inputs.lengths) if isinstance(inputs, TokenSplit) else torch.arange(len(inputs))

    def batches(self, split: str, rows: Tensor | None = None) -> Iterator[Tensor]:
        """(b, 3, S, S) uint8 images under the model's evaluation transform, or (b, L) token ids, of `rows`."""
        compute, inputs = self.config.compute, self.inputs(split)
        rows = self.order(split) if rows is None else rows
        if isinstance(inputs, TokenSplit):
            return (inputs.batch(part) for part in (rows.split(self.batch_size) if len(rows) else ()))
        return eval_batches(
            inputs,
            eval_transform(self.config.model),
            batch=self.batch_size,
            rows=rows,
            workers=compute.loader_workers,
            # The training split is read once, for the linear probe, and is too large to keep.
            decoded=compute.decoded if split != self.config.task.train else None,
        )

    def together(self, split: str) -> Tensor:
        """All inputs of a small split in one tensor, in its own order: (N, 3, S, S) images, or (N, L) token ids."""
        inputs = self.inputs(split)
        if isinstance(inputs, TokenSplit):
            return inputs.batch(torch.arange(len(inputs)))
        return torch.cat(list(self.batches(split)))

    @cached_property
    def batch_size(self) -> int:
        """Examples a forward pass, the same in all processes: as the config says, or as many as fit on the GPU."""
        compute, model = self.config.compute, self.model
        if compute.eval_batch is not None:
            return compute.eval_batch
        with torch.no_grad():
            outputs = partial(_outputs, model.eval(), model, precision=compute.evaluates_in)
            found = partial(found_batch_size, outputs, largest_input(self.config.model), model.device)
            return found_by_all(found, self.processes)

    def features_place(self, split: str) -> Path:
        """The folder of a split's features by the model's tower as it is, named by all that they depend on."""
        tower = digest({name: tensor.cpu() for name, tensor in self._classifier.tower.state_dict().items()})
        return self.place("features", split, tower).with_suffix("")

    @property
    def _classifier(self) -> "Classifier":
        from models.classifier import Classifier  # noqa: PLC0415

        assert isinstance(self.model, Classifier)  # a prompted language model has no head to be probed
        return self.model

    def _feature_shards(self, split: str) -> list[tuple[Path, Tensor]]:
        shards = self.order(split).split(FEATURES_SHARD)
        return [(self.features_place(split) / f"{i:05d}.npy", rows) for i, rows in enumerate(shards)]

    def fill_features(self, split: str) -> None:
        """Compute the features of a split that are not kept yet; all processes call it, each fills every W-th shard."""
        model, processes = self._classifier, self.processes
        width = model.head.in_features
        shards = self._feature_shards(split)[processes.rank :: processes.world]
        missing = [(path, rows) for path, rows in shards if stored_array(path, (len(rows), width)) is None]
        if not any_of(bool(missing), processes):
            return
        _ = self.batch_size  # all processes agree on it, also those that miss nothing
        found = torch.empty(0, width)
        # One loader for all of them, whose workers take seconds to start.
        for batch in self.batches(split, torch.cat([rows for _, rows in missing])) if missing else ():
            found = torch.cat([found, forward(model, [batch], self.config.compute.evaluates_in, model.features)])
            while missing and len(found) >= len(missing[0][1]):
                path, rows = missing.pop(0)
                write_array(path, found[: len(rows)].numpy())
                found = found[len(rows) :]
        wait_for_all(processes)

    def features(self, split: str) -> Tensor:
        """(N, width) float32 features of a split by the model's tower as it is, from the cache or to fill it."""
        width = self._classifier.head.in_features
        self.fill_features(split)
        whole = torch.empty(len(self.split(split)), width)
        for path, rows in self._feature_shards(split):
            whole[rows] = torch.from_numpy(read_array(path, (len(rows), width)))
        return whole

    def place(self, what: str, split: str, weights: str) -> Path:
        """The file of an array with numbers for each example of a split, named by all that they depend on.

        `weights` is their digest, and whatever else counts beside the examples and their transform.
        """
        inputs, compute = self.inputs(split), self.config.compute
        precision = arithmetic(compute.evaluates_in, tf32=compute.tf32)
        transform = inputs.key if isinstance(inputs, TokenSplit) else eval_transform(self.config.model).key
        parts = {"weights": weights, "images": self.split(split).digest, "transform": transform, "precision": precision}
        return self.run.root / what / split / f"{digest_of(parts)}.npy"

    def fresh_logits(self, weights: Weights, split: str, rows: Tensor | None = None) -> Tensor:
        """(N, C) float32 logits by a forward pass, not kept, in the order of the split; of `rows` alone, in theirs."""
        self.model.load_state_dict(dict(weights), strict=True)
        order = self.order(split) if rows is None else rows
        found = forward(self.model, self.batches(split, order), self.config.compute.evaluates_in)
        return found if rows is not None else torch.empty_like(found).index_copy_(0, order, found)

    def logits(self, name: str, load: Callable[[], Weights], split: str) -> Tensor:
        """(N, C) float32 logits of weights with the digest `name`, from the cache or by a pass that fills it."""
        shape, path = (len(self.split(split)), self.config.task.size), self.place("logits", split, name)
        if self.processes.world == 1:
            return cached_array(path, shape, lambda: self.fresh_logits(load(), split))
        stored = stored_array(path, shape) if self.processes.is_main else None
        kept = [] if stored is None else [stored]  # on the first process; on the others it stays empty
        if not first_decides(lambda: bool(kept), self.processes):
            self.load_on_all(load)
            kept = self._filled_together(shape, split)
            first_decides(lambda: write_array(path, kept[0].numpy()), self.processes)
        return from_the_first(kept, shape, self.processes)

    def _filled_together(self, shape: tuple[int, int], split: str) -> list[Tensor]:
        """Logits of the model as it is, on the first process; each of W processes computes every W-th batch."""
        rows = shares_of_batches(self.order(split), self.batch_size, self.processes.world)
        batches = self.batches(split, rows[self.processes.rank])
        parts = on_the_first(forward(self.model, batches, self.config.compute.evaluates_in), self.processes)
        whole = torch.empty(shape)
        for examples, part in zip(rows, parts, strict=False):
            whole[examples] = part
        return [whole] if parts else []

    def load_on_all(self, load: Callable[[], Weights]) -> None:
        """Give the model of every process the weights that the first one loads."""
        first_decides(lambda: self.model.load_state_dict(dict(load()), strict=True) is None, self.processes)
        send_tensors(self.model.state_dict().values(), self.processes)

    def logits_of_file(self, name: str, path: Path, split: str) -> Tensor:
        """(N, C) float32 logits, as `logits`, of a file of weights with `name` as its recorded digest."""
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
        """The score by the task's metric for a split: in [0, 1], or [-1, 1] for matthews."""
        images, metric = self.split(split), self.config.task.metrics.get(split, "top1")
        return score(metric, self.predicted(logits, split), images.labels, images.groups)

    def scored(self, logits: Tensor, split: str) -> dict[str, Any]:
        """A record of logits: how many of a split's n examples are right; the task's score where it is not top-1."""
        (right, n), metric = self.count(logits, split), self.config.task.metrics.get(split, "top1")
        record: dict[str, Any] = {"split": split, "correct": right, "n": n}
        return record if metric == "top1" else record | {"metric": metric, "score": self.score(logits, split)}

    @cached_property
    def annotations(self) -> dict[str, Tensor]:
        """Annotation of the test split -> (N, C) bool, as `tasks.load.load_annotations`."""
        return load_annotations(self.config.task)

    def annotated(self, logits: Tensor) -> dict[str, Annotated]:
        """Results by each annotation of the test split (Beyer et al. 2020, Section 3; Shankar et al. 2020, 2)."""
        if not self.annotations:
            return {}
        test = self.config.task.test
        seen, labels = self.projected(logits, test), self.split(test).labels
        found = {}
        for name, answers in self.annotations.items():
            classes = labels[answers.any(dim=1)] if name == "multilabel" else None
            found[name] = Annotated(correct_in_sets(seen, answers), classes)
        return found

    def count(self, logits: Tensor, split: str) -> tuple[int, int]:
        """How many of a split's examples these logits get right, and how many there are."""
        return int(self.hits(logits, split).sum()), len(logits)
