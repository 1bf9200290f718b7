"""The texts of a task as a model reads them."""

from functools import lru_cache

from configs.data import Task
from configs.training import Model
from models.tokens import TokenSplit
from soups.files.atomic import digest_of
from tasks.load import load_split
from tasks.texts import TextSplit, pieces_of


@lru_cache(maxsize=16)
def token_split(model: Model, task: Task, name: str) -> TokenSplit:
    """One split of texts as token ids, read once in a process.

    Raises:
        UserError: as `load_split`, `tokenizer_of` and `Tokenizer.encode`.
    """
    from models.hub import source, tokenizer_of  # noqa: PLC0415  # seconds that images need not wait for

    texts = load_split(task, name)
    assert isinstance(texts, TextSplit)
    words, pieces = tokenizer_of(model, task.answers), pieces_of(task.template)
    # The kind of model is part of the key, and where its tokenizer is from: another one may split the same text alike.
    parts = {"pieces": pieces, "before": words.before, "after": words.after, "max_length": words.max_length}
    key = digest_of(parts | {"kind": model.kind, "source": source(model) if model.kind != "minilm" else "minilm"})
    return TokenSplit(words.encode(pieces, texts.stored.columns, texts.fields), texts.labels, words.pad, key)
