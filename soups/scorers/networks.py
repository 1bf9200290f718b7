"""Networks of timm, open_clip, transformers or the user's function, and what they answer to images."""

import json
import logging as python_logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soups.candidates import Candidate
from soups.errors import UserError, first_line
from soups.files.folders import config_beside, config_of
from soups.scorers.outside import code_of, function_named
from soups.scoring import HeldOut, key_of
from soups.sources import Pool

Rename = Callable[[str], str | None]  # a tensor's name in files -> in the network; None: no use
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # what wrappers put before every name
SIZE = 224  # pixels that a network of a function sees
# Of the text tower in the authors' released files, which classify nothing.
OF_TEXT = ("positional_embedding", "text_projection", "logit_scale", "token_embedding.", "ln_final.")


@dataclass
class ImageNetwork:
    """A network that the ingredients are weights of, how it is fed, and how it answers."""

    module: nn.Module
    prepare: Callable[[Any], Any]  # an image of PIL to a tensor
    key: str  # names the network, its library and how it sees images
    logits: Callable[[Any, Tensor], Tensor] = lambda module, images: module(images)  # (b, C) of a batch
    class_ids: dict[str, int] | None = None  # what the network calls its classes; None: in the order of the folders
    rename: Rename = lambda name: name
    ready: Callable[[], None] = lambda: None  # called when weights were loaded
    zero_shot: bool = False  # it answers by the names of the classes, by way of a text tower
    source: Path | None = None  # of transformers: the folder with the config

    def load(self, candidate: Candidate) -> nn.Module:
        """The network with a candidate's weights, one tensor after the other."""
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


def matched(theirs: Iterable[str], wanted: Iterable[str], rename: Rename = lambda name: name) -> dict[str, str]:
    """A file's names -> the network's, equal or equal without prefixes, but those that `rename` has no use for."""
    wanted = set(wanted)
    by_bare = {bare(name): name for name in wanted}
    renamed = {name: new for name in theirs if (new := rename(name)) is not None}
    return {name: new if new in wanted else by_bare.get(bare(new), new) for name, new in renamed.items()}


def places(theirs: Iterable[str], state: Mapping[str, Tensor], name: str, rename: Rename) -> dict[str, str]:
    """A network's names -> the file's of the same tensors; a tied tensor may stand under any of its names.

    `state` holds the network's own tensors (keep_vars=True).
    """
    found = {place: file for file, place in matched(theirs, state, rename).items()}
    filled = {id(state[place]) for place in found if place in state}
    unknown = sorted(file for place, file in found.items() if place not in state)
    missing = sorted(place for place, tensor in state.items() if id(tensor) not in filled)
    if unknown or missing:
        where = "the file alone" if unknown else "the network alone"
        raise UserError(f"{name} is not of this network: {(unknown or missing)[0]!r} is in {where}")
    return found


def load_into(module: nn.Module, weights: Mapping[str, Tensor], name: str, rename: Rename = lambda name: name) -> None:
    """Copy weights into a network's own tensors."""
    state = module.state_dict(keep_vars=True)
    found = places(weights, state, name, rename)
    with torch.no_grad():
        for place in filter(found.__contains__, state):  # in the network's order: a head's weight before its bias
            tensor = weights[found[place]]
            if tensor.shape != state[place].shape:
                raise UserError(
                    f"{name}: {found[place]!r} is {tuple(tensor.shape)}, the network has {tuple(state[place].shape)}"
                )
            state[place].copy_(tensor)


def from_pretrained(
    library: Any, folder: Path | None, name: str, network: str = "the network in its config.json", **more: Any
) -> Any:
    """A network of transformers with every tensor of it found; `name` and `network` are for messages.

    `library` is a class of transformers, and `more` of its own `from_pretrained`: without `folder` config and weights.
    """
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    silence = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is said below, in one line
    try:
        module, info = library.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, **more
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: transformers cannot load it: {first_line(error)}") from None
    finally:
        logging.set_verbosity(silence)
    odd = [*info["missing_keys"], *info["unexpected_keys"], *(key[0] for key in info["mismatched_keys"])]
    if odd:
        raise UserError(f"{name} is not of {network}: tensor {min(odd)!r} is missing, unknown or of another shape")
    return module


def image_network(asked: HeldOut, pool: Pool, names: Sequence[str], classes: Sequence[str]) -> ImageNetwork:
    """The network that was asked for, of tensors and classes with these names."""
    of_library = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers, "function": _function}
    return of_library[asked.library](asked, pool, names, classes)


def _timm(asked: HeldOut, pool: Pool, names: Sequence[str], classes: Sequence[str]) -> ImageNetwork:
    import timm  # noqa: PLC0415
    from timm.data import create_transform, resolve_data_config  # noqa: PLC0415

    name = asked.name or config_of(pool.like).get("architecture")
    if name is None:
        raise UserError("--network timm:NAME is needed; timm.list_models() has the names")
    size, more, shape = asked.image_size, dict[str, Any](), {}
    if size is not None:
        more, shape = {"img_size": size}, {"input_size": (3, size, size)}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=len(classes), **more)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"--network timm:{name}: {error}; timm.list_models() has the names") from None
    seen = resolve_data_config({}, model=network) | shape
    key = key_of("timm", timm.__version__, name, str(seen), len(classes))
    return ImageNetwork(network, create_transform(**seen), key)


def _function(asked: HeldOut, pool: Pool, names: Sequence[str], classes: Sequence[str]) -> ImageNetwork:
    from timm.data import create_transform  # noqa: PLC0415

    assert asked.name is not None  # HeldOut.scorer sees to that
    build = function_named(asked.name)
    try:
        network = build(num_classes=len(classes))
    except TypeError as error:
        raise UserError(f"--network function:{asked.name}: {error}; it is called with num_classes=") from None
    size = asked.image_size or SIZE
    transform = create_transform((3, size, size), crop_pct=0.875)
    return ImageNetwork(network, transform, key_of("function", code_of(build), size, len(classes)))


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
    if name.startswith("model.") and name.removeprefix("model.").startswith(OF_TEXT):
        return None
    return name.replace("model.visual.", "tower.", 1).replace("classification_head.", "head.", 1)


def _open_clip(asked: HeldOut, pool: Pool, names: Sequence[str], classes: Sequence[str]) -> ImageNetwork:
    import open_clip  # noqa: PLC0415

    beside = config_beside(pool.like, "open_clip_config.json")
    name = asked.name or (f"local-dir:{beside.parent}" if beside else None)
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
    config = key_of(beside) if beside else name
    key = key_of("open_clip", open_clip.__version__, config, asked.image_size, asked.templates, list(classes))
    if any(name in ("classification_head.weight", "head.weight") for name in names):
        tower = TowerWithHead(network.visual, network.visual.output_dim, len(classes))
        return ImageNetwork(tower, transform, key, rename=tower_name)
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES if asked.templates == "openai" else (str,)
    heads: list[Tensor] = []

    def ready() -> None:
        words = [name.replace("_", " ") for name in classes]
        heads[:] = [open_clip.build_zero_shot_classifier(network, tokenizer, words, templates, device=device())]

    return ImageNetwork(
        network,
        transform,
        key,
        lambda module, images: module.encode_image(images, normalize=True) @ heads[0],
        ready=ready,
        zero_shot=True,
    )


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


def _transformers(asked: HeldOut, pool: Pool, names: Sequence[str], classes: Sequence[str]) -> ImageNetwork:
    from transformers import AutoImageProcessor, AutoModelForImageClassification  # noqa: PLC0415

    source, config = read_source(asked, pool, "Classification")
    try:
        network = AutoModelForImageClassification.from_config(config)
        reader = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{source}: no image classifier of transformers: {first_line(error)}") from None

    ids = {label: i for i, label in config.id2label.items()}
    generic = ids.keys() == {f"LABEL_{i}" for i in ids.values()}
    key = key_of("transformers", version("transformers"), *settings_in(source))
    return ImageNetwork(
        network,
        lambda image: reader(image, return_tensors="pt")["pixel_values"][0],
        key,
        lambda module, images: module(pixel_values=images).logits,
        None if generic else ids,
        source=source,
    )


def read_source(asked: HeldOut, pool: Pool, *endings: str) -> tuple[Path, Any]:
    """The folder that was asked for, or else the first ingredient's, and its config."""
    from transformers import AutoConfig  # noqa: PLC0415

    source = Path(asked.name) if asked.name else pool.like
    beside = config_beside(source, "config.json")
    if beside is None:
        raise UserError(
            f"{source}: there is no config.json: write --network transformers:FOLDER, a folder of "
            "save_pretrained with the config and the tokenizer of these weights"
        )
    source = beside.parent
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{source}: transformers cannot read its config.json: {first_line(error)}") from None
    made = (config.architectures or [""])[0]
    if made and not made.endswith(endings):
        raise UserError(f"{source}: its config.json says {made}, which is no network for this score")
    return source, config


def tokenizer_of(source: Path) -> Any:
    """The tokenizer beside the ingredients; a UserError where there is none."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no tokenizer beside the weights: {first_line(error)}") from None


def settings_in(folder: Path) -> list[Path]:
    """Files of a folder that say how a network computes and reads: configs, tokenizers, code."""
    return sorted(
        path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model", ".py") and path.is_file()
    )
