"""Training images: timm's and torchvision's augmentations, seeded for each sample by what it is."""

from collections.abc import Callable

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, ToNumpy
from torch import Tensor
from torchvision.transforms import Compose, RandomHorizontalFlip

from configs.chance import seed_globals
from configs.training import Augment

WHITE = (255, 255, 255)  # what RandAugment's geometric operations fill with


def augmentation(augment: Augment, size: int) -> Callable[[Image.Image], object]:
    """PIL image to a (3, size, size) uint8 array.

    `minimal` is a random crop alone; `rand` adds a horizontal flip and RandAugment as timm reads "rand-m{M}-n{N}"
    (magnitudes act up to 10, each operation fires with probability 0.5).

    Source: Appendix J.2.1; the released hyperparameters name timm's strings.
    """
    crop = RandomResizedCropAndInterpolation(size, scale=(augment.crop, 1.0), interpolation="bicubic")
    match augment.kind:
        case "minimal":
            steps = [crop]
        case "rand":
            policy = f"rand-m{augment.magnitude}-n{augment.layers}{'-inc1' if augment.increasing else ''}"
            settings = {"img_mean": WHITE, "translate_const": int(0.45 * size)}
            steps = [crop, RandomHorizontalFlip(augment.flip), rand_augment_transform(policy, settings)]
    return Compose([*steps, ToNumpy()])


def augmented_batch(
    images: Tensor, indices: Tensor, transform: Callable[[Image.Image], object], *key: object
) -> Tensor:
    """(B, 3, size, size) uint8: the images at `indices`, each augmented by chance keyed with (*key, its index).

    Args:
        images: (N, 3, H, W) uint8.
        indices: (B,) integers.
        transform: from `augmentation`.
        key: names the run and the epoch.
    """
    batch = []
    for index in indices.tolist():
        seed_globals(*key, index)
        batch.append(torch.as_tensor(transform(Image.fromarray(images[index].permute(1, 2, 0).numpy()))))
    return torch.stack(batch)
