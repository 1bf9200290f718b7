"""Every kind of checkpoint ends in a soup that loads, or in one line that says why not: docs/kinds.md.

After a change that is meant:  python -m tests.test_kinds
"""

import contextlib
import io
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import soups
from soups.cli import main
from tests.kinds import KINDS, averaged, network

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/kinds.md"
HEAD = """# Which checkpoints can be souped

Made by `python -m tests.test_kinds`, which makes a pool of each kind, two models each, and types the command.
A pickle is never executed. A soup in this table was loaded strictly, every tensor of it, and answered random inputs as
the mean of the models does.

| kind | `soups uniform FILES` |
|---|---|
"""
SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
# Language models in shards of save_pretrained: what it is, a name for its folder, the network, its kind of numbers.
SMALL_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
LANGUAGE = [
    (
        "Llama with tied embeddings, bfloat16, in shards",
        "llama_tied",
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
        torch.bfloat16,
    ),
    (
        "Qwen2 with a head of its own, bfloat16, in shards",
        "qwen_untied",
        lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False)),
        torch.bfloat16,
    ),
    ("GPT-2, float32, in shards", "gpt2", lambda: GPT2LMHeadModel(GPT2Config(**SMALL_GPT2)), torch.float32),
]
INPUTS = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def save_language(make, dtype, folder):
    """Folders m0 and m1 of networks fine-tuned from one."""
    torch.manual_seed(1)
    start = make().state_dict()
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        network = make()
        network.load_state_dict(start)
        with torch.no_grad():
            for weight in network.parameters():  # a tied one stands here once
                if weight.ndim > 1:
                    weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=generator))
        network.to(dtype).save_pretrained(folder / f"m{i}", max_shard_size="60KB")


def outcome(made, folder, *options):
    """What the command answers for a pool of one kind: of a soup what was kept or renamed, else its line."""
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about quantization and TorchScript
        made(folder)
    files = sorted(folder.iterdir())
    errors, out = io.StringIO(), folder / "soup.safetensors"
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(["uniform", *map(str, files), "--out", str(out), *options])
        except SystemExit as ended:
            if ended.code:
                return shown(errors.getvalue(), folder)
    state = dict(soups.load(out))
    module = network()
    begin = "model." if all(name.startswith("model.") for name in state) else ""  # as in the files, which have it too
    state = {name.removeprefix(begin): tensor for name, tensor in state.items()}
    extra = sorted(state.keys() - module.state_dict().keys())
    module.load_state_dict({name: state[name] for name in module.state_dict()})
    torch.testing.assert_close(answered(state), answered(mean_of(averaged(folder.name))), rtol=1e-4, atol=1e-5)
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    more = [f"with {', '.join(f'`{name}`' for name in extra)}"] if extra else []
    more += ["under the names of the files, `model.` and all"] if begin else []
    return "; ".join([f"a soup ({', '.join(sorted(kinds))}) that `load_state_dict` takes", *more])


@torch.no_grad()
def answered(state):
    """What the network of a state answers to random inputs."""
    module = network().eval()
    module.load_state_dict({name: state[name] for name in module.state_dict()})
    return module(INPUTS)


def mean_of(states):
    """The slow obvious way."""
    return {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}


@torch.no_grad()
def outcome_of_language(make, dtype, folder):
    """The same of a pool of language models, whose soup is a folder."""
    save_language(make, dtype, folder)
    files, out = sorted(folder.iterdir()), folder / "soup"
    with contextlib.redirect_stdout(io.StringIO()):
        main(["uniform", *map(str, files), "--out", str(out)])
    kind = type(make())
    soup, found = kind.from_pretrained(out, output_loading_info=True)
    assert not any(found.values()), found
    assert soup.dtype == dtype
    tokens = torch.arange(40).reshape(2, 20)
    each = [kind.from_pretrained(file).float().eval() for file in files]
    alone = [network(tokens).logits for network in each]
    each[0].load_state_dict(mean_of([network.state_dict() for network in each]))
    wanted, given = each[0](tokens).logits, soup.float().eval()(tokens).logits
    gap = (given - wanted).abs().max()
    assert gap < 0.1 * min((logits - wanted).abs().max() for logits in alone), gap  # rounding to bfloat16 is all of it
    shards = len(list(out.glob("*-of-*.safetensors")))
    assert shards == len(list(files[0].glob("*-of-*.safetensors"))) > 1
    return f"a folder ({str(dtype).removeprefix('torch.')}, {shards} shards) that `from_pretrained` loads"


def shown(text, folder):
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: "), text
    return re.sub(rf"{re.escape(str(folder))}/?", "", lines[0]).replace("|", "\\|")


def table():
    with tempfile.TemporaryDirectory() as place:
        rows = [(what, outcome(made, Path(place) / name, *options)) for what, name, made, *options in KINDS]
        rows += [(what, outcome_of_language(*how, Path(place) / name)) for what, name, *how in LANGUAGE]
    return HEAD + "".join(f"| {what} | {found} |\n" for what, found in rows)


REFUSED = {"lora", "float8", "complex", "sparse", "quantised", "nan", "elsewhere", "whole", "scripted", "optimizer"}
REFUSED |= {"truncated", "timm", "model_ema", "lone_shard", "position_ids", "heads", "arrays"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[1])
def test_a_kind_ends_as_the_page_says(kind, tmp_path):
    what, name, made, *options = kind
    found = outcome(made, tmp_path / name, *options)
    assert found.startswith("error: ") == (name in REFUSED), found
    assert f"| {what} | {found} |" in PAGE.read_text(encoding="utf-8"), found


@pytest.mark.parametrize("kind", LANGUAGE, ids=lambda kind: kind[1])
def test_a_language_model_ends_as_the_page_says(kind, tmp_path):
    what, name, *how = kind
    found = outcome_of_language(*how, tmp_path / name)
    assert f"| {what} | {found} |" in PAGE.read_text(encoding="utf-8"), found


def test_the_page_has_no_other_rows():
    rows = PAGE.read_text(encoding="utf-8").removeprefix(HEAD).splitlines()
    assert len(rows) == len(KINDS) + len(LANGUAGE)


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
    print(PAGE)
