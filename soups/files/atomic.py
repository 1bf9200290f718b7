"""Files that are either whole or absent, whenever the process dies."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soups.errors import FULL, UserError


def digest_of(value: Any) -> str:
    """32 hex digits that name a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def replacing(path: Path, *, sync: bool = True, folder: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder; renamed to `path` when the block ends well, deleted when it does not.

    With `sync` its bytes are on the disk before it gets its name, which a file that is soon deleted does not need.
    With `folder` it is a folder, which takes the place of one that is empty or not there.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [p.name for p in folder.iterdir()]
    ['a.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since matplotlib and numpy choose a format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        if sync:
            for written in [each for each in temporary.rglob("*") if each.is_file()] if folder else [temporary]:
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if _is_full(error):
            here = Path(tempfile.gettempdir()) in path.parents
            elsewhere = ", or have TMPDIR name a folder on a larger disk," if here else ""
            raise UserError(
                f"no space left on the disk for {path}: free some{elsewhere} and run the same again"
            ) from error
        raise


def _is_full(error: BaseException | None) -> bool:
    """Libraries wrap the system's error in their own (safetensors), or raise another one after it (torch)."""
    if error is None:
        return False
    full = getattr(error, "errno", None) in FULL or "No space left" in str(error)
    return full or _is_full(error.__context__)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise UserError(f"{path} is damaged ({error}): delete it and run the same again") from None


def read_json(path: Path) -> Any:
    """Read JSON; raises UserError where the file is damaged, and FileNotFoundError."""
    return _read(path, json.loads)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; raises as `read_json`."""
    rows: list[dict[str, Any]] = _read(path, lambda text: [json.loads(line) for line in text.splitlines()])
    return rows
