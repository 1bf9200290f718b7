"""How many steps a training has, and how many processes can take them together."""

from dataclasses import dataclass

from configs.errors import UserError
from configs.training import Optim


class LargeBatchError(UserError):
    """A batch is larger than the training set."""


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
            LargeBatchError: a batch larger than the training set.
        """
        steps_per_epoch = images // optim.batch_size
        if steps_per_epoch == 0:
            raise LargeBatchError(f"optim.batch_size={optim.batch_size} is more than the {images} training images")
        steps = optim.steps or optim.epochs * steps_per_epoch
        return cls(images, optim.batch_size, steps_per_epoch, steps)

    @property
    def epochs(self) -> int:
        """The last one may be cut short by the steps."""
        return -(-self.steps // self.steps_per_epoch)


def refuse_unequal_shares(optim: Optim, world: int) -> None:
    """Refuse processes that would not take as many forward passes as each other, of the same sizes.

    A batch is divided by whole pairs of mixup, image i with image B - 1 - i (`finetune.data.local_batch`), so `world`
    must divide the B / 2 pairs. Equal parts are cut into equal micro-batches. With unequal ones, sharded parameters
    would be gathered by one process while another waits for something else, for ever.

    Args:
        optim: of the row.
        world: processes that train the row together.

    Raises:
        UserError: they cannot share a batch equally.
    """
    fits = largest_world(optim, world)
    if fits != world:
        raise UserError(
            f"{world} processes cannot share optim.batch_size={optim.batch_size} equally, by whole pairs of images: "
            f"start {fits}, or make the batch a multiple of {2 * world}"
        )


def largest_world(optim: Optim, world: int) -> int:
    """The largest number of processes up to `world` that share each batch of a row equally; at least 1.

    >>> optim = Optim(lr=1.0, weight_decay=0, epochs=1, batch_size=24, warmup_steps=0, clip_norm=1, label_smoothing=0,
    ...               mixup=0)
    >>> [largest_world(optim, world) for world in (1, 4, 8, 64)]
    [1, 4, 6, 12]
    """
    pairs = optim.batch_size // 2
    return next(size for size in range(min(world, pairs), 0, -1) if pairs % size == 0)
