"""From settings to a folder that was loaded back, by its library's own call, and gave the soup's logits.

A writer raises a `UserError` where its library cannot compute what the network does. A reader is the library's
call, which gives logits for the inputs of `Source.example`; it reads nothing but the folder.
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, CLIPImageProcessor

from configs.stages import Export, Target
from models import hub
from models.backbones import dual_encoder
from models.emoji_clip.model import VOCABULARY, clip_config
from models.hub import SentenceTower
from soups.errors import UserError
from soups.experiment.export.card import usage, write_card
from soups.experiment.export.source import Source, read_source
from soups.export import onnx as to_onnx
from soups.export import open_clip as to_open_clip
from soups.export import timm as to_timm
from soups.export.network import Images, Network, compare, of_one_input
from soups.files.atomic import replacing

HEAD = "classifier.safetensors"
Reader = Callable[[Source, Path], Callable[[Tensor], Tensor]]  # a folder to: inputs of `example` -> (N, C) logits


def _normalised(source: Source, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in source.statistics())
    return (images.float() / 255 - mean) / std


def write_timm(source: Source, folder: Path) -> None:
    """config.json and model.safetensors, as timm pushes them to the hub."""
    model, classifier = source.model, source.classifier
    if classifier.normalize:
        raise UserError(
            f"to=timm: features of {model.name or model.kind} have unit norm before the head (model.normalize=true), "
            f"which no network of timm does: {possible(source)}"
        )
    name = model.name or "tf_efficientnet_lite0"  # what imagenet_lite0 is
    recorded = timm.get_pretrained_cfg(name)
    assert recorded is not None  # the network was built by that name
    size: dict[str, Any] = {"img_size": model.image_size} if recorded.fixed_input_size else {}
    network: Any = timm.create_model(name, num_classes=len(source.class_names), **size)
    weights = dict(classifier.tower.state_dict())
    names: Any = recorded.classifier
    heads = [names] if isinstance(names, str) else names or []
    for head in heads:
        weights |= {f"{head}.{part}": tensor for part, tensor in classifier.head.state_dict().items()}
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"to=timm: {name} has another head than one linear layer: {possible(source)}") from error
    to_timm.write(_network_of(source, network), folder)


def _network_of(source: Source, module: nn.Module, config: Mapping[str, Any] | None = None) -> Network:
    """What the modules of `soups.export` write."""
    mean, std = source.statistics()
    images = Images(source.images.size, source.images.resize, source.images.squash, tuple(mean), tuple(std))
    name = source.model.name or source.model.kind
    return Network(name, module, of_one_input, lambda count: {}, source.class_names, images, config=config or {})


def read_timm(source: Source, folder: Path) -> Callable[[Tensor], Tensor]:
    """As anyone would load it."""
    answer = to_timm.read(folder, _network_of(source, source.network))
    return lambda images: answer({"images": _normalised(source, images)})


def graph_of(source: Source) -> Network:
    """The network as ONNX takes it, with the one input that it has here."""
    name = "input_ids" if source.model.is_reader else "images"
    inputs = lambda count: {name: source.example(count)}  # noqa: E731
    return Network(source.model.kind, source.network, of_one_input, inputs, source.class_names)


def facts(source: Source) -> dict[str, Any]:
    """What one who feeds the graph must know; JSON."""
    if not source.model.is_reader:
        return to_onnx.facts_of(_network_of(source, source.network))
    words = source.tokenizer
    known: dict[str, Any] = {"class_names": list(source.class_names), "template": source.task.template}
    return known | {"before": words.before, "after": words.after, "pad": words.pad, "max_length": words.max_length}


def write_onnx(source: Source, folder: Path) -> None:
    """model.onnx and preprocessing.json, of texts with their tokenizer."""
    to_onnx.write(graph_of(source), folder, facts(source))
    if source.model.is_reader:
        source.tokenizer.tokenizer.save_pretrained(folder)


def read_onnx(source: Source, folder: Path) -> Callable[[Tensor], Tensor]:
    """As anyone would load it."""
    graph = graph_of(source)
    answer, (name,) = to_onnx.read(folder, graph), graph.inputs(1)
    return lambda inputs: answer({name: inputs})


def _save_head(source: Source, folder: Path) -> None:
    head = {name: tensor.contiguous() for name, tensor in source.classifier.head.state_dict().items()}
    save_file(head, folder / HEAD, {"format": "pt", "unit_norm": json.dumps(source.classifier.normalize)})
    (folder / "classes.json").write_text(json.dumps(source.class_names, ensure_ascii=False, indent=1), "utf-8")


def _headed(folder: Path, normalize: bool) -> Callable[[Tensor], Tensor]:
    head = load_file(folder / HEAD)
    return lambda x: F.linear(F.normalize(x, dim=-1) if normalize else x, head["weight"], head["bias"])


def write_open_clip(source: Source, folder: Path) -> None:
    """open_clip_config.json and open_clip_model.safetensors: the soup's image tower beside the pretrained text tower.

    The head is in classifier.safetensors, since open_clip's models have none; classes.json has its names.
    """
    model = source.model
    clip = dual_encoder(model)
    clip.visual.load_state_dict(source.classifier.tower.state_dict(), strict=True)
    config = clip_config() if model.name is None else deepcopy(open_clip.get_model_config(model.name))
    config["vision_cfg"]["image_size"] = model.image_size
    if model.name is None:
        (folder / "vocabulary.json").write_bytes(VOCABULARY.read_bytes())
    mean, std = source.statistics()
    mode = "squash" if source.images.squash else "shortest"
    seen = {"size": source.images.size, "mode": "RGB", "mean": mean, "std": std}
    seen |= {"interpolation": "bicubic", "resize_mode": mode}
    to_open_clip.write(_network_of(source, clip, {"model_cfg": config, "preprocess_cfg": seen}), folder)
    _save_head(source, folder)


def read_open_clip(source: Source, folder: Path) -> Callable[[Tensor], Tensor]:
    """As anyone would load it."""
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    clip.eval()
    head = _headed(folder, source.classifier.normalize)
    return lambda images: head(clip.encode_image(_normalised(source, images)))


def write_transformers(source: Source, folder: Path) -> None:
    """config.json, model.safetensors and the preprocessor or tokenizer, as transformers saves them.

    A network that answers prompts is whole; of others the head is in classifier.safetensors.
    """
    names = dict(enumerate(source.class_names))
    network: Any = source.network.network if source.model.head == "prompt" else _network(source)
    network.config.id2label, network.config.label2id = names, {name: i for i, name in names.items()}
    network.save_pretrained(folder)
    if source.model.is_reader:
        source.tokenizer.tokenizer.save_pretrained(folder)
    else:
        images = source.images
        mean, std = source.statistics()
        sides = {"height": images.resize, "width": images.resize} if images.squash else {"shortest_edge": images.resize}
        crop = {"height": images.size, "width": images.size}
        CLIPImageProcessor(size=sides, crop_size=crop, resample=3, image_mean=mean, image_std=std).save_pretrained(
            folder
        )
    if source.model.head != "prompt":
        _save_head(source, folder)


def _network(source: Source) -> nn.Module:
    """The network of transformers in the tower, with the text tower that was taken out of it."""
    tower: Any = source.classifier.tower
    network: nn.Module = tower.network
    if isinstance(tower, hub.HubTower) and tower.is_dual:
        whole = hub.load_network(source.model, weights=True)
        whole.load_state_dict(network.state_dict(), strict=False)
        return whole
    return network


def read_transformers(source: Source, folder: Path) -> Callable[[Tensor], Tensor]:
    """As anyone would load it; of prompts, what the answers' words score."""
    kind = source.model.kind
    if source.model.head == "prompt":
        auto: Any = AutoModelForMaskedLM if kind == "masked_lm" else AutoModelForSeq2SeqLM
        prompted = deepcopy(source.network)
        prompted.network = auto.from_pretrained(folder).eval()
        return prompted
    network = AutoModel.from_pretrained(folder).eval()
    head = _headed(folder, source.classifier.normalize)
    if source.model.is_reader:
        tower: Callable[[Tensor], Tensor] = SentenceTower(network, source.tokenizer.pad)
        return lambda ids: head(tower(ids))
    seen = hub.HubTower(network)
    return lambda images: head(seen(_normalised(source, images)))


def targets(source: Source) -> tuple[str, ...]:
    """The libraries that a network can go to."""
    match source.model.kind:
        case "timm" | "imagenet_lite0":
            return ("onnx",) if source.classifier.normalize else ("timm", "onnx")
        case "open_clip" | "emoji_clip":
            return ("open_clip", "onnx")
    return ("transformers", "onnx")


def possible(source: Source) -> str:
    """The same, as the end of a sentence."""
    return "it can go to=" + " or to=".join(targets(source))


FORMATS: dict[Target, tuple[Callable[[Source, Path], None], Reader]] = {
    "timm": (write_timm, read_timm),
    "open_clip": (write_open_clip, read_open_clip),
    "transformers": (write_transformers, read_transformers),
    "onnx": (write_onnx, read_onnx),
}


def loaded_back(source: Source, to: Target, folder: Path) -> float:
    """The largest difference between the folder's logits and the soup's, on random inputs."""
    try:
        read = FORMATS[to][1](source, folder)
        return compare(graph_of(source), lambda inputs: read(*inputs.values()), to)
    except UserError as error:
        raise UserError(f"{error}, so nothing was written; {possible(source)}") from None


def export(settings: Export) -> str:
    """Write the folder and return what was written and compared, in a line.

    Raises:
        UserError: no such soup, a library that has no such network, missing packages, a folder that is there
            already, a full disk, or logits that differ.
    """
    out, to = settings.out, settings.to
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} is there already: name another folder, or delete it")
    if to == "onnx":
        to_onnx.need_packages()
    source = read_source(settings)
    if to not in targets(source) and not (to == "timm" and source.model.kind in ("timm", "imagenet_lite0")):
        raise UserError(f"to={to}: this soup is of a network of {source.model.kind}: {possible(source)}")
    with replacing(out, folder=True) as folder:
        FORMATS[to][0](source, folder)
        gap = loaded_back(source, to, folder)
        write_card(source, to, settings.license, usage(source, to), folder)
    return f"{out}: loaded by {to}, logits within {gap:.1e} of the soup's on 7 random inputs"
