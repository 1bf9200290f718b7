"""A soup of a user's files, written as a folder that a library loads, loaded back and compared."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from soups.errors import UserError
from soups.export.network import Network, compare
from soups.files.atomic import replacing
from soups.files.folders import config_beside, config_of
from soups.files.weights import LazyWeights
from soups.folder import Card, copy_companions
from soups.verify import record_of

LIBRARIES = ("timm", "open_clip", "transformers", "onnx")


def library_of(soup: Path, network: str | None) -> tuple[str, str]:
    """Library and name of a soup's network: what was typed, or what a config beside the soup says."""
    if network is not None:
        library, _, name = network.partition(":")
        if library not in LIBRARIES[:3] or not name:
            raise UserError(f"--network {network}: type timm:NAME, open_clip:NAME or transformers:FOLDER")
        return library, name
    beside = config_beside(soup, "open_clip_config.json", "config.json")
    if beside is not None and beside.name == "open_clip_config.json":
        return "open_clip", str(beside.parent)
    config = config_of(soup)
    if "architecture" in config:
        return "timm", config["architecture"]
    if beside is not None and "model_type" in config:
        return "transformers", str(beside.parent)
    raise UserError(f"{soup} does not say of which network it is: type --network timm:NAME, for example")


def build(soup: Path, network: str | None, classes: Sequence[str]) -> tuple[str, Network]:
    """The library, and its network with the soup's weights."""
    library, name = library_of(soup, network)
    weights = dict(LazyWeights(soup))
    made: Any = _module(library)
    if library == "open_clip":
        if classes:
            raise UserError("--classes: a dual encoder of open_clip has no head, and so no names of classes")
        return library, made.build(name, weights)
    return library, made.build(name, weights, classes)


def _module(library: str) -> Any:
    """The module of a library, which is imported only where it is needed."""
    return import_module(f"soups.export.{library}")


def export_soup(
    soup: Path,
    library: str,
    out: Path,
    *,
    network: str | None = None,
    classes: Sequence[str] = (),
    licence: str = "other",
) -> str:
    """Write the folder and return what was written and compared, in a line.

    Args:
        soup: a file or folder that a recipe wrote, or any weights.
        library: that is to load it: timm, open_clip, transformers or onnx.
        out: a folder that is not there yet.
        network: `timm:NAME`, `open_clip:NAME` or `transformers:FOLDER`; None where a config beside the soup says it.
        classes: their names, in the order of the head; empty where the config has them or they have none.
        licence: of the weights, as the hub names licences.

    Raises:
        UserError: the soup or the network cannot be read, or they do not fit together; a library that has no such
            network, or is not installed; a folder that is there; or outputs that differ by more than 1e-4 from the
            soup's.
    """
    if library not in LIBRARIES:
        raise UserError(f"--to {library}: known are {', '.join(LIBRARIES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: name another folder, or delete it")
    made: Any = _module(library)
    if library == "onnx":
        made.need_packages()
    own, built = build(soup, network, classes)
    if library not in (own, "onnx"):
        raise UserError(f"--to {library}: this soup is of a network of {own}; it can go to {own} or onnx")
    with replacing(out, folder=True) as folder:
        if library == "onnx":
            built = made.graph_of(built)
            if built.folder is not None:
                copy_companions(built.folder, folder)
            made.write(built, folder, made.facts_of(built))
        else:
            made.write(built, folder)
        gap = compare(built, made.read(folder, built), library)
        _card(soup, library, built, made, licence).write(folder)
    return f"{out}: loaded by {library}, outputs within {gap:.1e} of the soup's on 7 random inputs"


def _card(soup: Path, library: str, network: Network, made: Any, licence: str) -> Card:
    use = made.USE if library != "onnx" or network.images is not None else made.USE_TEXT
    try:
        record = record_of(soup)
    except UserError:  # another tool wrote these weights
        record = None
    parts = record.ingredients if record else ()
    rows = [f"| {part.file} | {'by tensor' if part.weight is None else f'{part.weight:.4g}'} |" for part in parts]
    table = ["| ingredient | share |", "|---|---|", *rows] if rows else ["The file does not record them."]
    return Card(
        title=soup.stem,
        library=library,
        recipe=record.note.get("recipe", "average") if record else "not recorded",
        about=f"Network: {network.name}" + (f"; {len(network.class_names)} classes." if network.class_names else "."),
        use=use.replace("ARCHITECTURE", network.name),
        sections={"Ingredients": table},
        licence=licence,
    )
