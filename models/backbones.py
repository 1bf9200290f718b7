"""Pretrained towers of three libraries and three embedded ones, and the text towers that come with some.

Weights come from the library's own download, or from `model.weights` on machines without internet: of open_clip and
timm a file, of transformers a folder as `hf download` makes it.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from configs.errors import UserError
from configs.training import Model
from models import hub
from models.emoji_clip import model as emoji_clip
from models.emoji_clip.imagenet import load_imagenet
from models.hub import (
    ROOT,
    SIMILARITY_SCALE,
    SentenceTower,
    embed,
    in_parts,
    local_path,
    not_whole,
    sentence_tower,
    unavailable,
)


@dataclass(frozen=True)
class Backbone:
    """A tower and what its images must look like."""

    tower: nn.Module  # (N, 3, H, W) normalised images, or (N, L) token ids, to (N, width) features
    width: int
    mean: Sequence[float] | None = None  # of RGB in [0, 1]; None of texts
    std: Sequence[float] | None = None


@dataclass(frozen=True)
class TextTower:
    """The other half of a dual encoder."""

    embed: Callable[[Sequence[str]], Tensor]  # N texts to (N, width) of unit norm, on the CPU
    scale: float  # by which it multiplies similarities: CLIP's exp(logit_scale)


def skeleton(model: Model) -> Backbone:
    """The tower with random weights (none under torch.device("meta")); of transformers its config must be at hand.

    Raises:
        UserError: the library does not know the name; of transformers, the config cannot be downloaded.
    """
    match model.kind:
        case "emoji_clip":
            return Backbone(emoji_clip.build().visual, emoji_clip.EMBED_DIM, emoji_clip.MEAN, emoji_clip.STD)
        case "imagenet_lite0":
            tower: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0)
            return Backbone(tower, tower.num_features, emoji_clip.MEAN, emoji_clip.STD)
        case "open_clip":
            return _of_open_clip(model, _open_clip(model, None))
        case "timm":
            return _of_timm(model, {})
        case "transformers":
            return _of_transformers(model, hub.load_network(model, weights=False))
    return _of_texts(sentence_tower(model, weights=False))


def pretrained_backbone(model: Model, device: torch.device) -> tuple[Backbone, TextTower | None]:
    """The tower with its pretrained weights, for the caller to train, and its text tower where it has one.

    Args:
        model: which.
        device: where texts are embedded.

    Raises:
        UserError: weights that are neither here nor can be downloaded, damaged ones, or an unknown name.
    """
    match model.kind:
        case "emoji_clip":
            clip = _load_emoji_clip(ROOT / (model.weights or emoji_clip.WEIGHTS))
            backbone = Backbone(copy.deepcopy(clip.visual), emoji_clip.EMBED_DIM, emoji_clip.MEAN, emoji_clip.STD)
            return backbone, TextTower(partial(emoji_clip.text_features, clip), clip.logit_scale.exp().item())
        case "imagenet_lite0":
            backbone = skeleton(model)
            load_imagenet(backbone.tower)
            return backbone, None
        case "open_clip":
            clip = _open_clip(model, _open_clip_file(model))
            return _of_open_clip(model, clip), _open_clip_text(model, clip, device)
        case "timm":
            path = local_path(model)
            local = {} if path is None else {"pretrained_cfg_overlay": {"file": str(path)}}
            return _of_timm(model, {"pretrained": True} | local), None
        case "transformers":
            network = hub.load_network(model, weights=True)
            text = hub.text_of(model, network, device)
            return _of_transformers(model, copy.deepcopy(network)), TextTower(*text) if text else None
    tower = sentence_tower(model, weights=True)
    return _of_texts(tower), TextTower(partial(embed, model, tower, device), SIMILARITY_SCALE)


def dual_encoder(model: Model) -> Any:
    """The whole pretrained CLIP of kind open_clip or emoji_clip, text tower included, for the caller to change.

    Raises:
        UserError: as `pretrained_backbone`.
    """
    if model.kind == "emoji_clip":
        return copy.deepcopy(_load_emoji_clip(ROOT / (model.weights or emoji_clip.WEIGHTS)))
    return _open_clip(model, _open_clip_file(model))


@lru_cache(maxsize=1)
def _load_emoji_clip(weights: Path) -> Any:
    """Read once in a process, since every worker needs it for many rows."""
    return emoji_clip.load(weights)


def _recorded(model: Model) -> dict[str, Any]:
    """What open_clip knows of the weights `model.pretrained`: where they are, mean and standard deviation."""
    if model.name not in open_clip.list_models():
        raise UserError(f"open_clip knows no model.name={model.name}; open_clip.list_models() has the names")
    return open_clip.get_pretrained_cfg(str(model.name), model.pretrained or "") or {}


def preprocessing(name: str, pretrained: str | None = None) -> dict[str, Any]:
    """Mean, standard deviation, interpolation and resize mode that open_clip's weights of a model were trained with.

    Without the weights' name, those of all weights that are published of the model. Where those differ, or none are
    published, they are OpenAI's, as open_clip's own `create_model_and_transforms` takes them.

    Args:
        name: as open_clip calls the model.
        pretrained: as open_clip calls the weights.
    """
    tags = [pretrained] if pretrained is not None else open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, tag) or {} for tag in tags]
    fields = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}
    fields["resize_mode"] = "shortest"
    found = {}
    for field, default in fields.items():
        values = {each.get(field) or default for each in known}
        found[field] = values.pop() if len(values) == 1 else default
    return found


def _open_clip_file(model: Model) -> Path:
    """The weights file, downloaded where it is not local."""
    path = local_path(model)
    if path is not None:
        return path
    recorded = _recorded(model)
    if not recorded:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(str(model.name))) or "none"
        raise UserError(f"open_clip knows no model.pretrained={model.pretrained} of {model.name}, only: {known}")
    try:
        return Path(open_clip.download_pretrained(recorded))
    except Exception as error:  # hub, HTTP and socket libraries each raise types of their own without internet
        repository = recorded.get("hf_hub", "").rstrip("/") or recorded["url"]
        raise unavailable(model, repository, "open_clip_model.safetensors", error) from None


def _open_clip(model: Model, weights: Path | None) -> Any:
    """The dual encoder, from a file or with random weights."""
    _recorded(model)
    source = None if weights is None else str(weights)
    if weights is None:
        logging.disable(logging.WARNING)  # open_clip warns of random weights, which are wanted here
    try:
        return open_clip.create_model(
            model.name,
            source,
            device=torch.get_default_device(),
            force_image_size=model.image_size,
            pretrained_image=False,
            pretrained_text=False,
        ).eval()
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError for a damaged file
        if weights is None:
            raise
        raise not_whole(model, error) from None
    finally:
        logging.disable(logging.NOTSET)


def _of_open_clip(model: Model, clip: Any) -> Backbone:
    width = open_clip.get_model_config(str(model.name))["embed_dim"]
    seen = preprocessing(str(model.name), model.pretrained)
    return Backbone(clip.visual, width, seen["mean"], seen["std"])


def _open_clip_text(model: Model, clip: Any, device: torch.device) -> TextTower:
    tokenizer = open_clip.get_tokenizer(str(model.name))

    def embed(texts: list[str]) -> Tensor:
        return clip.to(device).encode_text(tokenizer(texts).to(device))

    return TextTower(partial(in_parts, embed), clip.logit_scale.exp().item())


def _of_timm(model: Model, weights: dict[str, Any]) -> Backbone:
    name = str(model.name)
    if not timm.is_model(name):
        raise UserError(f"timm knows no model.name={name}; timm.list_models() has the names")
    recorded = timm.get_pretrained_cfg(name)
    assert recorded is not None  # of every model that timm knows
    size: dict[str, Any] = {"img_size": model.image_size} if recorded.fixed_input_size else {}
    try:
        tower: Any = timm.create_model(name, num_classes=0, **size, **weights)
    except Exception as error:  # as in _open_clip_file and _open_clip
        if not weights:
            raise
        if model.weights is not None:
            raise not_whole(model, error) from None
        raise unavailable(model, recorded.hf_hub_id or name, "model.safetensors", error) from None
    # What comes out without classes: of VGG, MobileNetV3, GhostNet and others more than the last layer's num_features.
    return Backbone(tower, tower.head_hidden_size, recorded.mean, recorded.std)


def _of_texts(tower: SentenceTower) -> Backbone:
    return Backbone(tower, tower.width)


def _of_transformers(model: Model, network: Any) -> Backbone:
    width = hub.width_of(network, model.image_size)
    return Backbone(hub.HubTower(network), width, *hub.statistics(model))
