"""Labelled images, a folder for each class: decoded once for all candidates, in worker processes."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from soups.candidates import Candidate
from soups.errors import UserError, first_line
from soups.files.opening import opened
from soups.heldout import HeldOut
from soups.scorers.metrics import of_classes
from soups.scorers.networks import ImageNetwork, device, image_network, load_into, matched
from soups.scoring import Learning, Scorer, key_of
from soups.sources import Pool

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
WORDNET = re.compile(r"n\d{8}")
BATCH = 64  # images of a forward pass
LEARNED_BATCH = 256  # images of a step of a learned soup, as the authors' script has it
TOGETHER = 32  # images that a worker decodes at a time


def is_data(name: str) -> bool:
    """Whether a file or folder holds data: not hidden, and no part of a Mac's archive."""
    return not name.startswith(".") and name != "__MACOSX"


def class_folders(root: Path) -> list[str]:
    """Names of the class folders: sorted, as numbers where all of them are.

    Raises:
        UserError: no such folder, none in it, or some numbers with leading zeros and some without.
    """
    if not root.is_dir():
        raise UserError(f"--images {root}: no such folder; it has a folder of images for each class")
    names = sorted(entry.name for entry in os.scandir(root) if is_data(entry.name) and entry.is_dir())
    if not names:
        raise UserError(f"--images {root} has no folders: it needs a folder of images for each class")
    if all(name.isdecimal() for name in names):
        if len({int(name) for name in names}) < len(names):
            raise UserError(f"--images {root}: two class folders are the same number, such as 1 and 01: rename one")
        names.sort(key=int)
    return names


@dataclass(frozen=True)
class Labels:
    """Classes as the network knows them."""

    names: list[str]  # in the order of their numbers
    ids: dict[str, int]  # folder -> class number


def labels_of(root: Path, head: int | None) -> Labels:
    """What each folder's number is.

    Args:
        root: of the images.
        head: classes that the ingredients' head has; None: not known.

    Raises:
        UserError: WordNet ids that are not ImageNet's.
    """
    folders = class_folders(root)
    if not all(WORDNET.fullmatch(name) for name in folders):
        return Labels(folders, {name: i for i, name in enumerate(folders)})
    from timm.data.imagenet_info import ImageNetInfo  # noqa: PLC0415

    imagenet = ImageNetInfo("imagenet-1k")
    known = list(imagenet.label_names())
    strange = [name for name in folders if name not in known]
    if strange:
        raise UserError(
            f"--images {root}: {strange[0]} is a WordNet id that ImageNet's 1,000 classes do not have: name the "
            "folders as the classes"
        )
    words = [imagenet.label_name_to_description(name).split(",")[0] for name in known]
    if head == len(known) or len(folders) == len(known):
        return Labels(words, {name: known.index(name) for name in folders})
    return Labels([words[known.index(name)] for name in folders], {name: i for i, name in enumerate(folders)})


def files_of(root: Path, folders: Sequence[str]) -> list[tuple[Path, str]]:
    """Every image below the class folders, sorted, and its folder.

    Raises:
        UserError: a class without an image.
    """
    found = []
    for folder in folders:
        mine = []
        for place, below, names in os.walk(root / folder, followlinks=True):
            below[:] = sorted(filter(is_data, below))
            mine += [Path(place, name) for name in names if is_data(name) and name.lower().endswith(ENDINGS)]
        if not mine:
            raise UserError(f"--images {root}: the class folder {folder!r} has no image ({' '.join(ENDINGS)})")
        found += [(path, folder) for path in sorted(mine)]
    return found


@dataclass(frozen=True)
class Prepared:
    """A preparation of images split where they are still bytes: those are kept, four times smaller than floats."""

    first: Callable[[Any], Any]  # an image of PIL to an image, or to a tensor
    mean: Tensor | None = None  # (3, 1, 1); None: `first` does everything
    std: Tensor | None = None

    def __call__(self, path: Path) -> NDArray[Any]:
        """What is kept of one image.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with Image.open(path) as image:
                kept = self.first(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is damaged or no image ({first_line(error)}): repair or delete it") from None
        return kept.numpy() if isinstance(kept, Tensor) else np.asarray(kept).transpose(2, 0, 1)

    def batch(self, kept: NDArray[Any]) -> Tensor:
        """(b, 3, H, W) as the network sees them, on its device."""
        images = torch.from_numpy(np.array(kept)).to(device())
        if self.mean is None or self.std is None:
            return images
        return images.float().div_(255).sub_(self.mean.to(images.device)).div_(self.std.to(images.device))


def split_preparation(prepare: Callable[[Any], Any]) -> Prepared:
    """torchvision's `Compose(..., ToTensor, Normalize)`, as timm and open_clip build it, split at ToTensor."""
    steps = list(getattr(prepare, "transforms", []))
    kinds = [type(step).__name__ for step in steps]
    if kinds[-2:] not in (["ToTensor", "Normalize"], ["MaybeToTensor", "Normalize"]):
        return Prepared(prepare)
    mean, std = (torch.as_tensor(getattr(steps[-1], name)).view(-1, 1, 1) for name in ("mean", "std"))
    compose: Any = type(prepare)
    return Prepared(compose(steps[:-2]), mean, std)


def _decoded(prepared: Prepared, paths: Sequence[Path]) -> NDArray[Any] | str:
    try:
        return np.stack([prepared(path) for path in paths])
    except UserError as error:
        return str(error)  # an error of a worker would bring its traceback along


def decoded(prepared: Prepared, paths: Sequence[Path], workers: int) -> NDArray[Any]:
    """(N, 3, H, W) of all images, in a file without a name: memory that the system can take back.

    Raises:
        UserError: an image cannot be read; names it.
    """
    workers = 0 if workers < 2 or len(paths) <= TOGETHER * (2 * workers - 1) else workers
    context = "fork" if workers else None  # some preparations cannot be pickled
    batches: DataLoader[Any] = DataLoader(
        paths,  # type: ignore[arg-type]  # a list is a dataset too
        TOGETHER,
        num_workers=workers,
        collate_fn=partial(_decoded, prepared),
        multiprocessing_context=context,
    )
    kept: NDArray[Any] = np.empty(0)
    for place, found in zip(range(0, len(paths), TOGETHER), batches, strict=True):
        if isinstance(found, str):
            raise UserError(found)
        if place == 0:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - it is the memory of the array
            kept = np.memmap(file, found.dtype, "w+", shape=(len(paths), *found.shape[1:]))
        if found.shape[1:] != kept.shape[1:]:
            raise UserError(f"{paths[place]} is prepared as {found.shape[1:]}, the first image as {kept.shape[1:]}")
        kept[place : place + len(found)] = found
    return kept


@dataclass
class Images:
    """Labelled images for one network."""

    network: ImageNetwork
    paths: list[Path]
    labels: Tensor  # (N,)
    batch_size: int
    workers: int

    @cached_property
    def kept(self) -> tuple[Prepared, NDArray[Any]]:
        """What makes batches of the images, and all of them, decoded when they are first asked for."""
        prepared = split_preparation(self.network.prepare)
        return prepared, decoded(prepared, self.paths, self.workers)

    def batches(self) -> Iterator[Tensor]:
        """All images, in order, as the network sees them."""
        prepared, kept = self.kept
        for start in range(0, len(kept), self.batch_size):
            yield prepared.batch(kept[start : start + self.batch_size])

    def learning(self, batch_size: int | None) -> Learning:
        """Labelled minibatches in an order that depends on the epoch alone, and their cross-entropy.

        Raises:
            UserError: a network that answers by class names, whose text tower gets no gradient.
        """
        from soups.descent import cross_entropy, shuffled  # noqa: PLC0415

        network, (prepared, kept) = self.network, self.kept
        if network.zero_shot:
            raise UserError("learned needs a network with a head: a zero-shot answer is made of the text tower too")
        module = network.module.to(device())
        order = shuffled(torch.arange(len(kept)), self.labels, batch_size or LEARNED_BATCH, "images")

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for rows, labels in order(epoch):
                yield prepared.batch(kept[rows.numpy()]), labels.to(device())

        def loss(module: Any, batch: tuple[Tensor, Tensor], beta: Tensor) -> tuple[Tensor, int]:
            return cross_entropy(lambda images: network.logits(module, images), batch, beta)  # type: ignore[arg-type]

        return Learning(module, batches, loss, network.rename)

    def statistics(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Batch-norm statistics of some weights, measured on all images, by the names in the file.

        Raises:
            UserError: the network has no batch norm.
        """
        from soups.batch_norm import recompute_batch_norm, statistics_of  # noqa: PLC0415

        module = self.network.module
        load_into(module, weights, "the soup", self.network.rename)
        if not recompute_batch_norm(module.to(device()), self.batches()):
            raise UserError("the network has no batch norm with running statistics: leave out batch_norm=recompute")
        fresh, own = statistics_of(module), matched(weights, module.state_dict(), self.network.rename)
        return {name: fresh[place] for name, place in own.items() if place in fresh}

    @torch.inference_mode()
    def predicted(self, candidate: Candidate) -> Tensor:
        """(N,) class numbers."""
        batches = self.batches()
        first = next(batches)  # a damaged image is found before weights are loaded
        module = self.network.load(candidate)
        found = [self.network.logits(module, first).argmax(dim=1).cpu()]
        return torch.cat([*found, *(self.network.logits(module, batch).argmax(dim=1).cpu() for batch in batches)])


def of_images(asked: HeldOut, pool: Pool) -> Scorer:
    """A metric of a network's answers to labelled images, root/<class>/<image>; images may lie deeper.

    Raises:
        UserError: folders, images or a network that do not fit.
    """
    if asked.network is None:
        raise UserError(
            "--images needs --network timm:NAME, open_clip:NAME, transformers:FOLDER or "
            "function:module:name; the library alone where a config lies beside the models"
        )
    root = asked.path
    with opened([pool.paths[0]], pool.reading) as (first,):
        # ImageNet's head, whose classes keep their numbers where folders of some of them are missing.
        head = 1000 if any(entry.shape == (1000,) for entry in first.entries.values()) else None
    labels = labels_of(root, head)
    network = image_network(asked, pool, first.names, labels.names)
    ids = labels.ids
    if network.class_ids is not None:
        strange = sorted(set(ids) - network.class_ids.keys())
        if strange:
            raise UserError(
                f"--images {root}: the folder {strange[0]!r} is not a class in the network's config.json: name the "
                "folders as id2label does"
            )
        ids = network.class_ids
    files = files_of(root, list(labels.ids))
    known = torch.tensor([ids[folder] for _, folder in files])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(8, cores) if asked.workers is None else asked.workers
    images = Images(network, [path for path, _ in files], known, asked.batch_size or BATCH, workers)
    relative = [(str(path.relative_to(root)), ids[folder]) for path, folder in files]
    key = key_of("images", network.key, asked.metric, relative, *images.paths)
    return of_classes(
        asked.metric, images.predicted, known, key, learning=images.learning, statistics=images.statistics
    )
