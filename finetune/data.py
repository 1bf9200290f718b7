"""Training batches: augmented images or padded texts. A sample depends on its key, not on who makes it or when."""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from simplejpeg import decode_jpeg
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from torchvision.transforms import ColorJitter, Compose, RandomHorizontalFlip
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import ColorJitter as ColorJitterOfPixels

from configs.schema import Experiment
from configs.training import Augment, Optim
from finetune.length import Length
from models.tokens import TokenSplit, alike_in_length
from soups.chance import bits, seed
from store.processes import Processes
from tasks.files import Files
from tasks.split import Pictures, Pixels

WHITE = (1.0, 1.0, 1.0)
MINIMAL_CROP = 0.9  # Appendix J.2.1: crops of 90 % and more of the image
TIMM_CROP = 0.08  # timm's default for ImageNet, which all stronger kinds start from
WINDOW = 50  # batches of texts within which those of like length meet

Transform = Callable[[Any], object]  # takes a PIL image, or (3, H, W) uint8 pixels
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # inputs and labels to inputs and (b, C) targets


def seed_sample(*key: object) -> None:
    """Seed the CPU's three global generators, from which augmentations draw: a sample depends on its key alone."""
    number = bits(*key)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number >> 1)  # torch.manual_seed also formats a traceback for each device


def seed_globals(*key: object) -> None:
    """Seed every global generator, of GPUs too, from which a step draws its mixing and its dropout."""
    seed_sample(*key)
    torch.cuda.manual_seed_all(seed(*key))  # waits until there is a GPU in use; CPU-only machines have none to seed


def augmentation_of_epoch(augment: Augment, epoch: int, epochs: int) -> Augment:
    """The augmentation of an epoch, counted from 0: fix-aug ends with epochs of minimal augmentation (Table L.2)."""
    if epoch < epochs - augment.last_epochs_minimal:
        return augment
    return Augment(kind="minimal", crop=MINIMAL_CROP)  # type: ignore[call-arg]  # mypy sees no dataclass in `closed`


def pixels_of(images: Pictures, index: int) -> Tensor:
    """(3, H, W) uint8 pixels of an image, RGB, those of Pillow in less time (of CMYK files, to two levels).

    Pillow decodes what is no JPEG file, or one that simplejpeg does not read without a warning.
    """
    if isinstance(images, Pixels):
        return images.images[index]
    if not (isinstance(images, Files) and images.border):
        content = images.content(index)
        if content.startswith(b"\xff\xd8"):  # the first bytes of every JPEG file
            with suppress(ValueError):
                return torch.from_numpy(decode_jpeg(content)).permute(2, 0, 1)
    return pil_to_tensor(images.pil(index))


class _CropOfPixels(RandomResizedCropAndInterpolation):
    """timm's random crop of (3, H, W) uint8 pixels, resized as Pillow does, to one level, in a fifth of the time."""

    def __call__(self, pixels: Tensor) -> Tensor:
        top, left, height, width = self.get_params(pixels, self.scale, self.ratio)
        is_random = isinstance(self.interpolation, tuple)
        interpolation: Any = random.choice(self.interpolation) if is_random else self.interpolation
        part = pixels[None, :, top : top + height, left : left + width]
        return interpolate(part, self.size, mode=interpolation.value, antialias=True)[0]


# Band by band, both ways: a strided array is copied element by element.
def _to_array(image: Image.Image) -> NDArray[np.uint8]:
    return np.stack([np.asarray(band) for band in image.split()])


def _to_pil(pixels: Tensor) -> Image.Image:
    return Image.merge("RGB", [Image.fromarray(band) for band in pixels.numpy()])


def augmentation(augment: Augment, size: int, mean: Sequence[float] = WHITE, *, from_pixels: bool = False) -> Transform:
    """An image, PIL's or with `from_pixels` that of `pixels_of`, to (3, size, size) uint8.

    All kinds crop at random. `minimal` does nothing else; `medium` adds a flip and colour jitter, timm's default for
    ImageNet; `rand` a flip and RandAugment as timm reads "rand-m{M}-n{N}" (each operation fires with probability 0.5,
    and M acts up to `magnitude_max`); `auto` a flip and AutoAugment's policy for ImageNet; `stochastic` chooses one
    of several anew for each sample. What comes from beyond the edges is white, or with `fill: mean` the RGB `mean`.

    Source: Appendices J.2 and L; the released hyperparameters name timm's strings. Cubuk et al. 2019, 2020.
    """
    if augment.kind == "stochastic":
        return _OneOf([augmentation(each, size, mean, from_pixels=from_pixels) for each in augment.among])
    ratio = (augment.aspect, 1 / augment.aspect)
    interpolation = "random" if augment.kind == "medium" else "bicubic"
    jitter = 3 * (augment.color_jitter,)
    crop = augment.crop or (MINIMAL_CROP if augment.kind == "minimal" else TIMM_CROP)
    kind = _CropOfPixels if from_pixels else RandomResizedCropAndInterpolation
    steps: list[Any] = [kind(size, (crop, 1.0), ratio, interpolation)]
    if augment.kind != "minimal":
        steps.append(RandomHorizontalFlip(augment.flip))
    if from_pixels and augment.kind in ("minimal", "medium"):  # a third of Pillow's time
        return Compose([*steps, *([ColorJitterOfPixels(*jitter)] if augment.kind == "medium" else [])])
    steps += [_to_pil] if from_pixels else []  # RandAugment's operations are timm's, which are Pillow's
    fill = tuple(min(255, round(255 * value)) for value in (mean if augment.fill == "mean" else WHITE))
    settings = {"img_mean": fill, "translate_const": int(0.45 * size)}
    match augment.kind:
        case "medium":
            steps.append(ColorJitter(*jitter))
        case "rand":
            policy = f"rand-m{augment.magnitude}-mmax{augment.magnitude_max}-n{augment.layers}"
            policy += "-inc1" if augment.increasing else ""
            steps.append(rand_augment_transform(policy, settings))
        case "auto":
            steps.append(auto_augment_transform("original", settings))
    return Compose([*steps, _to_array])


class _OneOf:
    """A transform that is one of several, equally likely; a class, since loaders send it to other processes."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = transforms

    def __call__(self, image: Any) -> object:
        return random.choice(self.transforms)(image)


def local_batch(indices: Tensor, processes: Processes) -> Tensor:
    """This process's part of a batch: every W-th image of the first half, and their partners.

    Mixup pairs image i of an even batch of B with image B - 1 - i. Each process gets whole pairs, in an order in which
    its part pairs them in the same way, so that all processes together see the very batch that one alone would see.

    >>> local_batch(torch.arange(6), Processes(1, 2, torch.device("cpu")))
    tensor([1, 4])
    """
    first = torch.arange(processes.rank, len(indices) // 2, processes.world)
    return indices[torch.cat([first, len(indices) - 1 - first.flip(0)])]


@lru_cache(maxsize=2)
def epoch_order(n: int, run_seed: int, epoch: int) -> Tensor:
    """(n,) the order of the training images in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed(run_seed, "order", epoch)))


@lru_cache(maxsize=2)
def text_order(texts: TokenSplit, batch: int, run_seed: int, epoch: int) -> Tensor:
    """(n,) the order of the training texts in an epoch, whose batches are alike in length."""
    generator = torch.Generator().manual_seed(seed(run_seed, "batches", epoch))
    return alike_in_length(epoch_order(len(texts), run_seed, epoch), texts.lengths, batch, WINDOW, generator)


@dataclass(frozen=True)
class TrainingBatches:
    """This process's part of each step's batch: images, augmented, or texts as token ids; a worker makes all of it."""

    examples: Pictures | TokenSplit
    config: Experiment  # of the row
    length: Length
    run_seed: int  # seeds order and augmentation
    processes: Processes
    mean: tuple[float, ...] = WHITE  # RGB in [0, 1] that the model subtracts from images

    def indices(self, step: int) -> Tensor:
        """(b,) which examples this process takes in a step, counted from 0."""
        epoch, batch = divmod(step, self.length.steps_per_epoch)
        size = self.length.batch_size
        if isinstance(self.examples, TokenSplit):
            order = text_order(self.examples, size, self.run_seed, epoch)
        else:
            order = epoch_order(self.length.examples, self.run_seed, epoch)
        return local_batch(order[batch * size : (batch + 1) * size], self.processes)

    @property
    def workers(self) -> int:
        """Processes that make batches ahead; none for texts, which are in memory and are only padded."""
        return 0 if isinstance(self.examples, TokenSplit) else self.config.compute.loader_workers

    @property
    def bytes_each(self) -> int:
        """Size of this process's part of a batch of images."""
        return 3 * self.config.model.image_size**2 * (self.length.batch_size // self.processes.world)

    def __getitem__(self, step: int) -> Tensor:
        """(b, 3, size, size) uint8; (b, L) int64 token ids, padded to the longest text."""
        if isinstance(self.examples, TokenSplit):
            return self.examples.batch(self.indices(step))
        epoch, fast = step // self.length.steps_per_epoch, self.config.compute.decoder == "simplejpeg"
        augment = augmentation_of_epoch(self.config.augment, epoch, self.length.epochs)
        transform = augmentation(augment, self.config.model.image_size, self.mean, from_pixels=fast)
        samples = []
        for index in self.indices(step).tolist():
            seed_sample(self.run_seed, "image", epoch, index)
            image = pixels_of(self.examples, index) if fast else self.examples.pil(index)
            samples.append(torch.as_tensor(transform(image)))
        return default_collate(samples)  # stacks them, a worker at once where the other process will read them


def mixing(optim: Optim, classes: int) -> Mix:
    """timm's mixup and CutMix of a batch, which also smooth the labels; one coefficient a batch."""
    return Mixup(
        optim.mixup,
        optim.cutmix,
        prob=float(optim.mixup > 0 or optim.cutmix > 0),
        label_smoothing=optim.label_smoothing,
        num_classes=classes,
    )


def mixed_batch(
    batch: Tensor, labels: Tensor, mix: Mix, *, run_seed: int, step: int, processes: Processes
) -> tuple[Tensor, Tensor]:
    """Inputs and (b, C) targets of a step on this process's device; uint8 pixels become float32 and are mixed.

    All processes mix alike; what is drawn later, as by dropout, is seeded by process too.
    """
    seed_globals(run_seed, "mixup", step)
    inputs = batch.to(processes.device, non_blocking=True)
    inputs = inputs.float() if inputs.dtype == torch.uint8 else inputs
    found = mix(inputs, labels.to(processes.device, non_blocking=True))
    if processes.world > 1:
        seed_globals(run_seed, "dropout", step, processes.rank)
    return found
