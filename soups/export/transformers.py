"""Folders that transformers loads: ARCHITECTURE.from_pretrained("FOLDER")."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from soups.errors import UserError
from soups.export.network import Answer, Images, Inputs, Network, random_pixels
from soups.folder import copy_companions
from soups.scorers.networks import from_pretrained

USE = """
from transformers import ARCHITECTURE

model = ARCHITECTURE.from_pretrained("FOLDER").eval()  # USER/NAME after a push
"""
LENGTH = 6  # tokens of a random text


def build(name: str, weights: Mapping[str, Tensor], class_names: Sequence[str]) -> Network:
    """The network that a folder's config.json describes (or that of a name on the hub), with the weights."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers:{name} has no config.json ({str(error).splitlines()[0]})") from None
    made = (config.architectures or [""])[0]
    kind = getattr(transformers, made, None) if made else None
    if kind is None:
        raise UserError(f"transformers:{name}: its config.json names no architecture that transformers has ({made!r})")
    if class_names:
        if len(class_names) != config.num_labels:
            raise UserError(f"{len(class_names)} names of classes were given, and {made} has {config.num_labels}")
        config.id2label = dict(enumerate(class_names))
        config.label2id = {label: i for i, label in enumerate(class_names)}
    # By transformers itself, which knows under which names older versions saved a tensor.
    more = {"config": config, "state_dict": dict(weights)}
    module = from_pretrained(kind, None, "the soup", network=f"transformers:{name}", **more).eval()
    folder = Path(name) if Path(name).is_dir() else None
    size = getattr(config, "image_size", None)
    images = None
    if module.main_input_name == "pixel_values":
        images = _images(name)
        size = images.size if size is None else size
    labels = tuple(config.id2label[i] for i in range(config.num_labels)) if made.endswith("Classification") else ()
    pad = getattr(config, "pad_token_id", None)
    return Network(made, module, _answer, _inputs(module, size), labels, images, 0 if pad is None else pad, {}, folder)


def _images(name: str) -> Images:
    try:
        reader: Any = AutoImageProcessor.from_pretrained(name)
        sizes: dict[str, Any] = dict(reader.size)
        crop: dict[str, Any] = dict(getattr(reader, "crop_size", None) or sizes)
        squash = "height" in sizes
        side = sizes["height"] if squash else sizes["shortest_edge"]
        size = int(crop.get("height", side))
        return Images(size, int(side), squash, tuple(reader.image_mean), tuple(reader.image_std))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers:{name} has no usable preprocessor_config.json ({error})") from None


def _inputs(module: Any, size: int | None) -> Any:
    config = module.config

    def texts(count: int) -> Inputs:
        ids = torch.randint(0, config.vocab_size, (count, LENGTH), generator=torch.Generator().manual_seed(count))
        named = {"input_ids": ids}
        return named | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})

    if module.main_input_name == "pixel_values":
        return random_pixels("pixel_values", size or 1)
    return texts


def _answer(module: nn.Module, inputs: Inputs) -> Tensor:
    dtype = next(module.parameters()).dtype
    found = module(**{name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()})
    logits: Tensor = found.logits if "logits" in found else found[0]
    return logits


def write(network: Network, folder: Path) -> None:
    """config.json, weights and what lies beside the config: a tokenizer, a preprocessor, generation settings."""
    if network.folder is not None:
        copy_companions(network.folder, folder)
    module: Any = network.module
    module.save_pretrained(folder)


def read(folder: Path, network: Network) -> Answer:
    """As anyone would load it."""
    module = getattr(transformers, network.name).from_pretrained(folder).eval()
    return partial(_answer, module)
