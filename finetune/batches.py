"""What every step of a training sees; a sample depends on its key alone, not on who makes it or when."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from configs.chance import seed, seed_globals
from configs.errors import UserError
from configs.training import Augment, Optim
from finetune.augment import augment_of_epoch, augmentation
from finetune.parallel import share
from store.processes import Processes
from tasks.split import Images


@dataclass(frozen=True)
class Length:
    """How long a training is."""

    images: int  # of the training set
    batch_size: int  # over all processes
    steps_per_epoch: int  # the last incomplete batch of an epoch is dropped
    steps: int  # of the whole training

    @classmethod
    def of(cls, optim: Optim, images: int) -> "Length":
        """Steps where the config says so, else its epochs.

        Raises:
            UserError: a batch larger than the training set.
        """
        steps_per_epoch = images // optim.batch_size
        if steps_per_epoch == 0:
            raise UserError(f"optim.batch_size={optim.batch_size} is more than the {images} training images")
        steps = optim.steps or optim.epochs * steps_per_epoch
        return cls(images, optim.batch_size, steps_per_epoch, steps)

    @property
    def epochs(self) -> int:
        """The last one may be cut short by the steps."""
        return -(-self.steps // self.steps_per_epoch)


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
