"""The files of the released pool: where they are, whether they are whole, and which of them are the same model.

They come from a web server, GitHub: whole or absent, continued where a stop left them, several at a time. What
huggingface_hub documents downloads from its own hub alone; its general `http_get` is internal, and neither ends early
when another file fails nor keeps what came for a later call.
"""

import errno
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from rich.console import Console

from configs.errors import UserError
from models.released import check_released, convert
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
CHUNK = 1 << 18  # bytes
PATIENCE = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row that bring nothing new
THE_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EISDIR)  # errors that no retry mends


class _StoppedError(Exception):
    """Another download failed, or Ctrl-C was pressed; what came so far stays."""


@dataclass(frozen=True)
class Download:
    """A file that is wanted."""

    url: str
    path: Path

    @property
    def part(self) -> Path:
        """Where its bytes are until all of them are there."""
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def bytes_here(self) -> int:
        """How much of it is on the disk."""
        return next((path.stat().st_size for path in (self.path, self.part) if path.exists()), 0)


def _total(answer: HTTPResponse, have: int) -> int | None:
    """Bytes of the whole file as the server states them, or None."""
    after = (answer.headers.get("Content-Range") or "").rpartition("/")[2] if answer.status == 206 else ""
    length = answer.headers.get("Content-Length") or ""  # of the body, also where a range leaves the total open ("/*")
    if after.isdigit():
        return int(after)
    return have + int(length) if length.isdigit() else None


def _once(wanted: Download, stop: threading.Event) -> int | None:
    """Ask for what is missing and append it; returns how long the whole file should be."""
    have = wanted.part.stat().st_size if wanted.part.exists() else 0
    request = Request(wanted.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urlopen(request, timeout=PATIENCE)
    except HTTPError as error:
        stated = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if error.code == 416 and stated == str(have):
            return have  # nothing is missing
        if error.code == 416:
            wanted.part.unlink(missing_ok=True)  # it is too long
        raise
    with answer:
        stated = answer.headers.get("Content-Range") or ""
        kept = have if answer.status == 206 and stated.startswith(f"bytes {have}-") else 0  # else from its beginning
        total = _total(answer, kept)
        with wanted.part.open("r+b" if kept else "wb") as file:
            file.seek(kept)
            while block := answer.read(CHUNK):
                file.write(block)
                if stop.is_set():
                    raise _StoppedError
            file.flush()
            os.fsync(file.fileno())
    return total


def fetch(wanted: Download, stop: threading.Event) -> None:
    """Download a file, from where an earlier call stopped if the server can; it gets its name when it is whole.

    What came before `stop` was set is continued by the next call.

    Raises:
        UserError: the server cannot be reached, has no such file, or ends too early again and again; or a full disk.
    """
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    fruitless, longest, trouble = 0, -1, ""
    while fruitless < ATTEMPTS:
        try:
            total = _once(wanted, stop)
            size = wanted.part.stat().st_size
            if total is None or size == total:
                wanted.part.replace(wanted.path)
                return
            trouble = f"{size:,} bytes came of {total:,}"
            if size > total:
                wanted.part.unlink()
        except HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise UserError(f"{wanted.url}: the server answers {error.code} {error.reason}") from None
            trouble = f"the server answers {error.code} {error.reason}"
        except (OSError, HTTPException) as error:  # a URLError is an OSError too
            if getattr(error, "errno", None) in THE_DISKS:
                raise UserError(f"{wanted.part}: {error}; mend that and run the same again") from None
            trouble = str(getattr(error, "reason", "") or error or type(error).__name__)
        now = wanted.part.stat().st_size if wanted.part.exists() else 0
        fruitless, longest = (0, now) if now > longest >= 0 else (fruitless + 1, max(longest, now))
        if now == 0 and fruitless >= 2:
            break  # nothing ever came: most likely there is no internet
        if stop.wait(min(2.0**fruitless, 30.0) / 4):
            raise _StoppedError
    raise UserError(f"{wanted.url} cannot be downloaded ({trouble}): run the same again where there is internet")


def fetch_all(
    wanted: Sequence[Download],
    *,
    workers: int,
    done: Callable[[Download], None],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Download several files at a time.

    `done` is called with each that is there, `progress` about twice a second with the bytes that are there, both in
    this thread. The first `UserError`, of `fetch` or `done`, stops the others, whose parts stay.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(fetch, each, stop): each for each in wanted}
        try:
            while running:
                ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                progress(sum(each.bytes_here for each in wanted))
                for future in ended:
                    each = running.pop(future)
                    future.result()
                    done(each)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


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
        names = ", ".join(name.removeprefix("model.") for name in sorted(dropped))
        without = f"dropped {sum(dropped.values()):,} numbers of the text tower, which classify nothing: {names}"
        console.print(f"{target}: {len(weights)} tensors; {without}", highlight=False, soft_wrap=True)
