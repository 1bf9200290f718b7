"""Labelled texts in a table: .tsv with tabs between fields, .csv, or .jsonl, read by a classifier of transformers."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soups.candidates import Candidate
from soups.errors import UserError
from soups.scorers.metrics import of_classes
from soups.scorers.networks import device, from_pretrained, read_source, settings_in, tokenizer_of
from soups.scoring import Learning, Scorer, key_of
from soups.sources import Pool

if TYPE_CHECKING:
    from soups.heldout import HeldOut

BATCH = 64  # texts of a forward pass
LEARNED_BATCH = 32  # texts of a step of a learned soup
MAX_LENGTH = 128  # tokens of a text, where nothing else is said


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it is missing, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8: save it as UTF-8") from None


def read_objects(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; empty lines are skipped.

    Raises:
        UserError: a line is no object, or there is none; names the line.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: a {type(value).__name__}, not an object")
            found.append(value)
    if not found:
        raise UserError(f"{path} has no example")
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table by the names of its columns, which are its first line (.tsv, .csv) or its keys (.jsonl).

    In a .tsv quotes mean nothing; in a .csv they may stand around fields.

    Raises:
        UserError: another kind of file, or a line with more or fewer fields than there are columns.
    """
    if path.suffix == ".jsonl":
        return [{key: str(value) for key, value in row.items()} for row in read_objects(path)]
    if path.suffix not in (".tsv", ".csv"):
        raise UserError(f"{path}: labelled texts are a .tsv, a .csv or a .jsonl file")
    text = read_text(path)
    if path.suffix == ".tsv":
        lines = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    else:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    columns, *rows = lines
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(row)} fields, and there are {len(columns)} columns ({', '.join(columns)})"
            )
    if not rows:
        raise UserError(f"{path} has no example")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def column(path: Path, rows: Sequence[dict[str, str]], name: str) -> list[str]:
    """One column.

    Raises:
        UserError: it is not there.
    """
    for number, row in enumerate(rows, start=1):
        if name not in row:
            raise UserError(
                f"{path} has no column {name!r} in row {number}, only {', '.join(row)}: see --columns, --label"
            )
    return [row[name] for row in rows]


def of_texts(asked: "HeldOut", pool: Pool) -> Scorer:
    """A metric of a text classifier's answers.

    Raises:
        UserError: no such columns, a label that is no class of the network, or a network of another kind.
    """
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415

    path, batch_size, max_length = asked.path, asked.batch_size or BATCH, asked.max_length or MAX_LENGTH
    source, config = read_source(asked, pool, "Classification")
    rows = read_table(path)
    texts = [column(path, rows, name) for name in asked.columns]
    ids = {str(i): i for i in config.id2label} | {name: i for i, name in config.id2label.items()}
    found = column(path, rows, asked.label)
    strange = sorted(set(found) - ids.keys())
    if strange:
        classes = ", ".join(config.id2label.values())
        raise UserError(f"{path}: the label {strange[0]!r} is no class of {source}, which has {classes}")
    known = torch.tensor([ids[name] for name in found])
    tokenizer = tokenizer_of(source)
    # Without padding token a text at a time would be needed; such tokenizers name their end instead.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def tokenized(columns: Sequence[Sequence[str]]) -> Any:
        return tokenizer(*columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt")

    starts = range(0, len(rows), batch_size)
    read = [tokenized([column[start : start + batch_size] for column in texts]) for start in starts]

    @torch.inference_mode()
    def predicted(candidate: Candidate) -> Tensor:
        network = from_pretrained(AutoModelForSequenceClassification, candidate.folder(source), candidate.name)
        network.config.pad_token_id = tokenizer.pad_token_id
        network.eval().to(device())
        return torch.cat([network(**batch.to(device())).logits.argmax(dim=1).cpu() for batch in read])

    def learning(batch_size: int | None) -> Learning:
        from soups.descent import cross_entropy, shuffled  # noqa: PLC0415

        module = AutoModelForSequenceClassification.from_config(config).to(device())
        module.config.pad_token_id = tokenizer.pad_token_id
        order = shuffled(torch.arange(len(known)), known, batch_size or LEARNED_BATCH, "texts")

        def batches(epoch: int) -> Iterator[tuple[Any, Tensor]]:
            for places, labels in order(epoch):
                columns = [[column[place] for place in places.tolist()] for column in texts]
                yield dict(tokenized(columns).to(device())), labels.to(device())

        def loss(module: Any, batch: tuple[Any, Tensor], beta: Tensor) -> tuple[Tensor, int]:
            return cross_entropy(lambda inputs: module(**inputs).logits, batch, beta)  # type: ignore[arg-type]

        return Learning(module, batches, loss)

    more = [version("transformers"), asked.metric, max_length, list(asked.columns), asked.label, path]
    return of_classes(asked.metric, predicted, known, key_of("texts", *more, *settings_in(source)), learning=learning)
