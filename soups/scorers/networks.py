"""Networks of timm, open_clip, transformers or the user's function, and what they answer to images."""

import importlib
import json
import logging as python_logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soups.errors import UserError
from soups.scorers.outside import code_of, function_named
from soups.scoring import Candidate, key_of

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # what wrappers put before every name
OPEN_CLIP_CONFIG = "open_clip_config.json"
SIZE = 224  # pixels that a network of a function sees
LEFTOVERS = (  # of the text tower in the authors' released files, which classify nothing
    "model.positional_embedding",
    "model.text_projection",
    "model.logit_scale",
    "model.token_embedding.",
    "model.ln_final.",
)


@dataclass(frozen=True)
class NetworkName:
    """`timm:resnet50`, `open_clip:ViT-B-32`, `transformers:FOLDER`, `function:module:name`; or the library alone."""

    kind: str
    name: str | None
    image_size: int | None = None
    templates: str = "openai"  # of open_clip without a head: prompts around the class names, or `name` for them alone


def network_name(text: str, image_size: int | None = None, templates: str = "openai") -> NetworkName:
    """What --network means.

    Raises:
        UserError: no such library.

    >>> network_name("function:torchvision.models:resnet18").name
    'torchvision.models:resnet18'
    """
    kind, _, name = text.partition(":")
    if kind not in ("timm", "open_clip", "transformers", "function"):
        raise UserError(
            f"--network {text}: write timm:NAME, open_clip:NAME, transformers:FOLDER or function:module:name"
        )
    if kind == "function" and name.count(":") != 1:
        raise UserError(f"--network {text}: write function:module:name, as in function:torchvision.models:resnet18")
    return NetworkName(kind, name or None, image_size, templates)


@dataclass
class ImageNetwork:
    """A network, how it is fed, and how it answers."""

    module: nn.Module
    prepare: Callable[[Any], Any]  # an image of PIL to a tensor
    logits: Callable[[nn.Module, Tensor], Tensor]  # (b, C) of a batch
    key: str  # names the network, its library and how it sees images
    class_ids: dict[str, int] | None = None  # what the network calls its classes; None: in the order of the folders
    rename: Callable[[str], str | None] = lambda name: name  # a tensor's name in files -> in the network; None: no use
    ready: Callable[[], None] = lambda: None  # called when weights were loaded
    zero_shot: bool = False  # it answers by the names of the classes, by way of a text tower
    source: Path | None = None  # of transformers: the folder with the config

    def load(self, candidate: Candidate) -> nn.Module:
        """The network with a candidate's weights, one tensor after the other.

        Raises:
            UserError: other tensors or shapes than the network's.
        """
        if self.source is not None:
            self.module = from_pretrained(type(self.module), candidate.folder(self.source), candidate.name)
        else:
            load_into(self.module, candidate.weights(), candidate.name, self.rename)
        self.module.eval().to(device())
        self.ready()
        return self.module


def device() -> torch.device:
    """The first GPU, under torchrun this process's; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def bare(name: str) -> str:
    """A tensor's name without what wrappers put before it.

    >>> bare("_orig_mod.module.head.weight")
    'head.weight'
    """
    while begin := next((begin for begin in PREFIXES if name.startswith(begin)), ""):
        name = name.removeprefix(begin)
    return name


def matched(theirs: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """A file's names -> the network's, equal or equal without prefixes."""
    wanted, theirs = set(wanted), list(theirs)
    by_bare = {bare(name): name for name in wanted}
    return {name: name if name in wanted else by_bare.get(bare(name), name) for name in theirs}


def load_into(
    module: nn.Module, weights: Mapping[str, Tensor], name: str, rename: Callable[[str], str | None] = lambda n: n
) -> None:
    """Copy weights into a network's own tensors; a tied tensor may stand under any of its names.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    state = module.state_dict(keep_vars=True)
    renamed = {theirs: rename(theirs) for theirs in weights}
    own = matched([new for new in renamed.values() if new is not None], state)
    places = {theirs: own[new] for theirs, new in renamed.items() if new is not None}
    filled = {id(state[place]) for place in places.values() if place in state}
    unknown = sorted(theirs for theirs, place in places.items() if place not in state)
    missing = sorted(place for place, tensor in state.items() if id(tensor) not in filled)
    if unknown or missing:
        culprit = unknown[0] if unknown else missing[0]
        where = "the file alone" if unknown else "the network alone"
        raise UserError(f"{name} is not of this network: {culprit!r} is in {where}")
    with torch.no_grad():
        for place in state:  # in the network's order, so that a head's weight comes before its bias
            theirs = next((theirs for theirs, found in places.items() if found == place), None)
            if theirs is None:
                continue
            tensor = weights[theirs]
            if tensor.shape != state[place].shape:
                raise UserError(
                    f"{name}: {theirs!r} is {tuple(tensor.shape)}, the network has {tuple(state[place].shape)}"
                )
            state[place].copy_(tensor)


def from_pretrained(library: Any, folder: Path, name: str, **more: Any) -> Any:
    """A network of transformers from a folder, with every tensor of it found.

    Raises:
        UserError: tensors are missing, unknown or of another shape.
    """
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    silence = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is said below, in one line
    try:
        network, info = library.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, **more
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: transformers cannot load it: {first_line(error)}") from None
    finally:
        logging.set_verbosity(silence)
    odd = [*info["missing_keys"], *info["unexpected_keys"], *(key[0] for key in info["mismatched_keys"])]
    if odd:
        raise UserError(f"{name} is not of the network in its config.json: {min(odd)!r} is missing, unknown or of "
                        "another shape")  # fmt: skip
    return network


def config_folder(paths: Sequence[Path], file: str) -> Path | None:
    """The folder that the first ingredient is or lies in, if it has a config of this name."""
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    return folder if (folder / file).exists() else None


def image_network(
    asked: NetworkName, paths: Sequence[Path], names: Sequence[str], classes: Sequence[str]
) -> ImageNetwork:
    """The network that the ingredients are weights of.

    Args:
        asked: which.
        paths: the ingredients; a config beside the first may say what the network is.
        names: of the first ingredient's tensors.
        classes: names of the classes, in the order of their numbers.

    Raises:
        UserError: no such network, or one that cannot answer for these classes.
    """
    return {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers, "function": _function}[asked.kind](
        asked, paths, names, classes
    )


def _timm(asked: NetworkName, paths: Sequence[Path], names: Sequence[str], classes: Sequence[str]) -> ImageNetwork:
    import timm  # noqa: PLC0415
    from timm.data import create_transform, resolve_data_config  # noqa: PLC0415

    name, folder = asked.name, config_folder(paths, "config.json")
    if name is None and folder is not None:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architecture")
    if name is None:
        raise UserError("--network timm:NAME is needed; timm.list_models() has the names")
    size: dict[str, Any] = {} if asked.image_size is None else {"img_size": asked.image_size}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=len(classes), **size)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"--network timm:{name}: {error}; timm.list_models() has the names") from None
    shape = {} if asked.image_size is None else {"input_size": (3, asked.image_size, asked.image_size)}
    seen = resolve_data_config({}, model=network) | shape
    key = key_of("timm", timm.__version__, name, str(seen), len(classes))
    return ImageNetwork(network, create_transform(**seen), _call, key)


def _function(asked: NetworkName, paths: Sequence[Path], names: Sequence[str], classes: Sequence[str]) -> ImageNetwork:
    from timm.data import create_transform  # noqa: PLC0415

    assert asked.name is not None  # network_name sees to that
    build = function_named(asked.name)
    try:
        network = build(num_classes=len(classes))
    except TypeError as error:
        raise UserError(f"--network function:{asked.name}: {error}; it is called with num_classes=") from None
    size = asked.image_size or SIZE
    transform = create_transform((3, size, size), crop_pct=0.875)
    return ImageNetwork(network, transform, _call, key_of("function", code_of(build), size, len(classes)))


def _call(module: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = module(images)
    return logits


class TowerWithHead(nn.Module):
    """An image tower of open_clip and a linear head on features of unit norm."""

    def __init__(self, tower: nn.Module, width: int, classes: int):
        super().__init__()
        self.tower, self.head = tower, nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(b, C) logits."""
        answered: Tensor = self.head(F.normalize(self.tower(images), dim=-1))
        return answered


def tower_name(name: str) -> str | None:
    """A name of the authors' wrapper or of this project's rows in `TowerWithHead`; None of what classifies nothing.

    >>> tower_name("model.visual.proj"), tower_name("classification_head.bias"), tower_name("model.logit_scale")
    ('tower.proj', 'head.bias', None)
    """
    if name.startswith(LEFTOVERS):
        return None
    return name.replace("model.visual.", "tower.", 1).replace("classification_head.", "head.", 1)


def _open_clip(asked: NetworkName, paths: Sequence[Path], names: Sequence[str], classes: Sequence[str]) -> ImageNetwork:
    import open_clip  # noqa: PLC0415

    folder = config_folder(paths, OPEN_CLIP_CONFIG)
    name = asked.name or (f"local-dir:{folder}" if folder else None)
    if name is None:
        raise UserError("--network open_clip:NAME is needed; open_clip.list_models() has the names")
    python_logging.disable(python_logging.WARNING)  # of random weights, which are wanted here
    try:
        size = {} if asked.image_size is None else {"force_image_size": asked.image_size}
        network, _, transform = open_clip.create_model_and_transforms(
            name, load_weights=False, pretrained_text=False, **size, **_seen_by(open_clip, name)
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--network open_clip:{name}: {first_line(error)}") from None
    finally:
        python_logging.disable(python_logging.NOTSET)
    config = key_of(folder / OPEN_CLIP_CONFIG) if folder else name
    key = key_of("open_clip", open_clip.__version__, config, asked.image_size, asked.templates, list(classes))
    if any(name in ("classification_head.weight", "head.weight") for name in names):
        width = network.visual.output_dim
        tower = TowerWithHead(network.visual, width, len(classes))
        return ImageNetwork(tower, transform, _call, key, rename=tower_name)
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES if asked.templates == "openai" else (str,)
    heads: list[Tensor] = []

    def ready() -> None:
        words = [name.replace("_", " ") for name in classes]
        heads[:] = [open_clip.build_zero_shot_classifier(network, tokenizer, words, templates, device=device())]

    def logits(module: Any, images: Tensor) -> Tensor:
        answered: Tensor = module.encode_image(images, normalize=True) @ heads[0]
        return answered

    return ImageNetwork(network, transform, logits, key, ready=ready, zero_shot=True)


def _seen_by(open_clip: Any, name: str) -> dict[str, Any]:
    """How images are prepared, where all published weights of a network agree; else as open_clip does it."""
    if name not in open_clip.list_models():
        return {}  # a config of its own says it
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, tag) or {} for tag in tags]
    found = {}
    for field in ("mean", "std", "interpolation", "resize_mode"):
        values = {each.get(field) for each in known}
        if len(values) == 1 and (value := values.pop()) is not None:
            found[f"image_{field}"] = value
    return found


def _transformers(
    asked: NetworkName, paths: Sequence[Path], names: Sequence[str], classes: Sequence[str]
) -> ImageNetwork:
    from transformers import AutoImageProcessor, AutoModelForImageClassification  # noqa: PLC0415

    source, config = read_source(asked, paths, "Classification")
    try:
        network = AutoModelForImageClassification.from_config(config)
        reader = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{source}: no image classifier of transformers: {first_line(error)}") from None

    def prepare(image: Any) -> Tensor:
        pixels: Tensor = reader(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def logits(module: Any, images: Tensor) -> Tensor:
        answered: Tensor = module(pixel_values=images).logits
        return answered

    ids = {label: i for i, label in config.id2label.items()}
    generic = ids.keys() == {f"LABEL_{i}" for i in ids.values()}
    key = key_of("transformers", importlib.import_module("transformers").__version__, *settings_in(source))
    return ImageNetwork(network, prepare, logits, key, None if generic else ids, source=source)


def read_source(asked: NetworkName | None, paths: Sequence[Path], ending: str) -> tuple[Path, Any]:
    """The folder with the config of the ingredients, and the config.

    Args:
        asked: --network transformers:FOLDER; None or without a folder: that of the first ingredient.
        paths: the ingredients.
        ending: of the architecture in the config, such as `Classification`; several are separated by bars.

    Raises:
        UserError: no config, or of another kind of network.
    """
    from transformers import AutoConfig  # noqa: PLC0415

    source = Path(asked.name) if asked and asked.name else config_folder(paths, "config.json")
    if source is None or not (source / "config.json").is_file():
        raise UserError(
            f"{source or paths[0]}: there is no config.json: write --network transformers:FOLDER, a folder of "
            "save_pretrained with the config and the tokenizer of these weights"
        )
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{source}: transformers cannot read its config.json: {first_line(error)}") from None
    made = (config.architectures or [""])[0]
    if made and not made.endswith(tuple(ending.split("|"))):
        raise UserError(f"{source}: its config.json says {made}, which is no network for this score")
    return source, config


def settings_in(folder: Path) -> list[Path]:
    """Files of a folder that say how a network computes and reads: configs, tokenizers, code."""
    return sorted(
        path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model", ".py") and path.is_file()
    )


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
