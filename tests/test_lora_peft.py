"""Soups of adapters that PEFT wrote, compared with the mean of the models into which PEFT merges each of them."""

import pytest
import torch
import transformers

import soups
from soups.cli import main
from soups.verify import verify
from tests.test_cli import ended

peft = pytest.importorskip("peft")

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
GPT2 = {"vocab_size": 11, "n_positions": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
MADE = {  # name -> a class of transformers and its config
    "bert": ("BertForSequenceClassification", transformers.BertConfig(vocab_size=11, num_labels=3, **SMALL)),
    "vit": ("ViTForImageClassification", transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=1)),
}
ATTENTION = {"target_modules": ["query", "value"]}
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
DORA, RSLORA, HEAD = {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["classifier"]}
RANKS = [{"r": 2}, {"r": 3, "lora_alpha": 5}]
PATTERNS = [
    {"r": 2, "rank_pattern": {"value": 3}, "alpha_pattern": {"layer.0.attention.self.query": 1}},
    {"r": 1, "rank_pattern": {"layer.1.attention.self.query": 4}, "alpha_pattern": {"^bert.*value": 3}},
]
# name -> the model, settings that both adapters have, and those of each
VARIANTS = {
    "patterns": ("bert", ATTENTION, PATTERNS),
    "rslora": ("bert", ATTENTION | RSLORA, RANKS),
    "rslora beside lora": ("bert", ATTENTION, [RSLORA, {"r": 3}]),
    "rslora with patterns": ("bert", ATTENTION | RSLORA, PATTERNS),
    "bias all": ("bert", ATTENTION | {"bias": "all"}, RANKS),
    "bias lora_only": ("bert", ATTENTION | {"bias": "lora_only"}, RANKS),
    "lora_bias": ("bert", ATTENTION | {"lora_bias": True}, PATTERNS),
    "lora_bias and bias all": ("bert", ATTENTION | {"lora_bias": True, "bias": "all"}, [RSLORA, {}]),
    "modules_to_save": ("bert", ATTENTION | HEAD, RANKS),
    "embeddings": ("bert", {"target_modules": ["word_embeddings", "query"]}, [RANKS[0], RANKS[1] | RSLORA]),
    "convolutions": ("vit", {"target_modules": ["projection", "classifier"]}, RANKS),
    "weights of (in, out)": ("gpt2", CONV1D, RANKS),
}
WITH_BASE_ALONE = {
    "dora": ("bert", ATTENTION | DORA, PATTERNS),
    "dora of embeddings": ("bert", {"target_modules": ["word_embeddings"], **DORA}, RANKS),
    "dora of convolutions": ("vit", {"target_modules": ["projection"], **DORA}, RANKS),
    "dora of (in, out)": ("gpt2", CONV1D | DORA, RANKS),
    "dora with rslora, biases and a head": ("bert", ATTENTION | DORA | {"bias": "all", **HEAD}, [RSLORA, {}]),
    "dora beside lora": ("bert", ATTENTION, [DORA, {"r": 3}]),
    "other modules": ("bert", {}, [{"target_modules": ["query"]}, {"target_modules": ["key"], **DORA}]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models made at random, as transformers saves them."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for name, (made, config) in MADE.items():
        model = getattr(transformers, made)(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return folder


def fresh(bases, name):
    """The base model as it is in memory, in a tenth of the time that from_pretrained takes."""
    made, config = MADE[name]
    model = getattr(transformers, made)(config)
    model.load_state_dict(torch.load(bases / f"{name}.pt"))
    return model.eval()


def loaded(folder, name):
    return getattr(transformers, MADE[name][0]).from_pretrained(folder)


def adapters(bases, variant, folder):
    """Folders as PEFT saves them after every number that it trains has changed."""
    name, common, each = variant
    for i, settings in enumerate(each):
        torch.manual_seed(i)
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **common, **settings})
        model = peft.get_peft_model(fresh(bases, name), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder / f"run{i}")
    return [folder / f"run{i}" for i in range(len(each))]


def merged(bases, name, folder):
    """The weights of the model into which PEFT merges an adapter."""
    return peft.PeftModel.from_pretrained(fresh(bases, name), folder).merge_and_unload().state_dict()


def mean_of(states):
    return {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}


def assert_equal(found, wanted):
    """To the rounding of float32 in sums of products of about 1."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("variant", [*VARIANTS, *WITH_BASE_ALONE])
def test_the_soup_is_the_mean_of_the_models_into_which_peft_merges_the_adapters(variant, bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = (VARIANTS | WITH_BASE_ALONE)[variant]
    name, start = case[0], torch.load(bases / f"{case[0]}.pt")
    wanted = mean_of([merged(bases, name, folder) for folder in adapters(bases, case, tmp_path)])
    assert max((wanted[key] - start[key]).abs().max() for key in start) > 0.1  # they do something
    main(["lora", "run*", "--base", str(bases / name), "--out", "model"])
    assert_equal(loaded("model", name).state_dict(), wanted)
    assert verify(tmp_path / "model") == ""
    if variant in VARIANTS:
        main(["lora", "run*", "--out", "adapter"])
        assert_equal(merged(bases, name, "adapter"), wanted)
        assert verify(tmp_path / "adapter") == ""


# How an adapter is read is shown above for each variant, and here that greedy does so.
@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        "rslora with patterns",
        "modules_to_save",
        "dora beside lora",
        "dora with rslora, biases and a head",
        "other modules",
    ],
)
def test_greedy_takes_of_adapters_what_it_takes_of_the_models_into_which_peft_merges_them(variant, bases, tmp_path):
    name, common, each = (VARIANTS | WITH_BASE_ALONE)[variant]
    folders = adapters(bases, (name, common, [*each, each[0]]), tmp_path)
    first, second, _ = states = [merged(bases, name, folder) for folder in folders]
    wanted = mean_of([first, second])

    def far(weights):
        """From a model between the first two and nearer to the first, so that greedy takes these in this order."""
        assert weights.keys() == first.keys()
        nearer = {key: 0.6 * first[key].double() + 0.4 * second[key].double() for key in first}
        return sum((weights[key].double() - tensor).square().sum().item() for key, tensor in nearer.items())

    def of_folder(weights):
        return far(merged(bases, name, weights.checkpoint.path.parent))

    found = [
        soups.greedy(states, far, "min", allow_unrelated=True, quiet=True),
        soups.greedy(folders, far, "min", base=bases / f"{name}.pt", quiet=True),
    ]
    assert_equal(found[1].weights, wanted)
    assert verify(found[1].save(tmp_path / "model.safetensors")) == ""
    if variant in VARIANTS:
        found.append(soups.greedy(folders, of_folder, "min", quiet=True))
        assert_equal(merged(bases, name, found[2].save(tmp_path / "soup")), wanted)
        assert verify(tmp_path / "soup") == ""
    for soup in found:
        assert [decision.accepted for decision in soup.decisions] == [True, True, False]
        for decision, one in zip(soup.decisions, found[0].decisions, strict=True):
            assert (soup.names.index(decision.file), decision.score) == (
                found[0].names.index(one.file),
                pytest.approx(one.score, rel=1e-4),
            )


@pytest.mark.parametrize("variant", ["rslora with patterns", "embeddings", "convolutions"])
def test_a_truncated_soup_is_the_nearest_of_its_rank_and_says_how_far_it_is(variant, bases, tmp_path, capsys):
    name = VARIANTS[variant][0]
    folders = adapters(bases, VARIANTS[variant], tmp_path)
    start = torch.load(bases / f"{name}.pt")
    wanted, errors = mean_of([merged(bases, name, folder) for folder in folders]), []
    for key in (key for key, tensor in wanted.items() if tensor.ndim > 1):
        change = (wanted[key] - start[key].double()).flatten(1)
        u, values, vt = torch.linalg.svd(change, full_matrices=False)
        wanted[key] = start[key] + (u[:, :2] * values[:2] @ vt[:2]).reshape(start[key].shape)
        errors.append((values[2:].norm() / values.norm()).item() if change.abs().max() > 1e-5 else 0.0)
    main(["lora", *map(str, folders), "--rank", "2", "--out", str(tmp_path / "soup")])
    assert f"rank 2, largest relative error of a module {max(errors):.2%}" in capsys.readouterr().out
    assert_equal(merged(bases, name, tmp_path / "soup"), wanted)


def test_trained_rows_of_an_embedding_are_averaged_in_an_adapter_and_need_peft_in_a_model(bases, tmp_path, capsys):
    rows = {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [1, 4]}}
    folders = adapters(bases, ("bert", rows, RANKS), tmp_path)
    main(["lora", *map(str, folders), "--out", str(tmp_path / "soup")])
    assert_equal(merged(bases, "bert", tmp_path / "soup"), mean_of([merged(bases, "bert", each) for each in folders]))
    _, _, err = ended(["lora", *map(str, folders), "--base", str(bases / "bert"), "--out", str(tmp_path / "m")], capsys)
    assert "trainable_tokens_delta' changes 'bert." in err


def test_a_head_that_the_base_model_lacks_is_added(bases, tmp_path):
    folders = adapters(bases, VARIANTS["modules_to_save"], tmp_path)
    base = torch.load(bases / "bert.pt")
    lacking = {name: tensor for name, tensor in base.items() if "classifier" not in name}
    torch.save(lacking, tmp_path / "base.pt")
    soup = soups.uniform(folders, base=tmp_path / "base.pt")
    assert_equal(soup.weights, mean_of([merged(bases, "bert", folder) for folder in folders]))
