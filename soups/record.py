"""What a soup was cooked from, as its metadata records it."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from soups.conformance import Layout
from soups.files.dtypes import OutputDtype
from soups.files.reading import Reading

FORMAT: Literal[2] = 2  # of `Record`
NO_DIGEST = "0" * 32


@dataclass(frozen=True)
class Ingredient:
    """A file's part in a soup, as the soup's metadata records it."""

    file: str  # the shortest end of its path that tells it from the others
    digest: str  # of its content: soups.files.checkpoints.content_digest
    weight: float | None  # its share, the sum over ingredients is 1; None where every tensor has weights of its own
    keeps_batch_norm: bool = False  # the batch-norm statistics are this file's


@dataclass(frozen=True)
class Record:
    """All that is needed to cook a soup again; JSON, under "soup" in its metadata.

    Soups of format 1 have a tied tensor under one name alone, and names with those of wrappers.
    """

    format: Literal[1, 2]
    ingredients: tuple[Ingredient, ...]
    weights: list[float] | dict[str, list[float]]  # as given, in the order of `ingredients`
    dtype: OutputDtype
    tied: dict[str, str]
    note: dict[str, Any]  # the recipe, its decisions, versions
    reading: Reading | None = None
    first: int | None = None  # index of the ingredient whose tensors stand in for those that are not averaged

    def metadata(self) -> dict[str, str]:
        """What a soup's file says: this, a hash of it, and the "format" that transformers ask for."""
        values = asdict(self)
        for name in ("set_aside", "base"):  # records have them where they say something
            if self.reading is not None and not values["reading"][name]:
                del values["reading"][name]
        if self.format == 1:
            del values["reading"], values["first"]
        text = json.dumps(values, sort_keys=True)
        return {"format": "pt", "soup": text, "soup_check": check_of(text)}


def parsed(text: str) -> Record:
    """A record from its JSON.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    values = json.loads(text)
    values["ingredients"] = tuple(Ingredient(**each) for each in values["ingredients"])
    if values.get("reading") is not None:
        values["reading"] = Reading(**values["reading"])
        values["reading"] = replace(values["reading"], set_aside=tuple(values["reading"].set_aside))
    if values["format"] not in (1, 2):
        raise ValueError(f"a record of format {values['format']}, which a newer version wrote")
    return Record(**values)


@dataclass(frozen=True)
class FileSoup:
    """A soup that was written."""

    path: Path
    layout: Layout
    ingredients: tuple[Ingredient, ...]
    unwrapped: dict[str, str]  # file name -> the key under which its state dict was found
    dropped: dict[str, tuple[str, ...]]  # file name -> what else it holds
    kind: str  # of its floats, where files have several kinds and none was asked for

    def remarks(self) -> list[str]:
        """What a reader would not guess about how it was made, a line each."""
        lines = []
        for keys, what in ((self.unwrapped, "reads {}"), (self.dropped, "leaves out {}")):
            texts = {file: key if isinstance(key, str) else ", ".join(key) for file, key in keys.items()}
            for text in dict.fromkeys(texts.values()):
                files = [file for file in texts if texts[file] == text]
                lines.append(f"{what.format(text)} of {files[0] if len(files) == 1 else f'{len(files)} files'}")
        seen: dict[str, str] = {}
        for ingredient in self.ingredients:
            same = seen.setdefault(ingredient.digest, ingredient.file)
            if same != ingredient.file:
                lines.append(f"{ingredient.file} and {same} are the same model, which counts twice")
        lines += [f"{name} is not averaged: it is the first model's" for name in self.layout.kept]
        lines += [f"{name} is dropped: the first model does not have it" for name in self.layout.dropped]
        if self.kind:
            lines.append(f"files have several kinds of numbers; the soup is {self.kind}")
        return lines


def record_beside(path: Path) -> Path:
    """Where the record of a file of torch.save lies, whose format holds none."""
    return path.with_name(f"{path.name}.soup.json")


def check_of(record: str) -> str:
    """Tells a damaged record, whose names and notes no cooking again could prove wrong."""
    return hashlib.blake2b(record.encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """What the soup's bytes could depend on."""
    return {"numpy": version("numpy")}
