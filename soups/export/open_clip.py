"""Folders that open_clip loads: open_clip.create_model_and_transforms("local-dir:FOLDER")."""

import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from soups.errors import UserError
from soups.export.network import Answer, Inputs, Network, loaded, random_pixels
from soups.files.atomic import write_json

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
USE = """
import open_clip, torch
from PIL import Image

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")  # hf-hub:USER/NAME after a push
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
image = model.eval().encode_image(transform(Image.open("image.png"))[None], normalize=True)
text = model.encode_text(tokenizer(["a photo of a cat", "a photo of a dog"]), normalize=True)
print((100 * image @ text.T).softmax(dim=-1))
"""


def build(name: str, weights: Mapping[str, Tensor]) -> Network:
    """The dual encoder of this name, or of the open_clip_config.json in a folder, with the weights."""
    folder = Path(name) if Path(name).is_dir() else None
    logging.disable(logging.WARNING)  # of random weights, which are overwritten
    try:
        source = f"local-dir:{folder}" if folder else name
        module: Any = open_clip.create_model(source, load_weights=False, pretrained_text=False)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"open_clip has no network {name!r}: {str(error).splitlines()[0]}") from None
    finally:
        logging.disable(logging.NOTSET)
    if folder:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    else:
        seen = open_clip.get_model_preprocess_cfg(module)
        config = {"model_cfg": deepcopy(open_clip.get_model_config(name)), "preprocess_cfg": seen}
    loaded(module, weights, f"open_clip's {name}")
    size = module.visual.image_size
    pixels = random_pixels("images", size if isinstance(size, int) else size[0])
    length, words = module.context_length, module.vocab_size

    def inputs(count: int) -> Inputs:
        texts = torch.randint(0, words, (count, length), generator=torch.Generator().manual_seed(count))
        return {**pixels(count), "texts": texts}

    return Network(name, module, _answer, inputs, config=config, folder=folder)


def _answer(module: nn.Module, inputs: Inputs) -> Tensor:
    clip: Any = module
    return torch.cat([clip.encode_image(inputs["images"]), clip.encode_text(inputs["texts"])], dim=1)


def write(network: Network, folder: Path) -> None:
    """open_clip_config.json and open_clip_model.safetensors."""
    write_json(folder / CONFIG, dict(network.config))
    tensors = {name: tensor.contiguous() for name, tensor in network.module.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def read(folder: Path, network: Network) -> Answer:
    """As anyone would load it."""
    module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    module.eval()
    return partial(_answer, module)
