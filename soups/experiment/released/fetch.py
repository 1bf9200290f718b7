"""Files from a web server: whole or absent, continued where a stop left them, several at a time.

The released models are on GitHub. What huggingface_hub documents downloads from its own hub alone; its general
`http_get` is internal, and neither ends early when another file fails nor keeps what came for a later call.
"""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from configs.errors import UserError

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


def _continued(answer: HTTPResponse, have: int) -> bool:
    """Whether the answer goes on after `have` bytes, and is not the file from its beginning."""
    return answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-")


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
        kept = have if _continued(answer, have) else 0
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
