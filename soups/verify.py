"""Whether a soup is what its metadata says:  python -m soups.verify soup.safetensors [--folder DIR]

Finds the recorded ingredients in a folder (the soup's own, by default) by the digests of their content, cooks again
and compares every byte. Prints one line; exit status 0 if equal, 1 if not.
"""

import argparse
import filecmp
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.cli import one_line_errors
from configs.errors import UserError
from soups.files import Record, average_files, check_of
from store.checkpoints import INDEX, PICKLED, digest_file, open_checkpoint


def record_of(soup: Path) -> Record:
    """What a soup's metadata says about it.

    Raises:
        UserError: the file is missing, damaged or not a soup of ours.
    """
    with ExitStack() as stack:
        metadata = open_checkpoint(soup, stack).metadata
    try:
        if metadata["soup_check"] == check_of(metadata["soup"]):
            return TypeAdapter(Record).validate_json(metadata["soup"])
    except (KeyError, ValidationError):
        pass
    raise UserError("it carries no whole record of how it was cooked")


def _digest(path: Path) -> str | None:
    try:
        with ExitStack() as stack:
            return digest_file(open_checkpoint(path, stack))
    except UserError:
        return None  # something else that lies in the folder


def _candidates(folder: Path, soup: Path, names: list[str]) -> list[Path]:
    """Weight files of the folder, the recorded names first."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", *PICKLED)]
    files += [path for path in sorted(folder.iterdir()) if path.name == INDEX or path.is_dir()]
    return sorted((path for path in files if path.resolve() != soup.resolve()), key=lambda path: path.name not in names)


def find(record: Record, folder: Path, soup: Path) -> tuple[list[Path], list[str]]:
    """The recorded ingredients' files, and what is wrong with those that were not found."""
    wanted = {ingredient.digest for ingredient in record.ingredients}
    found: dict[str, Path] = {}
    for path in _candidates(folder, soup, [ingredient.file for ingredient in record.ingredients]):
        digest = None if wanted <= found.keys() else _digest(path)
        if digest in wanted:
            found.setdefault(digest, path)
    problems = []
    for ingredient in record.ingredients:
        if ingredient.digest not in found:
            what = "was changed" if (folder / ingredient.file).exists() else "is missing"
            problems.append(f"{ingredient.file} {what}")
    return [found[i.digest] for i in record.ingredients if i.digest in found], problems


def verify(soup: Path, folder: Path | None = None) -> str:
    """An empty string, or in one line why the soup is not what it says.

    Raises:
        UserError: the soup cannot be read, or its record asks for what cannot be cooked.
    """
    folder = folder or soup.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    record = record_of(soup)
    paths, problems = find(record, folder, soup)
    if problems:
        return f"of its ingredients in {folder}, " + ", ".join(problems)
    keeps = [i for i, ingredient in enumerate(record.ingredients) if ingredient.keeps_batch_norm]
    with tempfile.TemporaryDirectory() as temporary:
        again = Path(temporary) / "soup.safetensors"
        average_files(
            paths,
            again,
            weights=record.weights,
            dtype=record.dtype,
            keep_from=keeps[0] if keeps else None,
            note=record.note,
            names=[ingredient.file for ingredient in record.ingredients],
        )
        return "" if filecmp.cmp(soup, again, shallow=False) else "cooked again from its ingredients, it differs"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("soup", type=Path)
    parser.add_argument("--folder", type=Path, help="where the ingredients are")
    arguments = parser.parse_args()
    try:
        problem = verify(arguments.soup, arguments.folder)
    except UserError as error:
        problem = str(error)
    print(f"{arguments.soup}: {problem or 'equal to the byte when cooked again from its ingredients'}")
    sys.exit(1 if problem else 0)


if __name__ == "__main__":
    one_line_errors(main)
