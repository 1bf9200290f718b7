"""The global generators of a training process, seeded by keys."""

import random

import numpy as np
import torch

from soups.chance import bits, seed


def seed_sample(*key: object) -> None:
    """Seed the three global generators of the CPU that timm's and torchvision's augmentations draw from.

    Called before every sample, so that sample j of epoch e looks the same whichever process or restart makes it.
    """
    number = bits(*key)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number >> 1)  # torch.manual_seed also formats a traceback for each device


def seed_globals(*key: object) -> None:
    """Seed every global generator, of GPUs too, from which a step draws its mixing and its dropout."""
    seed_sample(*key)
    torch.cuda.manual_seed_all(seed(*key))  # waits until there is a GPU in use; CPU-only machines have none to seed
