"""Folders that timm loads: timm.create_model("local-dir:FOLDER", pretrained=True)."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from soups.errors import UserError
from soups.export.network import Answer, Images, Network, loaded, of_one_input, random_pixels

USE = """
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # hf-hub:USER/NAME after a push
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("image.png").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax()])
"""


def build(name: str, weights: Mapping[str, Tensor], class_names: Sequence[str]) -> Network:
    """The network of this name with a head of as many classes as the weights have."""
    if not timm.is_model(name):
        raise UserError(f"timm knows no network {name!r}; timm.list_models() has the names")
    recorded = timm.get_pretrained_cfg(name)
    assert recorded is not None  # of every network that timm knows
    heads: Any = recorded.classifier
    head = heads if isinstance(heads, str) else (heads or ("",))[0]
    if f"{head}.weight" not in weights:
        raise UserError(f"the soup has no head {head!r}.weight, which timm's {name} has")
    classes = len(weights[f"{head}.weight"])
    names = tuple(class_names) or tuple(map(str, range(classes)))
    if len(names) != classes:
        raise UserError(f"{len(names)} names of classes were given, and the soup's head {head!r} has {classes}")
    try:
        module = loaded(timm.create_model(name, num_classes=classes), weights, f"timm's {name}")
    except UserError:
        if not recorded.fixed_input_size or "pos_embed" not in weights:
            raise
        module = loaded(_of_its_size(name, weights, classes), weights, f"timm's {name}")
    seen = _seen(module)
    return Network(name, module, of_one_input, random_pixels("images", seen.size), names, seen)


def _of_its_size(name: str, weights: Mapping[str, Tensor], classes: int) -> nn.Module:
    """A vision transformer for pictures of the size that its position embeddings tell."""
    plain: Any = timm.create_model(name, num_classes=classes)
    extra = plain.pos_embed.shape[1] - plain.patch_embed.num_patches
    side = math.isqrt(weights["pos_embed"].shape[1] - extra)
    return timm.create_model(name, num_classes=classes, img_size=side * plain.patch_embed.patch_size[0])


def _seen(module: nn.Module) -> Images:
    settings = resolve_data_config({}, model=module)
    size = settings["input_size"][-1]
    squash = settings["crop_mode"] == "squash"
    return Images(size, math.floor(size / settings["crop_pct"]), squash, settings["mean"], settings["std"])


def write(network: Network, folder: Path) -> None:
    """config.json and model.safetensors, as timm pushes them to the hub."""
    images = network.images
    assert images is not None  # all of timm's networks are of pictures
    seen: dict[str, Any] = {"input_size": (3, images.size, images.size), "crop_pct": images.size / images.resize}
    seen |= {"crop_mode": "squash" if images.squash else "center", "interpolation": "bicubic"}
    seen |= {"mean": images.mean, "std": images.std}
    labels = {"label_names": list(network.class_names)}
    module: Any = network.module
    save_for_hf(module, str(folder), model_config=labels, data_config=seen, safe_serialization=True)


def read(folder: Path, network: Network) -> Answer:
    """As anyone would load it."""
    module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return partial(of_one_input, module)
