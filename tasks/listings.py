"""Data sets that list their splits in text files: Describable Textures, Food-101 and SUN397."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks.content import is_data
from tasks.files import Listed, Lists, label_of, lines


def _listed(source: Path, root: Path, files: Sequence[str], names: Sequence[str], classes: Sequence[str]) -> Listed:
    """Images whose class names are known, without lines that are no data."""
    place = {name: label for label, name in enumerate(classes)}
    of_data = [(file, name) for file, name in zip(files, names, strict=True) if is_data(file)]
    labels = np.array([label_of(name, place, source) for _, name in of_data], dtype=np.int64)
    return Listed(source, root, [file for file, _ in of_data], labels)


def _spaced(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names)


def _dtd_classes(folder: Path) -> tuple[str, ...]:
    """The folders in the first lists of images: each class is in each of them."""
    return tuple(sorted({line.split("/")[0] for line in lines(folder / "labels/train1.txt") if is_data(line)}))


def _dtd_split(folder: Path, own: str) -> Listed:
    """labels/<own>.txt has lines such as banded/banded_0002.jpg."""
    source = folder / "labels" / f"{own}.txt"
    files = lines(source)
    return _listed(source, folder / "images", files, [file.split("/")[0] for file in files], _dtd_classes(folder))


DTD = Lists(_dtd_classes, lambda folder: _spaced(_dtd_classes(folder)), _dtd_split)


def _food_classes(folder: Path) -> tuple[str, ...]:
    return lines(folder / "meta/classes.txt")


def _food_split(folder: Path, own: str) -> Listed:
    """meta/<own>.txt has lines such as apple_pie/1005649."""
    source = folder / "meta" / f"{own}.txt"
    found = lines(source)
    files = [f"{line}.jpg" for line in found]
    return _listed(source, folder / "images", files, [line.split("/")[0] for line in found], _food_classes(folder))


FOOD101 = Lists(_food_classes, lambda folder: lines(folder / "meta/labels.txt"), _food_split)


def _sun_classes(folder: Path) -> tuple[str, ...]:
    """ClassName.txt of the images' archive, or of the partitions' beside it; lines such as /a/apse/indoor."""
    inside = folder / "SUN397/ClassName.txt"
    return lines(inside if inside.exists() else folder / "ClassName.txt")


def _sun_split(folder: Path, own: str) -> Listed:
    """<own>.txt has lines such as /a/abbey/sun_aaa.jpg."""
    source = folder / f"{own}.txt"
    files = [line.removeprefix("/") for line in lines(source)]
    names = [f"/{file.rpartition('/')[0]}" for file in files]
    return _listed(source, folder / "SUN397", files, names, _sun_classes(folder))


def _sun_names(folder: Path) -> tuple[str, ...]:
    """Without the letter: /a/apse/indoor is apse indoor."""
    return _spaced([" ".join(name.split("/")[2:]) for name in _sun_classes(folder)])


SUN397 = Lists(_sun_classes, _sun_names, _sun_split)
