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
from soups.scorers.metrics import of_classes
from soups.scorers.networks import ImageNetwork, device, image_network, load_into, matched
from soups.scoring import HeldOut, Learning, Scorer, key_of
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
    """Names of the class folders: sorted, as numbers where all of them are."""
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


def labels_of(root: Path, head: int | None) -> tuple[list[str], dict[str, int]]:
    """Names of the classes in the order of their numbers, and each folder's number.

    Folders of WordNet ids are ImageNet's, whose numbers they have where `head`, the classes of the ingredients, is all.
    """
    folders = class_folders(root)
    if not all(WORDNET.fullmatch(name) for name in folders):
        return folders, {name: i for i, name in enumerate(folders)}
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
        return words, {name: known.index(name) for name in folders}
    return [words[known.index(name)] for name in folders], {name: i for i, name in enumerate(folders)}


def files_of(root: Path, folders: Sequence[str]) -> list[tuple[Path, str]]:
    """Every image below the class folders, sorted, and its folder; a UserError where a class has none."""
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


def split_preparation(prepare: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]:
    """A preparation of images split where they are still bytes, which are kept: four times smaller than floats.

    That is before ToTensor in torchvision's `Compose(..., ToTensor, Normalize)`, as timm and open_clip build it. The
    first part takes an image of PIL, the second a batch of what is kept, on its device.
    """
    steps = list(getattr(prepare, "transforms", []))
    kinds = [type(step).__name__ for step in steps]
    if kinds[-2:] not in (["ToTensor", "Normalize"], ["MaybeToTensor", "Normalize"]):
        return prepare, lambda images: images
    mean, std = (torch.as_tensor(getattr(steps[-1], name)).view(-1, 1, 1) for name in ("mean", "std"))
    compose: Any = type(prepare)

    def normalised(images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(mean.to(images.device)).div_(std.to(images.device))

    return compose(steps[:-2]), normalised


def _read(prepare: Callable[[Any], Any], path: Path) -> NDArray[Any]:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError("its pixels have more than 8 bits, which would be cut off at 255: save it with 8")
            kept = prepare(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is damaged or no image ({first_line(error)}): repair or delete it") from None
    return kept.numpy() if isinstance(kept, Tensor) else np.asarray(kept).transpose(2, 0, 1)


def _decoded(prepare: Callable[[Any], Any], paths: Sequence[Path]) -> NDArray[Any] | str:
    try:
        return np.stack([_read(prepare, path) for path in paths])
    except UserError as error:
        return str(error)  # an error of a worker would bring its traceback along


def decoded(prepare: Callable[[Any], Any], paths: Sequence[Path], workers: int) -> NDArray[Any]:
    """(N, 3, H, W) of all images, in a file without a name: memory that the system can take back."""
    workers = 0 if workers < 2 or len(paths) <= TOGETHER * (2 * workers - 1) else workers
    context = "fork" if workers else None  # some preparations cannot be pickled
    batches: DataLoader[Any] = DataLoader(
        paths,  # type: ignore[arg-type]  # a list is a dataset too
        TOGETHER,
        num_workers=workers,
        collate_fn=partial(_decoded, prepare),
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
    def kept(self) -> tuple[Callable[[Tensor], Tensor], NDArray[Any]]:
        """What makes batches of the images, and all of them, decoded when they are first asked for."""
        prepare, normalised = split_preparation(self.network.prepare)
        return normalised, decoded(prepare, self.paths, self.workers)

    def batch(self, places: Any) -> Tensor:
        """(b, 3, H, W) as the network sees them, on its device."""
        normalised, kept = self.kept
        return normalised(torch.from_numpy(np.array(kept[places])).to(device()))

    def batches(self) -> Iterator[Tensor]:
        """All images, in order."""
        for start in range(0, len(self.paths), self.batch_size):
            yield self.batch(slice(start, start + self.batch_size))

    def learning(self, batch_size: int | None) -> Learning:
        """Labelled minibatches in an order that depends on the epoch alone, and their cross-entropy."""
        from soups.descent import cross_entropy, shuffled  # noqa: PLC0415

        network = self.network
        if network.zero_shot:
            raise UserError("learned needs a network with a head: a zero-shot answer is made of the text tower too")
        module = network.module.to(device())
        order = shuffled(torch.arange(len(self.paths)), self.labels, batch_size or LEARNED_BATCH, "images")

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for rows, labels in order(epoch):
                yield self.batch(rows.numpy()), labels.to(device())

        def loss(module: Any, batch: tuple[Tensor, Tensor], beta: Tensor) -> tuple[Tensor, int]:
            return cross_entropy(lambda images: network.logits(module, images), batch, beta)  # type: ignore[arg-type]

        return Learning(module, batches, loss, network.rename)

    def statistics(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Batch-norm statistics of some weights, measured on all images, by the names in the file."""
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
    """A metric of a network's answers to labelled images, root/<class>/<image>; images may lie deeper."""
    if asked.network is None:
        raise UserError(
            "--images needs --network timm:NAME, open_clip:NAME, transformers:FOLDER or "
            "function:module:name; the library alone where a config lies beside the models"
        )
    root = asked.path
    with opened([pool.paths[0]], pool.reading) as (first,):
        # ImageNet's head, whose classes keep their numbers where folders of some of them are missing.
        head = 1000 if any(entry.shape == (1000,) for entry in first.entries.values()) else None
    names, ids = labels_of(root, head)
    network = image_network(asked, pool, first.names, names)
    folders = list(ids)
    if network.class_ids is not None:
        strange = sorted(set(ids) - network.class_ids.keys())
        if strange:
            raise UserError(
                f"--images {root}: the folder {strange[0]!r} is not a class in the network's config.json: name the "
                "folders as id2label does"
            )
        ids = network.class_ids
    files = files_of(root, folders)
    known = torch.tensor([ids[folder] for _, folder in files])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(8, cores) if asked.workers is None else asked.workers
    images = Images(network, [path for path, _ in files], known, asked.batch_size or BATCH, workers)
    relative = [(str(path.relative_to(root)), ids[folder]) for path, folder in files]
    key = key_of("images", network.key, asked.metric, relative, *images.paths)
    return of_classes(
        asked.metric, images.predicted, known, key, learning=images.learning, statistics=images.statistics
    )
