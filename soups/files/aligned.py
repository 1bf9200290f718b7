"""A model of transformers whose classes and tokens are read in the order of another one's."""

import filecmp
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
from soups.files.folders import config_beside, config_of

# A layer of transformers with a row for each class.
HEAD = re.compile(r"(^|\.)(\w*classifier|score|head|classification_head)(\.out_proj)?\.(weight|bias)$")
# A tensor of transformers with a row for each token, where its shape alone does not say so.
VOCABULARY = re.compile(
    r"(^|\.)(word_embeddings?|embed_tokens|tok_embeddings|token_embedding|embeddings?|wte|shared|embed_in|embed_out|"
    r"(generator_)?lm_head|decoder|predictions|vocab_projector|lm_loss|output|final_logits_bias)(\.(weight|bias))?$"
)
READ = ("tokenizer.json", "vocab.json", "vocab.txt")  # tokenizers whose tokens are read here
NOT_READ = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
Rows = NDArray[np.int64]


def _labels(path: Path) -> list[str]:
    named = config_of(path).get("id2label") or {}
    try:
        return [str(named[key]) for key in sorted(named, key=int)]
    except (TypeError, ValueError):
        raise UserError(
            f"{config_beside(path, 'config.json')}: id2label is not the classes by their numbers, "
            'as in {"0": "cat", "1": "dog"}: mend it'
        ) from None


def tokens(path: Path) -> dict[str, int]:
    """Each token and its row, from the tokenizer beside a model; empty where there is none. UserError if damaged."""
    file = config_beside(path, *READ)
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":  # a token may be what is elsewhere the end of a line, such as U+2028
            lines = text.removesuffix("\n").split("\n")
            return {token: row for row, token in enumerate(lines)} | _added_tokens(file)
        values = json.loads(text)
        if file.name == "vocab.json":
            return dict(values) | _added_tokens(file)
        known = values["model"]["vocab"]  # a dict, or of sentencepiece a list of pairs
        found = dict(known) if isinstance(known, dict) else {piece: row for row, (piece, _) in enumerate(known)}
        return found | {each["content"]: each["id"] for each in values.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no tokenizer that is known here ({type(error).__name__}: {error})") from None


def _added_tokens(tokenizer: Path) -> dict[str, int]:
    """Tokens that a tokenizer of transformers was given later, and their rows."""
    file = tokenizer.with_name("added_tokens.json")
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _vocab_size(path: Path) -> int | None:
    """Number of tokens that the config of a model says, or that of the texts in a model of several kinds of input."""
    config = config_of(path)
    texts = config.get("text_config")
    return config.get("vocab_size", texts.get("vocab_size") if isinstance(texts, dict) else None)


def differ(path: Path, like: Path) -> bool:
    """Whether classes are in another order than in `like`, or tokens in other rows, as far as both have their names."""
    labels, others = _labels(path), _labels(like)
    if labels != others and sorted(labels) == sorted(others):
        return True
    size, new_size = _vocab_size(path), _vocab_size(like)
    if size is None or new_size is None:
        return False
    return _in_other_rows(path, like, size) if size == new_size else bool(tokens(path)) and bool(tokens(like))


def _in_other_rows(path: Path, like: Path, size: int) -> bool:
    """Whether the tokenizers beside two models with equally many rows differ in the row of a token."""
    one, other = config_beside(path, *READ), config_beside(like, *READ)
    if one is None or other is None:  # of these the bytes alone say whether they are the same
        one, other = config_beside(path, *NOT_READ), config_beside(like, *NOT_READ)
        if one is None or other is None:
            return False
        return not filecmp.cmp(one, other, shallow=False) or _added_tokens(one) != _added_tokens(other)
    if one.name == other.name == "tokenizer.json" and filecmp.cmp(one, other, shallow=False):
        return False
    ours, theirs = ({token: row for token, row in tokens(each).items() if row < size} for each in (path, like))
    return ours != theirs


def aligned(checkpoint: Checkpoint, like: Checkpoint) -> Checkpoint:
    """The checkpoint with the rows of its heads and vocabularies in the order of another model's.

    Both have the same classes, under the same names; a token that the first lacks has the row of `like`. A UserError
    says where that cannot be told by names.
    """
    rows = {**_rows_of_classes(checkpoint, like), **_rows_of_tokens(checkpoint, like)}
    if not rows:
        return checkpoint
    new = {name: _with_rows(checkpoint.entries[name], len(order)) for name, order in rows.items()}
    return replace(checkpoint, entries=checkpoint.entries | new, fill=_by_rows(checkpoint, like, rows))


def _with_rows(entry: Entry, rows: int) -> Entry:
    """The entry of a tensor with another number of rows; a bias of the shape (1, tokens) has a token a column."""
    return replace(entry, shape=(1, rows) if entry.shape[0] == 1 else (rows, *entry.shape[1:]))


def _rows_of_classes(checkpoint: Checkpoint, like: Checkpoint) -> dict[str, Rows]:
    """For each head of a checkpoint whose classes are in another order the row of each class of `like`."""
    labels, wanted = _labels(checkpoint.path), _labels(like.path)
    if labels == wanted:
        return {}
    order = np.array([labels.index(label) if label in labels else -1 for label in wanted], dtype=np.int64)
    heads = [name for name in checkpoint.entries if HEAD.search(name)]
    rows = {name: order for name in heads if checkpoint.entries[name].shape[:1] == order.shape}
    if not rows or sorted(set(labels)) != sorted(wanted):
        what = "no head with a row for each" if not rows else "other ones, or one twice"
        raise UserError(f"{checkpoint.path}: classes are not in the order of {like.path}, and it has {what}")
    return rows


def _rows_of_tokens(checkpoint: Checkpoint, like: Checkpoint) -> dict[str, Rows]:
    """For each tensor with a row for each token the row of each token of `like`; -1 where the checkpoint lacks it."""
    size, new_size = _vocab_size(checkpoint.path), _vocab_size(like.path)
    if size is None or new_size is None or (size == new_size and not _in_other_rows(checkpoint.path, like.path, size)):
        return {}
    places, wanted = tokens(checkpoint.path), tokens(like.path)
    if size == new_size and not (places and wanted):
        raise UserError(
            f"{checkpoint.path}: its tokenizer is not that of {like.path}, and rows of tokens are matched by "
            f"{', '.join(READ)}: save the tokenizers of both again with one of them"
        )
    order = np.full(new_size, -1, dtype=np.int64)
    for token, row in wanted.items() if places else ():
        if row < new_size and places.get(token, size) < size:
            order[row] = places[token]
    rows: dict[str, Rows] = {}
    for name, entry in checkpoint.entries.items():
        if places and (entry.shape[:1] == (size,) or entry.shape == (1, size)):
            new = like.entries.get(like.own(name))
            whole = bool((order >= 0).all()) and size == new_size  # nothing of `like` is read
            if new == _with_rows(entry, new_size) or (whole and (new is None or new.shape == entry.shape)):
                rows[name] = order
    # Where sizes differ, shapes say which tensors have a row for each token. Here another size may be the same number.
    unknown = [name for name in rows if size == new_size and not VOCABULARY.search(name)]
    if unknown or (size == new_size and not rows):
        what = f"{unknown[0]!r} has as many rows as there are tokens" if unknown else "no tensor has a row for each"
        raise UserError(
            f"{checkpoint.path}: tokens are not in the rows of {like.path}, and {what}: what "
            "is to be matched by token is not known. Leave that model out, or give both the same tokenizer"
        )
    return rows


def _by_rows(checkpoint: Checkpoint, like: Checkpoint, rows: Mapping[str, Rows]) -> Any:
    def fill(name: str, offset: int, view: memoryview) -> None:
        if name not in rows:
            return checkpoint.fill(name, offset, view)
        entry, done = checkpoint.entries[name], 0
        count = entry.size if entry.shape[0] == 1 else entry.shape[0]  # as in `_with_rows`
        width = entry.size // count * STORED[entry.dtype].itemsize
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
