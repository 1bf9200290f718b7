"""Batches of augmented images; what a sample looks like depends on its key alone, not on who makes it or when."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from configs.chance import seed_globals
from tasks.split import Images

Transform = Callable[[Image.Image], object]


@dataclass(frozen=True)
class _Batches(Dataset[Tensor]):
    """The batches of an epoch, each made whole by one worker."""

    images: Images
    indices: Sequence[Tensor]
    transform: Transform
    key: tuple[object, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, batch: int) -> Tensor:
        samples = []
        for index in self.indices[batch].tolist():
            seed_globals(*self.key, index)
            samples.append(torch.as_tensor(self.transform(self.images.pil(index))))
        return torch.stack(samples)


def training_batches(
    images: Images, indices: Sequence[Tensor], transform: Transform, key: tuple[object, ...], workers: int
) -> Iterator[Tensor]:
    """(B, 3, size, size) uint8 batches, one for each of `indices`, each image augmented by chance of its own.

    Args:
        images: of the training split.
        indices: (B,) integers for each batch.
        transform: from `finetune.augment.augmentation`.
        key: names the run and the epoch; (*key, index) seeds a sample.
        workers: processes that decode and augment ahead; 0 makes batches here. The batches do not depend on it.
    """
    batches = _Batches(images, indices, transform, key)
    if workers == 0:
        for batch in range(len(batches)):
            yield batches[batch]
        return
    # Spawned, since a forked copy of a process with torch threads may wait for them for ever.
    yield from DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, max(1, len(batches))),
        multiprocessing_context="spawn",
        pin_memory=torch.cuda.is_available(),
    )
