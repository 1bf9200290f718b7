"""What is exported: a network with a soup's weights, and what has to travel with it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor

from configs.data import Task
from configs.errors import UserError
from configs.exporting import Export
from configs.training import Model
from models.classifier import Classifier, Network, architecture
from models.readers import tokenizer_of
from models.tokens import Tokenizer
from soups.files import Record
from soups.verify import record_of
from store.atomic import read_json, read_jsonl
from store.runs import score_of
from store.weights import Weights, load_weights
from tasks.fixed import FixedTransform, of_model
from tasks.load import class_names

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Part:
    """An ingredient, as a model card names it."""

    name: str
    weight: float | None  # its share; None where every tensor has one of its own
    held_out: float | None = None  # by the task's metric
    drawn: Mapping[str, Any] = field(default_factory=dict)  # its hyperparameters


@dataclass(frozen=True)
class Source:
    """A soup, and what a reader of its card wants to know."""

    title: str  # such as demo-greedy
    model: Model
    network: Network  # in eval mode, on the CPU
    class_names: tuple[str, ...]
    recipe: str
    parts: tuple[Part, ...]
    task: Task | None = None  # None of a soup of one's own
    scores: tuple[Mapping[str, Any], ...] = ()  # rows of scores.jsonl; empty where it was not evaluated
    provenance: Mapping[str, Any] = field(default_factory=dict)
    held_out_images: int | None = None  # of a greedy soup of one's own

    @property
    def classifier(self) -> Classifier:
        """The network, of a tower with a head."""
        assert isinstance(self.network, Classifier)  # of model.head other than prompt
        return self.network

    @property
    def images(self) -> FixedTransform:
        """What is done to images before they are normalised."""
        return of_model(self.model)

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns texts into ids."""
        return tokenizer_of(self.model, self.class_names)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of RGB in [0, 1], of networks that see images."""
        assert self.classifier.mean is not None and self.classifier.std is not None
        mean, std = ((value.flatten().double() / 255).tolist() for value in (self.classifier.mean, self.classifier.std))
        return [round(value, 8) for value in mean], [round(value, 8) for value in std]

    def example(self, count: int, seed: int = 0) -> Tensor:
        """(count, 3, S, S) uint8 images or (count, L) token ids of chance, to compare logits on."""
        generator = torch.Generator().manual_seed(seed)
        if not self.model.is_reader:
            size = self.images.size
            return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        words = self.tokenizer
        body = torch.randint(0, len(words.tokenizer), (count, 5), generator=generator)
        body[body == words.pad] = words.tokenizer.unk_token_id or 0
        around = [torch.tensor(ids, dtype=torch.long).expand(count, -1) for ids in (words.before, words.after)]
        ids = torch.cat([around[0], body, around[1]], dim=1)
        short = torch.cat([around[0][:1], body[:1, :3], around[1][:1]], dim=1)
        ids[0] = torch.cat([short, torch.full((1, 2), words.pad)], dim=1)  # the first one is padded
        return ids

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """(N, C) of the soup itself."""
        return self.network(inputs)


def _run_of(folder: Path) -> Path | None:
    """The run folder that holds a soup or a row; None of other folders."""
    return next((parent for parent in folder.parents if (parent / "ingredients/000/config.json").exists()), None)


def read_source(settings: Export) -> Source:
    """The soup that is meant.

    Raises:
        UserError: no such soup, an ensemble, damaged weights, or class names that are nowhere.
    """
    soup = settings.soup
    if not soup.exists():
        raise UserError(f"soup={soup}: no such file or folder; e.g. soup=runs/demo/soups/greedy")
    folder = soup if soup.is_dir() else soup.parent
    run = _run_of(folder.resolve())
    if run is not None and (soup.is_dir() or soup.name == WEIGHTS):
        if settings.model is not None:
            raise UserError(f"{run} knows its network: leave out model=timm")
        return _of_run(settings, folder.resolve(), run)
    if soup.is_dir():
        raise UserError(f"soup={soup} is no soup of a run, which is a folder such as runs/demo/soups/greedy")
    return _own(settings)


def _settings_of(run: Path) -> tuple[str, Model, Task]:
    path = run / "ingredients/000/config.json"
    config = read_json(path)
    try:
        model, task = TypeAdapter(Model), TypeAdapter(Task)
        return config["name"], model.validate_python(config["model"]), task.validate_python(config["task"])
    except (KeyError, ValidationError) as error:
        raise UserError(f"{path} has not the settings of a run ({str(error).splitlines()[0]})") from None


def _names(settings: Export, task: Task) -> tuple[str, ...]:
    if settings.classes is None:
        try:
            return class_names(task)
        except UserError as error:
            raise UserError(f"{error}; or name the classes: 'classes=[first,second,...]'") from None
    if len(settings.classes) != task.size:
        raise UserError(f"classes has {len(settings.classes)} names, and the task {task.size} classes")
    return settings.classes


def _loaded(network: Network, weights: Weights, path: Path) -> Network:
    try:
        network.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} is not of this network: {' '.join(str(error).split())[:200]}") from None
    return network.eval()


def _of_run(settings: Export, folder: Path, run: Path) -> Source:
    path = next((folder / name for name in ("soup.json", "done.json") if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder} holds no finished model: run python -m soups for it first")
    record = read_json(path)
    if record.get("digest") is None:
        raise UserError(
            f"{folder} is an ensemble or diverged: it has no weights of its own, so there is none to export"
        )
    name, model, task = _settings_of(run)
    network = architecture(model, task.size, task.options)
    network = _loaded(network, load_weights(folder / WEIGHTS, record["digest"]), folder / WEIGHTS)
    recipe = record.get("recipe", f"row {record.get('row', folder.name)}")
    scores = read_jsonl(folder / "scores.jsonl") if (folder / "scores.jsonl").exists() else []
    return Source(
        title=f"{name}-{recipe}".replace("/", "-").replace(" ", "-"),
        model=model,
        network=network,
        class_names=_names(settings, task),
        recipe=recipe,
        parts=tuple(_part(run, part) for part in record.get("ingredients", [])),
        task=task,
        scores=tuple(row for row in scores if row["weights"] == record["digest"]),
        provenance=record.get("provenance", {}),
    )


def _part(run: Path, part: Mapping[str, Any]) -> Part:
    done = run / "ingredients" / f"{part['row']:03d}" / "done.json"
    known = read_json(done) if done.exists() else {}
    held_out = score_of(known["held_out"]) if "held_out" in known else None
    return Part(f"row {part['row']}", part["weight"], held_out, known.get("drawn", {}))


def _own(settings: Export) -> Source:
    """A soup of one's own files, of a network of timm."""
    soup = settings.soup
    if settings.model is None:
        raise UserError(f"{soup} does not say of which network it is: type model=timm model.name=NAME")
    if soup.suffix != ".safetensors":
        raise UserError(f"soup={soup}: a soup is a .safetensors file; python -m soups writes one")
    name = settings.model.name or ""
    if not timm.is_model(name):
        raise UserError(f"timm knows no model.name={name}; timm.list_models() has the names")
    recorded = timm.get_pretrained_cfg(name)
    assert recorded is not None  # of every model that timm knows
    images = resolve_data_config(pretrained_cfg=recorded.to_dict())
    size = images["input_size"][-1]
    values = {"kind": "timm", "name": name, "image_size": size, "squash": images["crop_mode"] == "squash"}
    values |= {"eval_resize": math.floor(size / images["crop_pct"])}
    values |= {"normalize": False, "head": "random", "probe_c": (1.0,)}
    model = TypeAdapter(Model).validate_python(values)
    try:
        stored = load_file(soup)
    except (SafetensorError, OSError) as error:
        raise UserError(f"soup={soup} is damaged, or no safetensors file ({error})") from None
    weights = _towered(stored, recorded.classifier, soup)
    classes = len(weights["head.weight"])
    names = settings.classes or tuple(map(str, range(classes)))
    if len(names) != classes:
        raise UserError(f"classes has {len(names)} names, and {soup} a head of {classes} classes")
    record = _record(soup)
    network = _loaded(architecture(model, classes), weights, soup)
    return Source(
        title=soup.stem,
        model=model,
        network=network,
        class_names=names,
        recipe=record.note.get("recipe", "average") if record else "not recorded",
        parts=tuple(Part(part.file, part.weight) for part in record.ingredients) if record else (),
        provenance={"versions": record.note.get("versions", {})} if record else {},
        held_out_images=record.note.get("held_out_images") if record else None,
    )


def _record(soup: Path) -> Record | None:
    """How it was cooked; None of a file that another tool averaged."""
    try:
        return record_of(soup)
    except UserError:
        return None


def _towered(weights: Weights, classifier: Any, path: Path) -> dict[str, Tensor]:
    """The names of a timm network's tensors as a tower with a head has them."""
    if not isinstance(classifier, str) or f"{classifier}.weight" not in weights:
        raise UserError(f"{path} has no single head {json.dumps(classifier)}, so it cannot be exported")
    head = f"{classifier}."
    named = {f"tower.{name}": tensor for name, tensor in weights.items() if not name.startswith(head)}
    weight = weights[f"{head}weight"]
    bias = weights[f"{head}bias"] if f"{head}bias" in weights else torch.zeros(len(weight))
    return named | {"head.weight": weight, "head.bias": bias}
