"""What every step of a training sees; a sample depends on its key alone, not on who makes it or when."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from configs.chance import seed, seed_globals
from configs.schema import Experiment
from configs.training import Augment, Compute
from finetune.augment import augment_of_epoch, augmentation
from finetune.length import Length
from finetune.parallel import share
from models.tokens import TokenSplit, alike_in_length
from store.processes import Processes
from tasks.split import Images

WINDOW = 50  # batches of texts within which those of like length meet


@lru_cache(maxsize=2)
def epoch_order(n: int, run_seed: int, epoch: int) -> Tensor:
    """(n,) the order of the training images in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed(run_seed, "order", epoch)))


@dataclass(frozen=True)
class TrainingBatches(Dataset[Tensor]):
    """This process's share of the images of each step, augmented; a step's batch is made whole by one worker."""

    images: Images
    augment: Augment
    size: int  # pixels, square
    length: Length
    run_seed: int  # of order and augmentation
    processes: Processes
    first: int = 0  # the step of batch 0

    def __len__(self) -> int:
        return self.length.steps - self.first

    def indices(self, step: int) -> Tensor:
        """(b,) which training images a step takes, counted from 0."""
        epoch, batch = divmod(step, self.length.steps_per_epoch)
        order, size = epoch_order(self.length.images, self.run_seed, epoch), self.length.batch_size
        return share(order[batch * size : (batch + 1) * size], self.processes)

    def workers(self, compute: Compute) -> int:
        """Processes that make batches ahead."""
        return compute.loader_workers

    def __getitem__(self, batch: int) -> Tensor:
        """(b, 3, size, size) uint8."""
        step = self.first + batch
        epoch = step // self.length.steps_per_epoch
        transform = augmentation(augment_of_epoch(self.augment, epoch, self.length.epochs), self.size)
        samples = []
        for index in self.indices(step).tolist():
            seed_globals(self.run_seed, "image", epoch, index)
            samples.append(torch.as_tensor(transform(self.images.pil(index))))
        return default_collate(samples)  # stacks them, a worker at once where the other process will read them


@dataclass(frozen=True)
class TextBatches(Dataset[Tensor]):
    """This process's share of the texts of each step, as token ids that are padded to the longest of them."""

    texts: TokenSplit
    length: Length
    run_seed: int  # of the order
    processes: Processes
    first: int = 0  # the step of batch 0

    def __len__(self) -> int:
        return self.length.steps - self.first

    def indices(self, step: int) -> Tensor:
        """(b,) which training texts a step takes, counted from 0."""
        epoch, batch = divmod(step, self.length.steps_per_epoch)
        order, size = text_order(self.texts, self.length.batch_size, self.run_seed, epoch), self.length.batch_size
        return share(order[batch * size : (batch + 1) * size], self.processes)

    def workers(self, compute: Compute) -> int:
        """None: texts are in memory, and padding them is no work for another process."""
        return 0

    def __getitem__(self, batch: int) -> Tensor:
        """(b, L) int64."""
        return self.texts.batch(self.indices(self.first + batch))


@lru_cache(maxsize=2)
def text_order(texts: TokenSplit, batch: int, run_seed: int, epoch: int) -> Tensor:
    """(n,) the order of the training texts in an epoch, whose batches are alike in length."""
    generator = torch.Generator().manual_seed(seed(run_seed, "batches", epoch))
    return alike_in_length(epoch_order(len(texts), run_seed, epoch), texts.lengths, batch, WINDOW, generator)


def training_batches(
    train: Images | TokenSplit,
    config: Experiment,
    length: Length,
    *,
    run_seed: int,
    processes: Processes,
    first: int,
) -> TrainingBatches | TextBatches:
    """The batches of a training from step `first` on, of images or of texts."""
    if isinstance(train, TokenSplit):
        return TextBatches(train, length, run_seed, processes, first)
    return TrainingBatches(train, config.augment, config.model.image_size, length, run_seed, processes, first)
