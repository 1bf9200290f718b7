"""Souped adapters, compared with the updates that they stand for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import soups
from soups.cli import main
from soups.errors import UserError
from soups.files.adapters import scaling_of
from soups.lora import soup_folders, soup_lora, truncated
from soups.verify import verify
from tests.commands import python
from tests.saved import record_in

MODULE = "base_model.model.encoder.layer.0.attention.query"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


def adapter(seed, rank=2, inputs=7, outputs=5):
    generator = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, inputs, generator=generator), B: torch.randn(outputs, rank, generator=generator)}


def update(weights, scaling=1.0):
    return scaling * weights[B].double() @ weights[A].double()


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 6])
def test_a_truncated_soup_is_the_best_approximation_and_reports_its_error(rank):
    adapters = [adapter(seed) for seed in range(3)]  # ranks sum to 6, of a 5 x 7 update
    soup = soup_lora(adapters, [1.0] * 3, rank=rank)
    mean = sum(update(a) for a in adapters) / 3
    u, values, vt = torch.linalg.svd(mean, full_matrices=False)  # forms the update: the slow obvious way
    expected = u[:, :rank] @ values[:rank].diag() @ vt[:rank]
    torch.testing.assert_close(update(soup.weights), expected, rtol=1e-5, atol=1e-5)
    error = ((update(soup.weights) - mean).norm() / mean.norm()).item()
    assert soup.errors[MODULE] == pytest.approx(error, abs=1e-6)
    assert soup.weights[A].shape == (rank, 7)
    assert soup.weights[B].shape == (5, rank)


def test_truncation_never_forms_the_update():
    # 2,000,000 x 1,000,000 numbers would be 16 TB.
    a, b = torch.ones(2, 1_000_000, dtype=torch.float64), torch.ones(2_000_000, 2, dtype=torch.float64)
    down, up, error = truncated(a, b, 1)
    assert (down.shape, up.shape) == ((1, 1_000_000), (2_000_000, 1))
    assert (up[0] @ down[:, 0]).item() == pytest.approx(2)
    assert error == pytest.approx(0, abs=1e-12)


def test_adapters_keep_their_dtype_and_of_several_none_loses_digits():
    halves = [{name: tensor.bfloat16() for name, tensor in adapter(i).items()} for i in range(2)]
    for pool, kind in ((halves, torch.bfloat16), ([halves[0], adapter(1)], torch.float32)):
        assert {tensor.dtype for tensor in soup_lora(pool, [1.0, 1.0]).weights.values()} == {kind}


@pytest.mark.parametrize(
    ("adapters", "options", "words"),
    [
        ([adapter(0), adapter(1, inputs=8)], {}, "adapter 1, .*do not fit the others"),
        ([adapter(0), adapter(1, outputs=6)], {}, "adapter 1, .*do not fit the others"),
        ([{A: torch.ones(2, 3), B: torch.ones(4, 3)}], {}, "adapter 0, .*do not fit the others"),
        ([{A: torch.ones(2, 3), B: torch.ones(0)}], {}, "adapter 0, .*do not fit the others"),
        ([{A: torch.ones(2, 3)}], {}, f"no '{B}' beside it"),
        ([adapter(0) | {A: torch.full((2, 7), torch.nan)}], {}, "NaN or infinity"),
        ([adapter(0) | {f"{MODULE}.lora_magnitude_vector": torch.ones(5)}], {}, "is of DoRA"),
        ([adapter(0) | {f"{MODULE}.lora_sparse": torch.ones(5)}], {}, "no factor of a LoRA update"),
        ([adapter(0), adapter(1)], {"rank": 5}, r"must be in \[1, 4\].*got 5"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(adapters, options, words):
    with pytest.raises(ValueError, match=words):
        soup_lora(adapters, [1.0] * len(adapters), **options)


def test_adapters_of_rslora_are_scaled_by_the_root_of_their_rank():
    assert scaling_of({"r": 16, "lora_alpha": 32, "use_rslora": True}) == 32 / 4  # the root of the rank


CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/base",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["query"],
}


def adapter_folder(place, weights, **config):
    place.mkdir(parents=True)
    save_file(weights, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return place


def update_of(folder, module=MODULE):
    """What peft adds to a module's weight: its scaling, from the config, times B A."""
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (weights[f"{module}.lora_{side}.weight"].double() for side in "AB")
    return scaling_of(config, module.removeprefix("base_model.model.")) * b @ a


def test_folders_of_peft_become_one_that_has_the_mean_of_their_updates(tmp_path):
    folders = [
        adapter_folder(tmp_path / "a", adapter(0)),
        adapter_folder(tmp_path / "b", adapter(1, rank=3), r=3, lora_alpha=6, use_rslora=True),
    ]
    (folders[0] / "tokenizer.json").write_text("{}")
    out = tmp_path / "soup"
    assert soup_folders(folders, out, weights=[3, 1]).remarks() == ["rank 5, exact"]
    torch.testing.assert_close(update_of(out), 0.75 * update_of(folders[0]) + 0.25 * update_of(folders[1]))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert config["target_modules"] == ["query"]
    assert (out / "tokenizer.json").exists()
    assert 'base_model: "some/base"' in (out / "README.md").read_text()
    (remark,) = soup_folders(folders, tmp_path / "small", rank=2).remarks()
    assert "rank 2, largest relative error of a module" in remark


OTHER_KINDS = ("IA3", "PROMPT_TUNING", "VERA", "LOHA", "ADALORA", None)
# Settings that change what an adapter does to its model, and one that a newer version may bring.
OTHER_OPTIONS = {
    "target_parameters": ["experts.w"],
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "not_known_yet": 0.5,
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"base_model_name_or_path": "another/base"}, "base_model_name_or_path is 'another/base', but 'some/base' in"),
        ({"revision": "v2"}, "revision is 'v2', but None in"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', but 'CAUSAL_LM' in"),
        *(({"peft_type": kind}, f"b/.*peft_type is {kind!r}; only LORA.*merge_and_unload") for kind in OTHER_KINDS),
        *(({"init_lora_weights": kind}, "path_initial_model_for_weight_conversion") for kind in ("pissa_niter_4", "x")),
        *(({option: value}, f"b/.*{option} is .*merge_and_unload") for option, value in OTHER_OPTIONS.items()),
        ({"use_dora": True}, "use_dora is set.* type --base MODEL, a folder or file of 'some/base'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["head"]}, r"modules_to_save is \['head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_file_and_setting(config, words, tmp_path):
    folders = [adapter_folder(tmp_path / "a", adapter(0)), adapter_folder(tmp_path / "b", adapter(1), **config)]
    with pytest.raises(UserError, match=words):
        soup_folders(folders, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_a_folder_that_is_no_adapter_a_taken_place_and_odd_weights_are_refused(tmp_path):
    folder = adapter_folder(tmp_path / "a", adapter(0))
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors/adapter_config\.json is missing"):
        soup_folders([folder, folder / "adapter_model.safetensors"], tmp_path / "soup")
    with pytest.raises(UserError, match=r"model/adapter_config\.json is missing"):
        soup_folders([folder, tmp_path / "model"], tmp_path / "soup")
    with pytest.raises(UserError, match="is there already"):
        soup_folders([folder], tmp_path / "a")
    with pytest.raises(UserError, match="need one of at least 0 for each of 1 adapters"):
        soup_folders([folder], tmp_path / "soup", weights=[-1.0])
    with pytest.raises(UserError, match=r"rank must be in \[1, 2\]"):
        soup_folders([folder], tmp_path / "soup", rank=3)


def of_size(weights):
    """The size of a module's update, as a function of a person sees it: the scaling is in the factors."""
    return update(weights).norm().item()


@pytest.mark.slow
def test_greedy_chooses_among_adapters_by_a_command_or_a_function(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [adapter_folder(tmp_path / f"run{i}", adapter(i), lora_alpha=(2, 2, 40)[i]) for i in range(3)]
    sizes = [update_of(folder).norm().item() for folder in folders]
    soup = soups.greedy("run*", of_size, "min", quiet=True)
    assert [soup.alone[f"run{i}"] for i in range(3)] == pytest.approx(sizes)
    assert len(soup.shares) == 2  # the mean of two updates of one size is smaller than each
    mean = sum(update_of(tmp_path / name) for name in soup.shares) / 2
    assert soup.score == pytest.approx(mean.norm().item())
    assert update(soup.weights).norm().item() == pytest.approx(soup.score)
    with pytest.raises(UserError, match="a soup of LoRA adapters is a folder"):
        soup.save("soup.safetensors")
    torch.testing.assert_close(update_of(soup.save("by_function")), mean)
    # The same by a command, which gets folders as peft writes them.
    (tmp_path / "size.py").write_text(
        "import json, sys; from safetensors.torch import load_file\n"
        "w, c = load_file(sys.argv[1] + '/adapter_model.safetensors'), json.load(open(sys.argv[1] + "
        "'/adapter_config.json'))\n"
        f"print((c['lora_alpha'] / c['r'] * w['{B}'].double() @ w['{A}'].double()).norm().item())\n"
    )
    main(["greedy", "run*", "--score", f"{python()} size.py {{soup}}", "--goal", "min", "--out", "by_command"])
    assert "greedy: 2 of 3 models" in capsys.readouterr().out
    torch.testing.assert_close(update_of(tmp_path / "by_command"), mean)
    record = record_in(tmp_path / "by_command/adapter_model.safetensors")
    assert record["note"]["recipe"] == "greedy"
    assert len(record["note"]["decisions"]) == 3
    for made in ("by_function", "by_command"):
        assert verify(tmp_path / made) == ""


@pytest.mark.parametrize("rank", [None, 2])
def test_a_soup_of_adapters_is_verified(tmp_path, rank):
    folders = [adapter_folder(tmp_path / f"run{i}", adapter(i)) for i in range(2)]
    soup_folders(folders, tmp_path / "soup", weights=[3, 1], rank=rank)
    assert verify(tmp_path / "soup") == ""
    assert verify(tmp_path / "soup/adapter_model.safetensors") == ""
    main(["make", str(tmp_path / "soup/recipe.yaml"), "--out", str(tmp_path / "again")])
    assert verify(tmp_path / "again", tmp_path) == ""
    assert {path.name for path in (tmp_path / "again").iterdir()} == {p.name for p in (tmp_path / "soup").iterdir()}
    shutil.rmtree(tmp_path / "again")
    config = tmp_path / "soup/adapter_config.json"
    before = config.read_text()
    config.write_text(before.replace('"lora_alpha": ', '"lora_alpha": 1'))
    assert "it differs" in verify(tmp_path / "soup")
    config.write_text(before)
    (folders[1] / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": 5}))
    assert "run1 was changed" in verify(tmp_path / "soup")


def test_with_the_base_model_a_soup_is_the_mean_of_merged_models_and_is_verified(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "encoder.layer.0.attention.query.weight"
    start = torch.randn(5, 7, generator=torch.Generator().manual_seed(9))
    other = {"other.weight": torch.ones(3, 2), "counter": torch.tensor(4)}
    save_file({name: start, **other}, "base.safetensors")
    lengths = torch.arange(1.0, 6)
    adapter_folder(tmp_path / "pool/run0", adapter(0))
    scaled = adapter(1) | {f"{MODULE}.lora_magnitude_vector": lengths}
    adapter_folder(tmp_path / "pool/run1", scaled, use_dora=True, r=4)
    plain, dora = (start.double() + scaling * update(adapter(i)) for i, scaling in enumerate((2, 1)))
    dora = dora / dora.norm(dim=1, keepdim=True) * lengths[:, None]  # each output's weights have the trained length
    main(["lora", "pool/run*", "--base", "base.safetensors", "--out", "soup"])
    found = load_file("soup/model.safetensors")
    torch.testing.assert_close(found[name].double(), (plain + dora) / 2, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["other.weight"], other["other.weight"]) and found["counter"] == 4
    assert verify(tmp_path / "soup", tmp_path / "pool") == ""
    made = {file.name: file.read_bytes() for file in Path("soup").iterdir()}
    for i, typed in enumerate(("./base.safetensors", str(tmp_path / "pool/../base.safetensors"))):
        main(["lora", "pool/run1/../run0", str(tmp_path / "pool/run1"), "--base", typed, "--out", f"soup{i}"])
        assert {file.name: file.read_bytes() for file in Path(f"soup{i}").iterdir()} == made, typed
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir("pool")
        assert verify(tmp_path / "soup", tmp_path / "pool") == ""
    (tmp_path / "base.safetensors").rename("moved.safetensors")
    assert "base.safetensors, is missing; --folder DIR says" in verify(tmp_path / "soup", tmp_path / "pool")
    (tmp_path / "moved.safetensors").rename("pool/base.safetensors")
    assert verify(tmp_path / "soup", tmp_path / "pool") == ""
    save_file({name: start + 1, **other}, "pool/base.safetensors")
    assert "run0 was changed" in verify(tmp_path / "soup", tmp_path / "pool")


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        ({"x.weight": (5, 7)}, {}, r"run0: '.*lora_A.weight' changes 'encoder.*', which .*base.safetensors does not"),
        ({"encoder.layer.0.attention.query.weight": (7, 5)}, {}, r"for floats of shape \(5, 7\).*is F32 \(7, 5\) in"),
        (None, {"base_model_name_or_path": "x"}, "base_model_name_or_path is 'x'"),
        (None, {"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        (None, {"target_parameters": ["w"]}, r"target_parameters is \['w'\]"),
    ],
)
def test_adapters_that_do_not_fit_the_base_model_are_refused_by_name(base, change, words, tmp_path):
    shapes = base or {"encoder.layer.0.attention.query.weight": (5, 7)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "base.safetensors")
    folders = [adapter_folder(tmp_path / f"run{i}", adapter(i), **(change if i else {})) for i in range(2)]
    with pytest.raises(UserError, match=words):
        soups.uniform(folders, base=tmp_path / "base.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "F16"}, "--dtype is for whole models"),
        ({"exclude": "A"}, "--exclude is for whole models"),
        ({"threads": 1}, "--threads is for whole models"),
        (
            {"score": soups.perplexity("text.txt"), "goal": None},
            "--perplexity scores whole models, and these are",
        ),
    ],
)
def test_what_adapters_cannot_have_is_refused(settings, words, tmp_path):
    for i in range(2):
        adapter_folder(tmp_path / f"run{i}", adapter(i))
    with pytest.raises(UserError, match=words):
        soups.greedy(f"{tmp_path}/run*", **{"score": of_size, "goal": "min"} | settings)
    with pytest.raises(UserError, match="type `soups lora`"):
        soups.uniform(f"{tmp_path}/run*")


def test_adapters_of_other_modules_or_with_nan_are_refused_before_any_score(tmp_path):
    adapter_folder(tmp_path / "run0", adapter(0))
    adapter_folder(tmp_path / "run1", {name.replace("query", "key"): t for name, t in adapter(1).items()})
    adapter_folder(tmp_path / "run2", {name: torch.full_like(t, torch.nan) for name, t in adapter(1).items()})
    for others, words in (
        ("01", r"run1: tensor .*key.* not in both"),
        ("02", r"run2/adapter_model\.safetensors: tensor .* holds NaN"),
    ):
        with pytest.raises(UserError, match=words):
            paths = [tmp_path / f"run{i}" for i in others]
            soups.greedy(paths, lambda weights: pytest.fail("it was scored"), "min", quiet=True)


@pytest.mark.parametrize(
    "damaged",
    [{A: torch.ones(0)}, {B: torch.ones(5, 3)}, {f"{MODULE}.lora_magnitude_vector": torch.ones(4)}],
    ids=["a shard that was not gathered", "another rank", "other lengths"],
)
def test_factors_that_do_not_fit_together_are_refused_by_module(damaged, tmp_path):
    save_file({"encoder.layer.0.attention.query.weight": torch.ones(5, 7)}, tmp_path / "base.safetensors")
    folder = adapter_folder(tmp_path / "run0", adapter(0) | damaged)
    with pytest.raises(UserError, match=r"run0: the factors of '.*query' do not fit together"):
        soups.uniform([folder], base=tmp_path / "base.safetensors")
