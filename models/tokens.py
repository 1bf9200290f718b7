"""From texts to token ids, and batches of them that are padded no more than they must be."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from configs.errors import UserError

Pieces = Sequence[tuple[str, str | None]]  # words of a template, each with the column that follows, or None


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, and the ids that a network wants around every text."""

    tokenizer: Any  # of transformers
    max_length: int  # tokens, with those around the text
    before: tuple[int, ...]  # ids
    after: tuple[int, ...]

    @property
    def pad(self) -> int:
        """The id that fills the shorter texts of a batch, and that no text has."""
        return self.tokenizer.pad_token_id

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by itself; special tokens written in a text are read as words."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode(self, pieces: Pieces, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[Tensor, ...]:
        """(L_i,) int64 ids of each row under a template, at most `max_length`.

        Where a row is too long, the longest of its fields loses tokens at its end, again and again: words of the
        template and shorter fields stay whole. A column that the template names twice counts twice.

        Raises:
            UserError: the tokens around the fields leave no room for them in `max_length`.
        """
        words = self.plain([text for text, _ in pieces])
        fields = {column: self.plain([row[columns.index(column)] for row in rows]) for _, column in pieces if column}
        room = self.max_length - len(self.before) - len(self.after) - sum(map(len, words))
        times = Counter(column for _, column in pieces if column)  # how often the template names a column
        if room < times.total():
            raise UserError(f"model.max_length={self.max_length} leaves no room beside the template and the options")
        encoded = []
        for i in range(len(rows)):
            lengths = {column: len(ids[i]) for column, ids in fields.items()}
            while sum(times[column] * length for column, length in lengths.items()) > room:
                longest = max(lengths, key=lambda column: lengths[column])
                lengths[longest] -= 1
            parts: list[Sequence[int]] = [self.before]
            for ids, (_, column) in zip(words, pieces, strict=True):
                parts += [ids, fields[column][i][: lengths[column]] if column else ()]
            encoded.append(torch.tensor([*chain.from_iterable(parts), *self.after]))
        return tuple(encoded)


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """A split of texts as a network reads them."""

    ids: tuple[Tensor, ...]  # (N) of (L_i,) int64
    labels: Tensor  # (N,) int64 class ids
    pad: int
    key: str  # names everything that the ids depend on beside the texts

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) how many tokens each text has."""
        return torch.tensor([len(ids) for ids in self.ids])

    def batch(self, rows: Tensor) -> Tensor:
        """(b, L) int64 ids of some texts, padded to the longest of them."""
        return pad_sequence([self.ids[row] for row in rows.tolist()], batch_first=True, padding_value=self.pad)


def longest_first(lengths: Tensor) -> Tensor:
    """(N,) an order of texts from the longest, which needs the most memory, to the shortest."""
    return lengths.argsort(descending=True, stable=True)


def alike_in_length(order: Tensor, lengths: Tensor, batch: int, window: int, generator: torch.Generator) -> Tensor:
    """(n,) an order of rows with texts of similar length in each batch, and random in all other respects.

    The texts of every `window` batches of a random order are sorted by their (N,) lengths and cut into batches anew,
    which then come in random order. Texts at the end that fill no whole batch stay there.
    """
    whole, found = len(order) // batch * batch, []
    for part in order[:whole].split(window * batch):
        batches = part[longest_first(lengths[part])].split(batch)
        found += [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return torch.cat([*found, order[whole:]])
