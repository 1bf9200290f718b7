"""The network of every experiment can be built, without weights and without memory, and its optimiser with it."""

from functools import cache

import pytest
import torch
from transformers import AutoConfig, EfficientNetImageProcessor

from configs.schema import load
from finetune.optimisers import build
from finetune.rows import row_config
from models.classifier import architecture
from tests.experiments import EXPERIMENTS, TYPED
from tests.readers import OF_T5, SPECIAL, tokenizer


@pytest.fixture(scope="module")
def align(tmp_path_factory):
    """A folder with the configs of a network of ALIGN's kind, as a download would have them; they are transformers'."""
    folder = tmp_path_factory.mktemp("align")
    AutoConfig.for_model("align").save_pretrained(folder)
    EfficientNetImageProcessor(do_normalize=False, rescale_offset=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Folders with the configs of BERT and T5 and tokenizers of a few words, since theirs are not here."""
    folders = {}
    for kind, tokens in (("bert", tokenizer(SPECIAL)), ("t5", tokenizer(OF_T5))):
        folders[kind] = tmp_path_factory.mktemp(kind)
        AutoConfig.for_model(kind).save_pretrained(folders[kind])
        tokens.save_pretrained(folders[kind])
    return folders


@cache
def network(model, num_classes, options):
    """The network of these settings; experiments share it, since only its shapes are looked at."""
    with torch.device("meta"):
        return architecture(model, num_classes, options)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_network_and_the_optimiser_of_every_row_are_built(name, align, readers):
    typed = TYPED.get(name, ())
    config = load(name, *typed)
    local = {"transformers": align, "masked_lm": readers["bert"], "seq2seq_lm": readers["t5"]}.get(config.model.kind)
    if local is not None:
        config = load(name, *typed, f"model.weights={local}")
    rows = [row_config(config, row) for row in range(1, config.sweep.size + 1)]
    for model, classes, options in {(row.model, row.task.size, row.task.options) for row in rows}:
        built = network(model, classes, options)
        parameters = list(built.parameters())
        assert all(parameter.is_meta for parameter in parameters)
        assert built.num_classes == classes
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        for optim in {row.optim for row in rows}:
            groups = build(optim, built).param_groups
            assert sum(parameter.numel() for group in groups for parameter in group["params"]) == trained
