"""Soups of networks with tied embeddings load where their ingredients load, whichever version of transformers does it.

A library finds in a soup exactly the names that it found in the ingredients; so nothing hangs on how a version of it
ties names that a file lacks.
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from soups.average import Average
from soups.mean import average_files
from soups.verify import verify

SMALL = {"vocab_size": 64, "max_position_embeddings": 32, "num_attention_heads": 2}
NETWORKS = {  # Llama and GPT-2: tests/test_kinds.py
    "bert": lambda: BertForMaskedLM(
        BertConfig(**SMALL, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, forced_eos_token_id=None,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, hidden_size=16, num_hidden_layers=1, ffn_dim=16, word_embed_proj_dim=16, pad_token_id=1)
    ),
}  # fmt: skip


def models(make):
    """Two models fine-tuned from one, still tied."""
    torch.manual_seed(0)
    start = make().state_dict()
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = make()
        network.load_state_dict(start)
        with torch.no_grad():
            for parameter in network.parameters():  # each tied one once
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        yield network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_soup_of_tied_embeddings_has_the_names_of_its_ingredients_and_loads_strictly(tmp_path, name):
    make, found = NETWORKS[name], list(models(NETWORKS[name]))
    mean = Average().plus(found[0].state_dict()).plus(found[1].state_dict()).weights()
    for i, network in enumerate(found):
        network.save_pretrained(tmp_path / f"m{i}")
        torch.save(network.state_dict(), tmp_path / f"m{i}.bin")  # every name, tied ones in one memory
        torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / f"m{i}.pth")
    for sources in (("m0.bin", "m1.bin"), ("m0.pth", "m1.pth"), ("m0.bin", "m1.pth")):
        average_files([tmp_path / source for source in sources], tmp_path / "soup.safetensors")
        network = make()
        network.load_state_dict(load_file(tmp_path / "soup.safetensors"), strict=True)
        for key, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, mean[key], rtol=0, atol=0)
        assert verify(tmp_path / "soup.safetensors") == ""
    found[0].save_pretrained(tmp_path / "soup")  # its configs
    out = tmp_path / "soup/model.safetensors"
    average_files([tmp_path / "m0", tmp_path / "m1"], out)
    assert load_file(out).keys() == load_file(tmp_path / "m0/model.safetensors").keys()
    loaded, information = type(found[0]).from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, mean[key], rtol=0, atol=0)


def test_a_file_that_dropped_a_name_fits_to_one_with_equal_copies(tmp_path):
    # save_pretrained writes one name, and somebody's script a copy under each.
    from safetensors.torch import save_file

    found = list(models(NETWORKS["bart"]))
    found[0].save_pretrained(tmp_path / "m0")
    save_file({name: tensor.clone() for name, tensor in found[1].state_dict().items()}, tmp_path / "m1.safetensors")
    average_files([tmp_path / "m0", tmp_path / "m1.safetensors"], tmp_path / "soup.safetensors")
    network = NETWORKS["bart"]()
    network.load_state_dict(load_file(tmp_path / "soup.safetensors"), strict=True)
    mean = Average().plus(found[0].state_dict()).plus(found[1].state_dict()).weights()
    assert all(torch.equal(tensor, mean[name]) for name, tensor in network.state_dict().items())
