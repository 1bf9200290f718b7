"""What a soup was made from, as its metadata records it, and as yaml beside it."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from soups.errors import UserError
from soups.files.atomic import read_json, write_text
from soups.files.dtypes import OutputDtype
from soups.files.reading import Reading

FORMAT: Literal[2] = 2  # of `Record`


@dataclass(frozen=True)
class Ingredient:
    """A file's part in a soup, as the soup's metadata records it."""

    file: str  # the shortest end of its path that tells it from the others
    digest: str  # of its content: soups.files.checkpoints.content_digest
    weight: float | None  # its share, the sum over ingredients is 1; None where every tensor has weights of its own
    keeps_batch_norm: bool = False  # the batch-norm statistics are this file's


@dataclass(frozen=True)
class Record:
    """All that is needed to make a soup again; JSON, under "soup" in its metadata.

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
        if self.reading is not None:
            del values["reading"]["near"]  # where the models lie now
            for name in ("set_aside", "base", "like"):  # records have them where they say something
                if not values["reading"][name]:
                    del values["reading"][name]
        if self.format == 1:
            del values["reading"], values["first"]
        text = json.dumps(values, sort_keys=True)
        return {"format": "pt", "soup": text, "soup_check": _check_of(text)}


def record_in(metadata: Mapping[str, str]) -> Record:
    """The record in a soup's metadata; raises UserError where it has none, or one that was changed."""
    with suppress(KeyError, TypeError, ValueError):
        values = json.loads(metadata["soup"])
        if metadata["soup_check"] == _check_of(metadata["soup"]) and values["format"] in (1, 2):
            values["ingredients"] = tuple(Ingredient(**each) for each in values["ingredients"])
            if values.get("reading") is not None:
                reading = Reading(**values["reading"])
                values["reading"] = replace(reading, set_aside=tuple(reading.set_aside))
            return Record(**values)
    raise UserError("it carries no whole record of how it was made")


def _check_of(record: str) -> str:
    """Tells a damaged record, whose names and notes no making it again could prove wrong."""
    return hashlib.blake2b(record.encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """What the soup's bytes could depend on."""
    return {"numpy": version("numpy")}


def _beside(soup: Path) -> Path:
    """Where the record of a soup lies as yaml: in its folder, or beside its file."""
    return soup / "recipe.yaml" if soup.is_dir() else soup.with_name(f"{soup.name}.recipe.yaml")


def write_recipe(soup: Path, metadata: Mapping[str, str]) -> None:
    """Put the record that a soup's metadata holds beside it, which `soups make` reads."""
    values = {"check": metadata["soup_check"], **json.loads(metadata["soup"])}
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
    write_text(_beside(soup), f"# A soup's recipe, which `soups make` reads: not to be changed by hand.\n{text}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings by name; raises UserError where there is no such file, or it is no yaml with names."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no yaml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} is no recipe: write a setting a line, as in `recipe: uniform`")
    return values


def metadata_beside(soup: Path) -> dict[str, str] | None:
    """What a soup's metadata says, from the yaml beside it, or the json as which it lay there before; or None."""
    if _beside(soup).exists():
        return metadata_of(read_yaml(_beside(soup)))
    before = soup.with_name(f"{soup.name}.soup.json")
    return dict(read_json(before)) if before.exists() else None


def metadata_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What the metadata of the soup says that this recipe lay beside."""
    values = {name: value for name, value in recipe.items() if name != "check"}
    return {"soup": json.dumps(values, sort_keys=True), "soup_check": recipe.get("check", "")}
