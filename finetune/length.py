"""How many steps a training has, and how many processes can take them together."""

from dataclasses import dataclass

from configs.errors import UserError
from configs.training import Optim


class LargeBatchError(UserError):
    """A batch is larger than the training set."""


@dataclass(frozen=True)
class Length:
    """How long a training is."""

    examples: int  # in the training set
    batch_size: int  # over all processes
    steps_per_epoch: int  # the last incomplete batch of an epoch is dropped
    steps: int  # in the whole training

    @classmethod
    def of(cls, optim: Optim, examples: int) -> "Length":
        """Steps where the config says so, else its epochs; raises `LargeBatchError`."""
        steps_per_epoch = examples // optim.batch_size
        if steps_per_epoch == 0:
            raise LargeBatchError(f"optim.batch_size={optim.batch_size} is more than the {examples} training images")
        steps = optim.steps or optim.epochs * steps_per_epoch
        return cls(examples, optim.batch_size, steps_per_epoch, steps)

    @property
    def epochs(self) -> int:
        """How many epochs begin; the last one may be cut short by the steps."""
        return -(-self.steps // self.steps_per_epoch)


def largest_world(optim: Optim, world: int) -> int:
    """The largest number of processes up to `world` that share each batch of a row equally; at least 1.

    A batch is divided by whole pairs of mixup (`finetune.data.local_batch`), so it must divide the B / 2 pairs.
    """
    pairs = optim.batch_size // 2
    return next(size for size in range(min(world, pairs), 0, -1) if pairs % size == 0)


def refuse_unequal_shares(optim: Optim, world: int) -> None:
    """Raise a UserError where `world` processes would take unequal parts of a row's batches.

    One would gather sharded parameters while another waits for something else, for ever.
    """
    fits = largest_world(optim, world)
    if fits != world:
        raise UserError(
            f"{world} processes cannot share optim.batch_size={optim.batch_size} equally, by whole pairs of images: "
            f"start {fits}, or make the batch a multiple of {2 * world}"
        )
