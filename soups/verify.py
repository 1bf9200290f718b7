"""Whether a soup is what its metadata says:  python -m soups.verify soup.safetensors [--folder DIR]

Finds the recorded ingredients in a folder (the soup's own, by default) by the digests of their content, makes the soup
again and compares every byte. Prints one line; exit status 0 if equal, 1 if not.
"""

import filecmp
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from soups.errors import UserError
from soups.files.adapters import CONFIG
from soups.files.atomic import read_json
from soups.files.checkpoints import PICKLED, Checkpoint, Entry, digest_file, tensor_digests
from soups.files.folders import ADAPTER, HUB, INDEX, from_hub, is_adapter
from soups.files.opening import opened
from soups.files.reading import COUNTERS, Reading
from soups.mean import STATISTICS, Mean, average_files
from soups.merging import Merging, undivided
from soups.record import FileSoup, Record, metadata_beside, record_in

if TYPE_CHECKING:
    from soups.lora import LoraSoup

MERGED = ("arithmetic", "ties", "dare")  # recipes on task vectors


def record_of(soup: Path) -> Record:
    """What a soup's metadata says about it.

    Raises:
        UserError: the file is missing, damaged or not a soup of ours.
    """
    metadata = metadata_beside(soup) if soup.suffix in PICKLED else None
    if metadata is None:
        with opened([soup / ADAPTER if is_adapter(soup) else soup]) as (checkpoint,):
            metadata = checkpoint.metadata
    return record_in(metadata)


def _digest(path: Path, record: Record) -> str | None:
    try:
        if "lora" in record.note:
            from soups.lora import digest_of_folder  # noqa: PLC0415  # torch takes seconds

            return digest_of_folder(path)
        with opened([path], record.reading) as (checkpoint,):
            return digest_file(checkpoint)
    except UserError:
        return None  # something else that lies in the folder


def _candidates(folder: Path, soup: Path, names: list[str]) -> list[Path]:
    """Weight files of the folder, the recorded names first."""
    files = [path for name in names for path in _called(folder, name)]
    files += [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", *PICKLED)]
    files += [path for path in sorted(folder.iterdir()) if path.name == INDEX or path.is_dir()]
    return [path for path in dict.fromkeys(files) if path.resolve() != soup.resolve()]


def _called(folder: Path, name: str) -> list[Path]:
    """What lies in the folder under a recorded name, of which it may be a folder itself."""
    parts = Path(name).parts
    return [path for i in range(len(parts)) if (path := folder.joinpath(*parts[i:])).exists()]


def find(record: Record, folder: Path, soup: Path) -> tuple[list[Path], list[str]]:
    """The recorded ingredients' files, in the folder or of the hub, and what is wrong with those that were not found.

    Args:
        record: as `located` in this folder.
        folder: in which they are.
        soup: which is not looked at.

    Raises:
        UserError: a model of the hub is in no folder and cannot be had.
    """
    wanted = {ingredient.digest for ingredient in record.ingredients}
    found: dict[str, Path] = {}
    for path in _candidates(folder, soup, [ingredient.file for ingredient in record.ingredients]):
        digest = None if wanted <= found.keys() else _digest(path, record)
        if digest in wanted:
            found.setdefault(digest, path)
    problems, reading = [], record.reading or Reading()
    for model, what in ((reading.base, "into which its adapters are merged"), (reading.like, "whose classes it has")):
        if model is not None and not model.startswith(HUB) and not reading.place(model).exists():
            return [], [f"the model {what}, {model}, is missing"]
    for ingredient in record.ingredients:
        is_hub = ingredient.file.startswith(HUB)
        if is_hub and ingredient.digest not in found:
            path = from_hub(ingredient.file)
            found |= {ingredient.digest: path} if _digest(path, record) == ingredient.digest else {}
        if ingredient.digest not in found:
            what = "was changed" if is_hub or _called(folder, ingredient.file) else "is missing"
            problems.append(f"{ingredient.file} {what}")
    return [found[i.digest] for i in record.ingredients if i.digest in found], problems


def located(record: Record, folder: Path) -> Record:
    """The record, whose models of classes and of adapters are looked for from this folder on."""
    reading = record.reading
    if reading is None or (reading.base is None and reading.like is None):
        return record
    return replace(record, reading=replace(reading, near=str(folder.resolve())))


def verify(soup: Path, folder: Path | None = None) -> str:
    """An empty string, or in one line why the soup is not what it says.

    Raises:
        UserError: the soup cannot be read, or its record asks for what cannot be made.
    """
    soup = soup.parent if soup.name == ADAPTER else soup
    folder = folder or soup.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    record = located(record_of(soup), folder)
    paths, problems = find(record, folder, soup)
    if problems:
        elsewhere = "; --folder DIR says where they are" if any(each.endswith("missing") for each in problems) else ""
        return f"of its ingredients in {folder}, {', '.join(problems)}{elsewhere}"
    with tempfile.TemporaryDirectory() as temporary:
        is_lora = "lora" in record.note
        again = Path(temporary) / ("soup" if is_lora else "soup.safetensors")
        make_again(record, paths, again)
        if is_lora:
            same = _same(soup / ADAPTER, again / ADAPTER) and read_json(soup / CONFIG) == read_json(again / CONFIG)
        else:
            same = _same(soup, again, renewed=record.note.get("batch_norm") == "recompute")
    if same:
        return ""
    cut = "; factors cut to a rank are equal only on the machine and with the torch that made them"
    is_cut = is_lora and record.note["lora"]["rank"] is not None
    return f"made again from its ingredients, it differs{cut if is_cut else ''}"


def answer(soup: Path, folder: Path | None = None) -> tuple[bool, str]:
    """Whether a soup is what it says, and a line that tells what is known."""
    try:
        problem = verify(soup, folder)
        note = {} if problem else record_of(soup).note
    except UserError as error:
        problem = str(error)
    if problem:
        return False, f"{soup}: {problem}"
    equal = f"{soup}: equal to the byte when made again from its ingredients"
    if note.get("batch_norm") == "recompute":
        equal += ", but for its batch-norm statistics: they were measured on images, and nothing here proves them"
    return True, equal


def make_again(record: Record, paths: Sequence[Path], out: Path) -> "FileSoup | LoraSoup":
    """Write the soup that a record describes: a .safetensors file, or of adapters a folder."""
    names, weights = [ingredient.file for ingredient in record.ingredients], record.weights
    first, note = record.first or 0, record.note
    merging: Callable[[Mean, Sequence[int]], Mean] | None = None
    if "lora" in note:
        from soups.lora import soup_folders  # noqa: PLC0415  # torch takes seconds

        assert not isinstance(weights, dict)  # of an adapter there is one weight
        return soup_folders(paths, out, weights=weights, rank=note["lora"]["rank"], note=note, names=names)
    if note.get("recipe") in MERGED and "scales" in note and not isinstance(weights, dict):
        merging = Merging.of(note)
        order = sorted(range(len(names)), key=lambda i: names[i] != note["init"])  # the initialisation is first
        paths, names, weights = [paths[i] for i in order], [names[i] for i in order], [weights[i] for i in order]
        first = order.index(first)
    elif note.get("normalize") is False:
        merging = undivided
    keeps = [names.index(ingredient.file) for ingredient in record.ingredients if ingredient.keeps_batch_norm]
    return average_files(
        paths,
        out,
        weights=weights,
        dtype=record.dtype,
        keep_from=keeps[0] if keeps else None,
        note=record.note,
        names=names,
        reading=record.reading if record.format > 1 else Reading(as_stored=True),
        first=first,
        merging=merging,
        format=record.format,
    )


def _same(soup: Path, again: Path, *, renewed: bool = False) -> bool:
    """Whether two soups are equal to the byte; those of several files or of torch.save by their tensors and record.

    Args:
        soup: a file or a folder.
        again: a .safetensors file.
        renewed: the first one has batch-norm statistics measured on data, which are left out.
    """
    pickled = soup.suffix in PICKLED
    if soup.is_file() and not pickled and not renewed and soup.name != ADAPTER:
        return filecmp.cmp(soup, again, shallow=False)
    with opened([soup, again], Reading(as_stored=not pickled)) as (one, other):
        metadata = (metadata_beside(soup) if pickled else None) or one.metadata
        same = metadata["soup"] == other.metadata["soup"] and set(one.names) == set(other.names)
        return same and _content(one, renewed=renewed) == _content(other, renewed=renewed)


def _content(checkpoint: Checkpoint, *, renewed: bool) -> dict[str, tuple[Entry, str]]:
    """What is compared of every name."""
    left_out = (*STATISTICS, *COUNTERS) if renewed else ()
    own = {name: checkpoint.own(name) for name in checkpoint.names if not name.endswith(left_out)}
    digests = tensor_digests(checkpoint, set(own.values()))
    return {name: (checkpoint.entries[kept], digests[kept]) for name, kept in own.items()}


if __name__ == "__main__":
    from soups.cli import main

    main(["verify", *sys.argv[1:]])
