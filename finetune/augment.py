"""Training images: timm's and torchvision's augmentations, seeded for each sample by what it is."""

import random
from collections.abc import Callable, Sequence

from PIL import Image
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, ToNumpy
from torchvision.transforms import ColorJitter, Compose, RandomHorizontalFlip

from configs.training import Augment

WHITE = (255, 255, 255)  # what geometric operations fill with
MINIMAL_CROP = 0.9  # Appendix J.2.1: crops of 90 % and more of the image
TIMM_CROP = 0.08  # timm's default for ImageNet, which all stronger kinds start from

Transform = Callable[[Image.Image], object]


def augment_of_epoch(augment: Augment, epoch: int, epochs: int) -> Augment:
    """The augmentation of an epoch, counted from 0: fix-aug ends with epochs of minimal augmentation (Table L.2).

    >>> strong = Augment(kind="rand", layers=2, magnitude=15, last_epochs_minimal=1)
    >>> [augment_of_epoch(strong, epoch, 3).kind for epoch in range(3)]
    ['rand', 'rand', 'minimal']
    """
    if epoch < epochs - augment.last_epochs_minimal:
        return augment
    return Augment(kind="minimal", crop=MINIMAL_CROP)  # type: ignore[call-arg]  # mypy sees no dataclass in `closed`


def augmentation(augment: Augment, size: int) -> Transform:
    """PIL image to a (3, size, size) uint8 array.

    All kinds crop at random. `minimal` does nothing else; `medium` adds a flip and colour jitter, timm's default for
    ImageNet; `rand` a flip and RandAugment as timm reads "rand-m{M}-n{N}" (each operation fires with probability 0.5,
    and M acts up to `magnitude_max`); `auto` a flip and AutoAugment's policy for ImageNet; `stochastic` chooses one
    of several anew for each sample.

    Source: Appendices J.2 and L; the released hyperparameters name timm's strings. Cubuk et al. 2019, 2020.
    """
    if augment.kind == "stochastic":
        return _OneOf([augmentation(each, size) for each in augment.among])
    ratio = (augment.aspect, 1 / augment.aspect)
    interpolation = "random" if augment.kind == "medium" else "bicubic"
    crop = augment.crop or (MINIMAL_CROP if augment.kind == "minimal" else TIMM_CROP)
    steps = [RandomResizedCropAndInterpolation(size, (crop, 1.0), ratio, interpolation)]
    if augment.kind != "minimal":
        steps.append(RandomHorizontalFlip(augment.flip))
    settings = {"img_mean": WHITE, "translate_const": int(0.45 * size)}
    match augment.kind:
        case "medium":
            steps.append(ColorJitter(*3 * (augment.color_jitter,)))
        case "rand":
            policy = f"rand-m{augment.magnitude}-mmax{augment.magnitude_max}-n{augment.layers}"
            policy += "-inc1" if augment.increasing else ""
            steps.append(rand_augment_transform(policy, settings))
        case "auto":
            steps.append(auto_augment_transform("original", settings))
    return Compose([*steps, ToNumpy()])


class _OneOf:
    """A transform that is one of several, equally likely; a class, since loaders send it to other processes."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = transforms

    def __call__(self, image: Image.Image) -> object:
        return random.choice(self.transforms)(image)
