"""How many steps a training has."""

from dataclasses import dataclass

from configs.errors import UserError
from configs.training import Optim


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
