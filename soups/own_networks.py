"""Networks of timm, open_clip, transformers or one's own that weights of one's own are tried in."""

import importlib
import json
import logging as python_logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
from pydantic import TypeAdapter
from timm.data import create_transform, resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from configs.errors import UserError
from configs.own_pool import OwnNetwork
from configs.training import Model
from models import released
from models.classifier import architecture
from soups.refusals import config_beside, read_config
from store.weights import Weights
from tasks.fixed import of_model

WRAPPED = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
OPEN_CLIP_CONFIG = "open_clip_config.json"
SIZE = 224  # pixels that a network of a function sees
KINDS = {"image": AutoModelForImageClassification, "text": AutoModelForSequenceClassification}


def as_is(name: str) -> str | None:
    """A tensor of a file under its own name."""
    return name


@dataclass(frozen=True)
class OwnClassifier:
    """A network with random weights, how it is fed, and how it answers."""

    network: nn.Module
    prepare: Callable[[Any], Any]  # an image to what is stacked into a batch, or texts (lists by column) to a batch
    logits: Callable[[Any], Tensor]  # a batch to (b, C)
    own_name: Callable[[str], str | None] = as_is  # a file's tensor -> the network's; None: of no use here
    load: Callable[[Weights], None] | None = None  # by the library itself; None: under their own names
    ready: Callable[[], None] = lambda: None  # called when weights were loaded
    class_ids: dict[str, int] | None = None  # what the network calls its classes; None: in the order of their names


def source_folder(paths: Sequence[Path], file: str) -> Path | None:
    """The folder of the first ingredient if it has a config of this name."""
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    return folder if (folder / file).exists() else None


def unwrapped_name(names: Iterable[str]) -> Callable[[str], str | None]:
    """Without what DataParallel or torch.compile put before all names, if they did.

    >>> unwrapped_name(["module.head.weight", "module.head.bias"])("module.head.bias")
    'head.bias'
    """
    names = list(names)
    begin = next((begin for begin in WRAPPED if names and all(name.startswith(begin) for name in names)), "")
    return lambda name: name.removeprefix(begin)


def build(model: OwnNetwork, paths: Sequence[Path], names: Sequence[str], classes: Sequence[str]) -> OwnClassifier:
    """The network that the ingredients are weights of.

    Args:
        model: which.
        paths: the ingredients; a config beside the first may say what the network is.
        names: of the first ingredient's tensors.
        classes: of the held-out images; empty of texts.

    Raises:
        UserError: no such network, or one that cannot answer for these classes.
    """
    match model.kind:
        case "timm":
            return _of_timm(model, paths, names, classes)
        case "open_clip":
            return _of_open_clip(model, paths, names, classes)
        case "transformers":
            return _of_transformers(model, paths, names, "image" if classes else "text")
    return _of_function(model, names, classes)


def _of_timm(model: OwnNetwork, paths: Sequence[Path], names: Sequence[str], classes: Sequence[str]) -> OwnClassifier:
    name, file = model.name, config_beside(paths[0])
    if name is None and file is not None:
        name = read_config(file).get("architecture")
    if name is None:
        raise UserError("model=timm needs model.name=NAME; timm.list_models() has the names")
    size: dict[str, Any] = {} if model.image_size is None else {"img_size": model.image_size}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=len(classes), **size).eval()
    except (RuntimeError, TypeError) as error:
        raise UserError(f"model.name={name}: {error}; timm.list_models() has the names") from None
    shape = {} if model.image_size is None else {"input_size": (3, model.image_size, model.image_size)}
    transform = create_transform(**(resolve_data_config({}, model=network) | shape))
    return OwnClassifier(network, transform, network, unwrapped_name(names))


def _of_function(model: OwnNetwork, names: Sequence[str], classes: Sequence[str]) -> OwnClassifier:
    assert model.name is not None  # the schema sees to that
    module, function = model.name.split(":")
    try:
        network = getattr(importlib.import_module(module), function)(num_classes=len(classes)).eval()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"model.name={model.name}: {error}; it is called with num_classes={len(classes)}") from None
    size = model.image_size or SIZE
    transform = create_transform((3, size, size), crop_pct=0.875, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    return OwnClassifier(network, transform, network, unwrapped_name(names))


def _of_open_clip(
    model: OwnNetwork, paths: Sequence[Path], names: Sequence[str], classes: Sequence[str]
) -> OwnClassifier:
    folder = source_folder(paths, OPEN_CLIP_CONFIG)
    name = model.name or (f"local-dir:{folder}" if folder else None)
    if name is None:
        raise UserError("model=open_clip needs model.name=NAME; open_clip.list_models() has the names")
    if released.is_released(names) or {"head.weight", "head.bias"} <= set(names):
        return _tower_with_head(name, model, names, classes)
    python_logging.disable(python_logging.WARNING)  # of random weights, which are wanted here
    try:
        size = {} if model.image_size is None else {"force_image_size": model.image_size}
        network, _, transform = open_clip.create_model_and_transforms(
            name, load_weights=False, pretrained_text=False, **size
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, FileNotFoundError, OSError) as error:
        raise UserError(f"model.name={name}: {str(error).splitlines()[0]}") from None
    finally:
        python_logging.disable(python_logging.NOTSET)
    network.eval()
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES if model.templates == "openai" else (str,)
    heads: list[Tensor] = []

    def ready() -> None:
        device = next(network.parameters()).device
        words = [name.replace("_", " ") for name in classes]
        heads[:] = [open_clip.build_zero_shot_classifier(network, tokenizer, words, templates, device=device)]

    def logits(images: Tensor) -> Tensor:
        return network.encode_image(images, normalize=True) @ heads[0]

    return OwnClassifier(network, transform, logits, unwrapped_name(names), ready=ready)


def _tower_with_head(name: str, model: OwnNetwork, names: Sequence[str], classes: Sequence[str]) -> OwnClassifier:
    """An image tower and a linear head, under the names of the authors' wrapper or of this project's rows."""
    if name.startswith("local-dir:"):
        raise UserError("an image tower with a head needs model.name=NAME; open_clip.list_models() has the names")
    values = {"kind": "open_clip", "name": name, "image_size": model.image_size or SIZE, "normalize": True}
    settings = TypeAdapter(Model).validate_python(values | {"head": "random", "probe_c": (1.0,)})
    network = architecture(settings, len(classes)).eval()
    rename = released.own_name if released.is_released(names) else unwrapped_name(names)
    return OwnClassifier(network, of_model(settings), network, rename)


def _of_transformers(model: OwnNetwork, paths: Sequence[Path], names: Sequence[str], what: str) -> OwnClassifier:
    folder = source_folder(paths, "config.json")
    source = model.name or (str(folder) if folder else None)
    if source is None:
        raise UserError("model=transformers needs model.name=FOLDER, with the config.json of these weights")
    try:
        config = AutoConfig.from_pretrained(source)
        network = KINDS[what].from_config(config).eval()
        if what == "text":
            reader: Any = AutoTokenizer.from_pretrained(source)
        else:
            reader = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"model.name={source}: no {what} classifier of transformers: {_first(error)}") from None
    made = config.architectures or []
    if made and not any(name.endswith("Classification") for name in made):
        raise UserError(f"{source}: its config.json says {made[0]}, which has no classes to be right or wrong about")
    ids = {label: i for i, label in config.id2label.items()}
    generic = ids.keys() == {f"LABEL_{i}" for i in ids.values()}

    def logits(batch: Any) -> Tensor:
        return network(**batch).logits

    load = _hub_loader(network, unwrapped_name(names), source)
    if what == "text":
        # Without padding token a text at a time would be needed; such tokenizers name their end instead.
        reader.pad_token = reader.pad_token or reader.eos_token

        def prepare(columns: Sequence[list[str]]) -> Any:
            return reader(*columns, padding=True, truncation=True, max_length=model.max_length, return_tensors="pt")

        return OwnClassifier(network, prepare, logits, load=load, class_ids=ids)

    def look(image: Any) -> Tensor:
        return reader(image, return_tensors="pt")["pixel_values"][0]

    def answer(images: Tensor) -> Tensor:
        return network(pixel_values=images).logits

    return OwnClassifier(network, look, answer, load=load, class_ids=None if generic else ids)


def _hub_loader(network: Any, own_name: Callable[[str], str | None], source: str) -> Callable[[Weights], None]:
    """Transformers loads weights under other names than its networks have, and knows which became which."""
    logging.disable_progress_bar()

    def load(weights: Weights) -> None:
        state = {own_name(name): tensor for name, tensor in weights.items()}
        silence = logging.get_verbosity()
        logging.set_verbosity_error()  # what is missing is said below, in one line
        try:
            fresh, info = type(network).from_pretrained(
                None, config=network.config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
            )
        finally:
            logging.set_verbosity(silence)
        odd = [*info["missing_keys"], *info["unexpected_keys"], *(key[0] for key in info["mismatched_keys"])]
        if odd:
            raise UserError(f"not of the network of {source}: {min(odd)!r} is missing, unknown or of another shape")
        network.load_state_dict(fresh.state_dict())

    return load


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
