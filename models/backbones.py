"""Pretrained towers of three libraries and three embedded ones, and the text towers that come with some.

Weights come from the library's own download, or from `model.weights` on machines without internet: a file for open_clip
and timm, a folder as `hf download` makes it for transformers.
"""

import copy
import logging
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from configs.errors import UserError
from configs.training import Model
from models import hub
from models.emoji_clip import model as emoji_clip
from models.emoji_clip.model import load_imagenet
from models.hub import ROOT, Backbone, TextTower, in_parts, local_path, not_whole, unavailable


def backbone_of(model: Model, device: torch.device, *, weights: bool) -> tuple[Backbone, TextTower | None]:
    """The tower, for the caller to train, and its text tower where it has one; texts are embedded on `device`.

    Without `weights` these are random (none under torch.device("meta")), no text tower comes with them, and of
    transformers only the config must be at hand.

    Raises:
        UserError: what is needed is neither here nor can be downloaded, damaged weights, or an unknown name.
    """
    match model.kind:
        case "emoji_clip":
            clip = dual_encoder(model) if weights else emoji_clip.build()
            tower = Backbone(clip.visual, emoji_clip.EMBED_DIM, emoji_clip.MEAN, emoji_clip.STD)
            embed = partial(emoji_clip.text_features, clip)
            return tower, TextTower(embed, clip.logit_scale.exp().item()) if weights else None
        case "imagenet_lite0":
            lite0: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0)
            if weights:
                load_imagenet(lite0)
            return Backbone(lite0, lite0.num_features, emoji_clip.MEAN, emoji_clip.STD), None
        case "open_clip":
            clip = _open_clip(model, _open_clip_file(model) if weights else None)
            width = open_clip.get_model_config(str(model.name))["embed_dim"]
            tower = Backbone(clip.visual, width, *mean_and_std(str(model.name), model.pretrained))
            return tower, _open_clip_text(model, clip, device) if weights else None
        case "timm":
            return _of_timm(model, weights=weights), None
        case "transformers":
            return hub.image_backbone(model, device, weights=weights)
    return hub.text_backbone(model, device, weights=weights)


def dual_encoder(model: Model) -> Any:
    """The whole pretrained CLIP of kind open_clip or emoji_clip, text tower included, for the caller to change."""
    if model.kind == "emoji_clip":
        return copy.deepcopy(_load_emoji_clip(ROOT / (model.weights or emoji_clip.WEIGHTS)))
    return _open_clip(model, _open_clip_file(model))


@lru_cache(maxsize=1)
def _load_emoji_clip(weights: Path) -> Any:
    """The embedded CLIP, read once in a process, since every worker needs it for many rows."""
    return emoji_clip.load(weights)


def _recorded(model: Model) -> dict[str, Any]:
    """What open_clip knows of the weights `model.pretrained`, such as where they are; empty for unknown weights."""
    if model.name not in open_clip.list_models():
        raise UserError(f"open_clip knows no model.name={model.name}; open_clip.list_models() has the names")
    return open_clip.get_pretrained_cfg(str(model.name), model.pretrained or "") or {}


def mean_and_std(name: str, pretrained: str | None = None) -> list[tuple[float, ...]]:
    """Mean and standard deviation of RGB in [0, 1] that open_clip's weights of a model were trained with.

    Without the weights' name, those of all weights that are published of the model. Where these differ, or none are
    published, they are OpenAI's, as open_clip's own `create_model_and_transforms` takes them.
    """
    tags = [pretrained] if pretrained is not None else open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, tag) or {} for tag in tags]
    found = []
    for field, default in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD)):
        values = {each.get(field) or default for each in known}
        found.append(values.pop() if len(values) == 1 else default)
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
    if weights is None:
        logging.disable(logging.WARNING)  # open_clip warns of random weights, which are wanted here
    try:
        return open_clip.create_model(
            model.name,
            None if weights is None else str(weights),
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


def _open_clip_text(model: Model, clip: Any, device: torch.device) -> TextTower:
    tokenizer = open_clip.get_tokenizer(str(model.name))

    def embed(texts: list[str]) -> Tensor:
        return clip.to(device).encode_text(tokenizer(texts).to(device))

    return TextTower(partial(in_parts, embed), clip.logit_scale.exp().item())


def _of_timm(model: Model, *, weights: bool) -> Backbone:
    name = str(model.name)
    if not timm.is_model(name):
        raise UserError(f"timm knows no model.name={name}; timm.list_models() has the names")
    recorded = timm.get_pretrained_cfg(name)
    assert recorded is not None  # since timm knows the model
    path = local_path(model) if weights else None
    settings: dict[str, Any] = {"pretrained": weights}
    if path is not None:
        settings["pretrained_cfg_overlay"] = {"file": str(path)}
    if recorded.fixed_input_size:
        settings["img_size"] = model.image_size
    try:
        tower: Any = timm.create_model(name, num_classes=0, **settings)
    except Exception as error:  # as in _open_clip_file and _open_clip
        if not weights:
            raise
        if path is not None:
            raise not_whole(model, error) from None
        raise unavailable(model, recorded.hf_hub_id or name, "model.safetensors", error) from None
    # The width of what comes out without classes: for VGG, MobileNetV3, GhostNet and others more than num_features.
    return Backbone(tower, tower.head_hidden_size, recorded.mean, recorded.std)
