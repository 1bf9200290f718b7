"""Labelled texts in a table: .tsv with tabs between fields, .csv, or .jsonl, read by a classifier of transformers."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from soups.candidates import Candidate
from soups.errors import UserError
from soups.files.tables import column, read_table
from soups.heldout import HeldOut
from soups.scorers.metrics import of_classes
from soups.scorers.networks import device, from_pretrained, read_source, settings_in, tokenizer_of
from soups.scoring import Learning, Scorer, key_of
from soups.sources import Pool

BATCH = 64  # texts of a forward pass
LEARNED_BATCH = 32  # texts of a step of a learned soup
MAX_LENGTH = 128  # tokens of a text, where nothing else is said


def of_texts(asked: HeldOut, pool: Pool) -> Scorer:
    """A metric of a text classifier's answers.

    Raises:
        UserError: no such columns, a label that is no class of the network, or a network of another kind.
    """
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415

    path, batch_size, max_length = asked.path, asked.batch_size or BATCH, asked.max_length or MAX_LENGTH
    source, config = read_source(asked, pool, "Classification")
    rows = read_table(path)
    remedy = ": see --columns, --label"
    texts = [column(path, rows, name, remedy) for name in asked.columns]
    ids = {str(i): i for i in config.id2label} | {name: i for i, name in config.id2label.items()}
    found = column(path, rows, asked.label, remedy)
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
