"""What is exported: a network with a soup's weights, and what has to travel with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from configs.data import AnyTask, Task
from configs.stages import Export
from configs.training import Model
from models.classifier import Classifier, Network, architecture
from models.hub import tokenizer_of
from models.tokens import Tokenizer
from soups.errors import UserError
from soups.export.network import loaded
from soups.files.atomic import read_json, read_jsonl
from soups.files.weights import load_weights
from store.rows import score_of
from tasks.eval_images import EvalTransform, eval_transform
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
    task: Task
    scores: tuple[Mapping[str, Any], ...] = ()  # rows of scores.jsonl; empty where it was not evaluated
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classifier(self) -> Classifier:
        """The network, of a tower with a head."""
        assert isinstance(self.network, Classifier)  # of model.head other than prompt
        return self.network

    @property
    def images(self) -> EvalTransform:
        """What is done to images before they are normalised."""
        return eval_transform(self.model)

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns texts into ids."""
        return tokenizer_of(self.model, self.task.answers if self.task else ())

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of RGB in [0, 1], of networks that see images."""
        assert self.classifier.mean is not None and self.classifier.std is not None
        mean, std = ((value.flatten().double() / 255).tolist() for value in (self.classifier.mean, self.classifier.std))
        return [round(value, 8) for value in mean], [round(value, 8) for value in std]

    def example(self, count: int) -> Tensor:
        """(count, 3, S, S) uint8 images or (count, L) token ids, random and always the same, to compare logits on."""
        generator = torch.Generator().manual_seed(count)
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


def _settings_of(run: Path) -> tuple[str, Model, Task]:
    path = run / "ingredients/000/config.json"
    config = read_json(path)
    try:
        model, task = TypeAdapter(Model), TypeAdapter(AnyTask)
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


def read_source(settings: Export) -> Source:
    """The soup that is meant; a `UserError` for none, an ensemble, damaged weights, or class names that are nowhere."""
    soup = settings.soup
    if not soup.exists():
        raise UserError(f"soup={soup}: no such file or folder; e.g. soup=runs/demo/soups/greedy")
    folder = (soup if soup.is_dir() else soup.parent).resolve()
    run = next((parent for parent in folder.parents if (parent / "ingredients/000/config.json").exists()), None)
    if run is None or not (soup.is_dir() or soup.name == WEIGHTS):
        raise UserError(
            f"soup={soup} is no soup of a run, which is a folder such as runs/demo/soups/greedy; "
            "your own files: soups export FILE --to LIBRARY --out FOLDER"
        )
    path = next((folder / name for name in ("soup.json", "done.json") if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder} holds no finished model: run python -m soups for it first")
    record = read_json(path)
    if record.get("digest") is None:
        raise UserError(
            f"{folder} is an ensemble or diverged: it has no weights of its own, so there is none to export"
        )
    name, model, task = _settings_of(run)
    network: Any = architecture(model, task.size, task.answers)
    network = loaded(network, load_weights(folder / WEIGHTS, record["digest"]), f"the network that {run} speaks of")
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
