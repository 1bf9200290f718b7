"""Recipe 1 on files of one's own: a network of timm, and a folder of labelled images that select."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from configs.errors import UserError
from configs.schema import OwnPool, TimmModel
from eval.metrics import correct
from soups.files import FileSoup, average_files
from soups.journal import Journal
from soups.mixture import Loader
from soups.recipes import greedy
from soups.residents import FileWeights
from store.runs import digest_of
from store.weights import Weights
from store.workers import progress_bar


def held_out_images(root: Path, network: nn.Module, batch_size: int) -> DataLoader:
    """Batches of the folder's images under the network's own evaluation transform.

    Raises:
        UserError: no such folder, or a class without an image.
    """
    transform = create_transform(**resolve_data_config({}, model=network))
    try:
        images = ImageFolder(str(root), transform)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"task.root={root}: {error}") from None
    return DataLoader(images, batch_size)


def build(model: TimmModel, classes: int) -> nn.Module:
    """The network, with random weights.

    Raises:
        UserError: timm does not know the name.
    """
    try:
        return timm.create_model(model.name, pretrained=False, num_classes=classes).eval()
    except RuntimeError as error:
        raise UserError(f"model.name={model.name}: {error}; timm.list_models() has the names") from None


def accuracy_on(network: nn.Module, images: DataLoader) -> Callable[[Weights], float]:
    """Top-1 in [0, 1] of weights on the images."""

    @torch.inference_mode()
    def accuracy(weights: Weights) -> float:
        network.load_state_dict(dict(weights), strict=True)
        return sum(int(correct(network(batch), labels).sum()) for batch, labels in images) / len(images.dataset)  # type: ignore[arg-type]

    return accuracy


def _fitting(path: Path, network: nn.Module) -> Loader:
    """A loader of a file that fits the network.

    Raises:
        UserError: it has other tensors or shapes than the network.
    """
    own, weights = network.state_dict(), FileWeights(path)
    only = sorted(own.keys() ^ weights.keys())
    if only:
        raise UserError(f"{path} is not of this network: {only[0]!r} is not in both")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name!r} is {tuple(weights[name].shape)}, the network with a class for each folder of "
                f"task.root has {tuple(tensor.shape)}"
            )
    return lambda: weights


def cook_greedy(pool: OwnPool, paths: list[Path]) -> FileSoup:
    """Cook and write the greedy soup of files, with every decision in its metadata.

    Accuracies stand in <out>.journal.jsonl as they come, so that a killed run continues; it is deleted at the end.

    Raises:
        UserError: files that do not fit the network or the folder's classes, or whatever `average_files` refuses.
    """
    assert pool.task is not None and pool.model is not None  # the schema sees to that
    root = pool.task.root
    classes = len([entry for entry in os.scandir(root) if entry.is_dir()]) if root.is_dir() else 1
    network = build(pool.model, classes)
    images = held_out_images(root, network, pool.model.batch_size)
    models = [_fitting(path, network) for path in paths]
    path = pool.out.with_name(f"{pool.out.name}.journal.jsonl")
    files = [str(file) for file, _ in images.dataset.samples]  # type: ignore[attr-defined]
    journal = Journal(path, prefix=digest_of([pool.model.name, files]))
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("evaluating", total=2 * len(models) - 1)
        measured = journal.remembered(accuracy_on(network, images))

        def accuracy(weights: Weights) -> float:
            score = measured(weights)
            bar.advance(task)
            return score

        held_out = [accuracy(load()) for load in models]
        soup = greedy(models, held_out, accuracy, ties=pool.ties)
    chosen = [paths[i] for i in soup.ingredients]
    decisions = [{"file": paths[t.candidate].name, "score": t.score, "accepted": t.accepted} for t in soup.trials]
    note: dict[str, Any] = {
        "recipe": "greedy",
        "ties": pool.ties,
        "batch_norm": pool.batch_norm,
        "decisions": decisions,
        "held_out_images": len(files),
        "model": pool.model.name,
    }
    cooked = average_files(chosen, pool.out, dtype=pool.dtype, threads=pool.threads, note=note)
    path.unlink(missing_ok=True)
    return cooked
