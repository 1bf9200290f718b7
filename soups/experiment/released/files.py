"""The files of the released pool: where they are, whether they are whole, and which of them are the same model."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from configs.errors import UserError
from models.released import LEFTOVERS, check_released, convert
from soups.experiment.released.fetch import Download, fetch_all
from soups.files.atomic import read_json, write_json
from soups.files.checkpoints import digest_file
from soups.files.opening import opened
from soups.files.weights import save_weights
from store.runs import sole_writer

# Source: README and main.py of github.com/mlfoundations/model-soups.
MODELS_URL = "https://github.com/mlfoundations/model-soups/releases/download/v0.0.2"
SPLIT_URL = "https://github.com/mlfoundations/model-soups/raw/main"
SPLIT = "imagenet_98_idxs.npy"  # which images of ImageNet's train set the authors held out, and did not train on
MODELS = 72  # model_0 is the initialisation
FOLDER = Path(os.environ.get("RELEASED_MODELS", "data/released"))  # as configs/experiment/released.yaml
RECORD = "files.json"  # of what was looked through: bytes and digest
TRAIN_IMAGES = 1_281_167


def check_archive(path: Path) -> None:
    """Compare every byte with the checksums in an archive of torch.save, which a mixed-up download fails."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and download it again") from None
    if bad is not None:
        raise UserError(f"{path} is damaged (checksum of {bad}): delete it and download it again")


def looked_through(path: Path) -> dict[str, Any]:
    """Bytes and digest of a file that is whole; a `UserError` where it is damaged, or not one of the released files."""
    size = path.stat().st_size
    if path.name == SPLIT:
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it and download it again") from None
        if values.shape != (TRAIN_IMAGES,) or not np.isin(values, (0, 1)).all():
            raise UserError(f"{path} is not the authors' split: need {TRAIN_IMAGES:,} values of 0 and 1")
        return {"bytes": size, "digest": ""}
    check_archive(path)
    with opened([path]) as (checkpoint,):
        check_released(checkpoint)
        return {"bytes": size, "digest": digest_file(checkpoint)}


def duplicates(record: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each set of files that are one model, and so count as often in a soup of all."""
    by_digest: dict[str, list[str]] = {}
    for name in sorted(record, key=lambda name: (len(name), name)):
        if record[name]["digest"]:
            by_digest.setdefault(record[name]["digest"], []).append(name)
    return [
        f"{' and '.join(names)} are the same model, which counts {len(names)} times in a soup of all"
        for names in by_digest.values()
        if len(names) > 1
    ]


def download(
    folder: Path,
    rows: Sequence[int],
    console: Console,
    *,
    workers: int = 4,
    models_url: str = MODELS_URL,
    split_url: str = SPLIT_URL,
) -> None:
    """Download the models of some rows, and the authors' held-out split, into a folder.

    What is there is kept, cut-off files are continued, and every file is looked through once: its length, its
    checksums, its tensors. Only what is new needs a network.

    Raises:
        UserError: the server cannot be reached, a file is damaged or not one of theirs, or the disk is full.
    """
    names = {f"model_{row}.pt": models_url for row in rows} | {SPLIT: split_url}
    wanted = [Download(f"{url}/{name}", folder / name) for name, url in names.items()]
    with sole_writer(folder):
        record: dict[str, dict[str, Any]] = read_json(folder / RECORD) if (folder / RECORD).exists() else {}

        def note(each: Download) -> None:
            record[each.path.name] = looked_through(each.path)
            write_json(folder / RECORD, record)
            console.print(f"{each.path}: {record[each.path.name]['bytes']:,} bytes, whole", highlight=False)

        for each in wanted:
            known = record.get(each.path.name)
            if each.path.exists() and known is not None and each.path.stat().st_size != known["bytes"]:
                console.print(f"{each.path} has another length than it had: downloading it again", highlight=False)
                each.path.unlink()
            elif each.path.exists() and known is None:
                note(each)
        missing = [each for each in wanted if not each.path.exists()]
        if missing:
            with console.status(f"{len(missing)} files ...") as status:
                fetch_all(
                    missing,
                    workers=workers,
                    done=note,
                    progress=lambda count: status.update(f"{len(missing)} files, {count / 1e9:.2f} GB here ..."),
                )
    for line in duplicates(record):
        console.print(line, highlight=False)
    console.print(f"{len(wanted)} files are in {folder}", highlight=False)


def convert_all(folder: Path, rows: Sequence[int], out: Path, console: Console) -> None:
    """Write out/model_<i>.safetensors: image tower and head, under the names of our network; what is there is kept."""
    for row in rows:
        target = out / f"model_{row}.safetensors"
        if target.exists():
            continue
        weights, dropped = convert(folder / f"model_{row}.pt")
        save_weights(target, weights)
        console.print(f"{target}: {len(weights)} tensors{describe_dropped(dropped)}", highlight=False, soft_wrap=True)


def describe_dropped(dropped: dict[str, int]) -> str:
    """What of a file was not taken over, in words."""
    assert dropped.keys() <= LEFTOVERS.keys()
    return f"; dropped {sum(dropped.values()):,} numbers of the text tower, which classify nothing: " + ", ".join(
        name.removeprefix("model.") for name in sorted(dropped)
    )
