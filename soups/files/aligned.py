"""A model of transformers whose classes and tokens are read in the order of another one's."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soups.errors import UserError
from soups.files.checkpoints import Checkpoint, Entry
from soups.files.dtypes import STORED
from soups.files.folders import config_beside

# A layer of transformers with a row for each class.
HEAD = re.compile(r"(^|\.)(\w*classifier|score|head|classification_head)(\.out_proj)?\.(weight|bias)$")
Rows = NDArray[np.int64]


def _config(path: Path) -> dict[str, Any]:
    file = config_beside(path, "config.json")
    try:
        return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _labels(path: Path) -> list[str]:
    named = _config(path).get("id2label") or {}
    return [str(named[key]) for key in sorted(named, key=int)]


def tokens(path: Path) -> dict[str, int]:
    """Each token and its row, from the tokenizer beside a model; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    file = config_beside(path, "tokenizer.json", "vocab.json", "vocab.txt")
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            return {token: row for row, token in enumerate(text.splitlines())}
        values = json.loads(text)
        if file.name == "vocab.json":
            added = file.with_name("added_tokens.json")
            return dict(values) | (json.loads(added.read_text(encoding="utf-8")) if added.exists() else {})
        known = values["model"]["vocab"]  # a dict, or of sentencepiece a list of pairs
        found = dict(known) if isinstance(known, dict) else {piece: row for row, (piece, _) in enumerate(known)}
        return found | {each["content"]: each["id"] for each in values.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no tokenizer that is known here ({type(error).__name__}: {error})") from None


def differ(path: Path, like: Path) -> bool:
    """Whether classes are in another order, or there are more or fewer tokens, of which both have the names."""
    labels, others = _labels(path), _labels(like)
    if labels != others and sorted(labels) == sorted(others):
        return True
    sizes = {_config(each).get("vocab_size") for each in (path, like)}
    return None not in sizes and len(sizes) == 2 and bool(tokens(path)) and bool(tokens(like))


def aligned(checkpoint: Checkpoint, like: Checkpoint) -> Checkpoint:
    """The checkpoint with the rows of its heads and vocabularies in the order of another model's.

    Args:
        checkpoint: with the same classes, under the same names; a token that it lacks has the row of `like`.
        like: the model whose order it is.

    Raises:
        UserError: classes without a head that is known by its name, or with one name twice.
    """
    rows: dict[str, Rows] = {}
    labels, wanted = _labels(checkpoint.path), _labels(like.path)
    if labels != wanted:
        order = np.array([labels.index(label) if label in labels else -1 for label in wanted], dtype=np.int64)
        heads = [name for name in checkpoint.entries if HEAD.search(name)]
        rows = {name: order for name in heads if checkpoint.entries[name].shape[:1] == order.shape}
        if not rows or sorted(set(labels)) != sorted(wanted):
            what = "no head with a row for each" if not rows else "other ones, or one twice"
            raise UserError(f"{checkpoint.path}: classes are not in the order of {like.path}, and it has {what}")
    size, new_size = _config(checkpoint.path).get("vocab_size"), _config(like.path).get("vocab_size")
    entries = dict(checkpoint.entries)
    if size is not None and new_size is not None and size != new_size and (places := tokens(checkpoint.path)):
        order = np.full(new_size, -1, dtype=np.int64)
        for token, row in tokens(like.path).items():
            if row < new_size and places.get(token, size) < size:
                order[row] = places[token]
        for name, entry in checkpoint.entries.items():
            new = like.entries.get(like.own(name))
            if entry.shape[:1] == (size,) and new == Entry(entry.dtype, (new_size, *entry.shape[1:])):
                rows[name], entries[name] = order, new
    return replace(checkpoint, entries=entries, fill=_by_rows(checkpoint, like, rows)) if rows else checkpoint


def _by_rows(checkpoint: Checkpoint, like: Checkpoint, rows: Mapping[str, Rows]) -> Any:
    def fill(name: str, offset: int, view: memoryview) -> None:
        if name not in rows:
            return checkpoint.fill(name, offset, view)
        entry, done = checkpoint.entries[name], 0
        width = int(np.prod(entry.shape[1:], dtype=np.int64)) * STORED[entry.dtype].itemsize
        while done < len(view):
            row, inside = divmod(offset + done, width)
            part = view[done : done + width - inside]
            place = int(rows[name][row])
            if place < 0:
                like.fill(like.own(name), row * width + inside, part)
            else:
                checkpoint.fill(name, place * width + inside, part)
            done += len(part)
        return None

    return fill
