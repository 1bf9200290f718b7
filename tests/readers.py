"""Small language models with random weights and tokenizers of a few words, in folders as a download would have them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from configs.schema import Model

WORDS = (
    "a b c d ) : | . , options label sentence premise hypothesis positive negative no yes not the film is was good bad"
)
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
OF_T5 = {"pad_token": "[PAD]", "eos_token": "</s>", "unk_token": "[UNK]"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tokenizer(special):
    """One token a word, lower case; with the special ones of BERT or T5."""
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def bert_folder(folder, seed=0, kind=BertForMaskedLM, **changes):
    """A BertForMaskedLM."""
    words = tokenizer(SPECIAL)
    torch.manual_seed(seed)
    kind(BertConfig(vocab_size=len(words), **(SIZES | changes))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def encoder_folder(folder, **changes):
    """A BertModel."""
    return bert_folder(folder, kind=BertModel, **changes)


def t5_folder(folder, seed=0, **changes):
    """A T5ForConditionalGeneration."""
    words = tokenizer(OF_T5)
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **(sizes | changes))
    T5ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


FOLDERS = {"masked_lm": bert_folder, "seq2seq_lm": t5_folder}


def prompted_model(kind, folder, **changes):
    """Settings of a language model in a folder."""
    values = {"image_size": 1, "normalize": False, "head": "prompt", "probe_c": (1.0,), "max_length": 40} | changes
    return Model(kind=kind, name="small", weights=folder, **values)


GOOD, BAD = ("the film is good", "a good film", "good , not bad"), ("the film was bad", "not a good film", "bad")


def cola_folder(folder):
    """CoLA's layout, with sentences of which a small network can learn something."""
    (folder / "CoLA").mkdir(parents=True)
    for file, n in (("train", 60), ("dev", 24)):
        rows = [f"{(GOOD if i % 3 else BAD)[i % len(GOOD)]}{i % 4 * ' .'} {file}{i}" for i in range(n)]  # no two alike
        text = "".join(f"gj04\t{int(bool(i % 3))}\t\t{row}\n" for i, row in enumerate(rows))
        (folder / "CoLA" / f"{file}.tsv").write_text(text)
    return folder
