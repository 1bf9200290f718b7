"""Language models that answer a prompt, without a parameter more than they were pretrained with (Appendix J.5).

A text comes with its options, "... | options: A) positive B) negative | label:", and the answer is one of them, "A)
positive". BERT fills masks at the end, T5 writes the answer. The logits are the options' log-probabilities.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers  # by its name alone: it loads a class when it is asked for, which takes seconds
from torch import Tensor, nn

from configs.errors import UserError
from models.tokens import Tokenizer


def question(answers: Sequence[str]) -> str:
    """The end of every prompt: the answers, which come by class id, in the order of their letters.

    >>> question(["B) no", "A) yes"])
    ' | options: A) yes B) no | label:'
    """
    return f" | options: {' '.join(sorted(answers))} | label:"


class Prompted(nn.Module):
    """A language model and the answers that it chooses from.

    Its state dict has a tied tensor once, under the name that the network defines first: so it is averaged once, and
    what is loaded stays tied.
    """

    options: Tensor
    subtracted: tuple[float, ...] = ()  # a mean of pixels, which texts have not

    def __init__(self, network: "transformers.PreTrainedModel", options: Tensor, pad: int):
        super().__init__()
        self.network: Any = network
        self.pad = pad
        self.register_buffer("options", options, persistent=False)  # (C, M) ids of the answers, padded
        self.register_state_dict_post_hook(_without_ties)
        self.register_load_state_dict_pre_hook(_with_ties)

    @property
    def num_classes(self) -> int:
        """How many logits a text has: C."""
        return len(self.options)

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self.options.device

    def channels_last(self, on: bool) -> "Prompted":
        """Nothing changes: there are no images."""
        return self


class MaskedPrompt(Prompted):
    """BERT: texts end with M masks and [SEP]; an answer shorter than M tokens is followed by [SEP]."""

    def forward(self, ids: Tensor) -> Tensor:
        """(b, L) token ids to (b, C) log-probabilities of the answers, over the vocabulary at each mask."""
        ids = ids.to(self.device)
        attended = ids != self.pad
        hidden = self.network.bert(input_ids=ids, attention_mask=attended.long()).last_hidden_state  # (b, L, H)
        places = torch.arange(self.options.shape[1], device=ids.device)  # (M,)
        masks = attended.sum(dim=1, keepdim=True) - 1 - len(places) + places  # (b, M)
        at_masks = hidden.gather(1, masks.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
        predicted = self.network.cls(at_masks).float().log_softmax(dim=2)  # (b, M, V)
        return predicted[:, places, self.options].sum(dim=2)


class Seq2SeqPrompt(Prompted):
    """T5: the encoder reads the text once, the decoder is asked for every answer."""

    def forward(self, ids: Tensor) -> Tensor:
        """(b, L) token ids to (b, C) log-probabilities of the answers and their end, over the vocabulary."""
        ids = ids.to(self.device)
        attended, choices = (ids != self.pad).long(), self.num_classes
        hidden = self.network.get_encoder()(input_ids=ids, attention_mask=attended).last_hidden_state  # (b, L, H)
        labels = self.options.repeat(len(ids), 1)  # (b C, M)
        output = self.network(
            encoder_outputs=transformers.modeling_outputs.BaseModelOutput(hidden.repeat_interleave(choices, dim=0)),
            attention_mask=attended.repeat_interleave(choices, dim=0),
            decoder_input_ids=self.network.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        )
        predicted = output.logits.float().log_softmax(dim=2).gather(2, labels.unsqueeze(2)).squeeze(2)  # (b C, M)
        return predicted.masked_fill(labels == self.pad, 0.0).sum(dim=1).view(len(ids), choices)


def _ties(model: nn.Module) -> dict[str, str]:
    """Every further name of a parameter that has several -> the one under which it was defined."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if name != first[id(parameter)]}


def _without_ties(model: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in _ties(model):
        state.pop(prefix + name, None)


def _with_ties(model: nn.Module, state: dict[str, Any], prefix: str, *others: object) -> None:
    for name, kept in _ties(model).items():
        if prefix + kept in state:
            state.setdefault(prefix + name, state[prefix + kept])


def masked_tokenizer(tokenizer: Any, answers: Sequence[str], max_length: int) -> tuple[Tokenizer, Tensor]:
    """A tokenizer that puts BERT's prompt around a text, and (C, M) ids of the answers at the masks."""
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id)
    if None in special:
        raise UserError("model.kind=masked_lm needs a tokenizer with [CLS], [SEP], [MASK] and [PAD], as BERT's")
    cls, end, mask, _ = special
    plain = Tokenizer(tokenizer, max_length, (), ())
    wanted = plain.plain(answers)
    longest = max(map(len, wanted))
    after = (*plain.plain([question(answers)])[0], *longest * (mask,), end)
    wanted = [ids + (longest - len(ids)) * [end] for ids in wanted]
    return Tokenizer(tokenizer, max_length, (cls,), after), torch.tensor(wanted)


def seq2seq_tokenizer(tokenizer: Any, answers: Sequence[str], max_length: int) -> tuple[Tokenizer, Tensor]:
    """A tokenizer that puts T5's prompt around a text, and (C, M) ids of the answers that it writes, with their end."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None or pad is None:
        raise UserError("model.kind=seq2seq_lm needs a tokenizer with an end of sequence and a padding token, as T5's")
    plain = Tokenizer(tokenizer, max_length, (), ())
    wanted = [[*ids, end] for ids in plain.plain(answers)]
    longest = max(map(len, wanted))
    after = (*plain.plain([question(answers)])[0], end)
    return Tokenizer(tokenizer, max_length, (), after), torch.tensor([x + (longest - len(x)) * [pad] for x in wanted])
