"""Vision models and dual encoders of Hugging Face's transformers, by their name or from a local folder."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers  # by its name alone: it loads a class when it is asked for, which takes seconds
from torch import Tensor, nn

from configs.training import Model
from models.local import in_parts, local_path, unavailable

VISION = ("vision_model", "visual_projection")  # what of a dual encoder looks at images
FILES = "config.json model.safetensors preprocessor_config.json tokenizer.json tokenizer_config.json"
TEXT_LENGTH = 64  # tokens; SigLIP and ALIGN were trained on texts padded to this length


class HubTower(nn.Module):
    """(N, 3, H, W) normalised images to (N, width): image embeddings of a dual encoder, else the pooled output.

    Text tower and temperature are taken out: they would be averaged into soups and waited for by DDP.
    """

    def __init__(self, network: "transformers.PreTrainedModel"):
        super().__init__()
        self.network = network
        self.is_dual = hasattr(network, "get_image_features")
        if self.is_dual:
            others = [name for name, _ in network.named_children() if name not in VISION]
            for name in [*others, *(name for name, _ in network.named_parameters(recurse=False))]:
                delattr(network, name)

    def forward(self, images: Tensor) -> Tensor:
        """Features; of networks without a pooled output, those of the first token."""
        look: Any = self.network.get_image_features if self.is_dual else self.network
        output = look(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)


def source(model: Model) -> str:
    """The folder or name that transformers gets."""
    path = local_path(model)
    return str(model.name if path is None else path)


def load_network(model: Model, *, weights: bool) -> "transformers.PreTrainedModel":
    """The network with its weights, or from its config alone with random ones, in float32.

    Raises:
        UserError: it is not here and cannot be downloaded.
    """
    try:
        if weights:
            return transformers.AutoModel.from_pretrained(
                source(model), dtype=torch.float32, use_safetensors=True
            ).eval()
        return transformers.AutoModel.from_config(
            transformers.AutoConfig.from_pretrained(source(model)), dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise unavailable(model, str(model.name), FILES, error) from None


def width_of(network: "transformers.PreTrainedModel", size: int) -> int:
    """How many features the tower of such a network has, told by a forward pass without numbers."""
    with torch.device("meta"):
        return HubTower(type(network)(network.config))(torch.zeros(1, 3, size, size)).shape[1]


def statistics(model: Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB in [0, 1] that the network's own preprocessing uses.

    Raises:
        UserError: its preprocessor_config.json is not here and cannot be downloaded.
    """
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source(model))
    except (OSError, ValueError) as error:
        raise unavailable(model, str(model.name), FILES, error) from None
    if getattr(processor, "do_normalize", False):
        return tuple(processor.image_mean), tuple(processor.image_std)
    if getattr(processor, "rescale_offset", False):  # EfficientNet's: [0, 1] becomes [-1, 1]
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def text_of(model: Model, network: Any, device: torch.device) -> tuple[Callable[[Sequence[str]], Tensor], float] | None:
    """How a dual encoder embeds texts, and by what it multiplies similarities; None of a network without text.

    Raises:
        UserError: its tokenizer is not here and cannot be downloaded.
    """
    if not hasattr(network, "get_text_features"):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source(model))
    except (OSError, ValueError) as error:
        raise unavailable(model, str(model.name), FILES, error) from None

    def embed(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        return network.to(device).get_text_features(**tokens.to(device)).pooler_output

    # ALIGN keeps a temperature, the others the logarithm of its inverse.
    scale = 1 / network.temperature if hasattr(network, "temperature") else network.logit_scale.exp()
    return partial(in_parts, embed), scale.item()
