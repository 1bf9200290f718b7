"""Recipes in files: beside a soup, written by hand, and of mergekit, whose numbers are computed here all at once."""

import json
import math
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import soups
from soups.cli import main
from soups.made_up import moved
from soups.verify import answer
from tests.servers import serving

MODELS = ["run1.safetensors", "run2.safetensors"]


@pytest.fixture(scope="module")
def states():
    """A start and two models, with a tensor that has equal changes and one that both have."""
    start = {"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(0)), "same": torch.ones(3, 3)}
    start["coarse"] = torch.randint(-2, 3, (30, 30), generator=torch.Generator().manual_seed(1)).float()
    found = {"start": start}
    for i in (1, 2):
        steps = torch.randint(-4, 5, (30, 30), generator=torch.Generator().manual_seed(10 + i)).float() / 16
        found[f"run{i}"] = moved(start, i) | {"coarse": start["coarse"] + steps, "same": start["same"]}
    return found


@pytest.fixture
def pool(states, tmp_path, monkeypatch):
    """They as files, in the current folder."""
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    printed = capsys.readouterr().err
    assert (end.value.code, len(printed.splitlines())) == (2, 1), printed
    return printed


SCORES = """
def score(weights): return abs(weights["w"].double().mean().item())
def each(weights): return weights["w"][:9, 0].abs().tolist()
def others(weights): return weights["w"][9:, 0].abs().tolist()
"""
START = {"init": "start.safetensors"}
RECIPES = [  # with settings of each kind: numbers, lists, words, flags, functions
    {"recipe": "uniform", "models": "run*.safetensors"},
    {"recipe": "weighted", "weights": [3, 1], "dtype": "BF16"},
    {"recipe": "weighted", "weights": [1.5, -0.25], "normalize": False},
    {"recipe": "wise_ft", **START, "alpha": 0.25},
    {"recipe": "model_stock", **START},
    {"recipe": "arithmetic", **START, "scales": [-0.5, 1e-2]},
    {"recipe": "ties", **START, "density": 0.5, "exclude": "^same"},
    {"recipe": "ties", **START, "weights": [1, 2], "per": "tensor"},
    {"recipe": "dare", **START, "density": [0.5, 0.25], "rescale": "l1", "seed": 3, "only_common": True},
    {"recipe": "slerp", "t": 0.3},
    {"recipe": "greedy", "score": "my_score:score", "goal": "min", "ties": "drop"},
    {"recipe": "greedy", "score": "my_score:each", "goal": "min", "report": "my_score:others"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["recipe"])
def test_a_recipe_by_hand_and_the_one_beside_a_soup_make_what_the_function_makes_to_the_byte(recipe, pool, monkeypatch):
    (pool / "my_score.py").write_text(SCORES)
    monkeypatch.syspath_prepend(pool)
    settings = {key: value for key, value in recipe.items() if key not in ("recipe", "models", "init")}
    before = [recipe["init"]] if "init" in recipe else []
    whole = getattr(soups, recipe["recipe"])(*before, MODELS, **settings).save("soup.safetensors").read_bytes()
    assert answer(pool / "soup.safetensors")[0]
    (pool / "recipe.yaml").write_text(yaml.safe_dump({"models": MODELS, **recipe, "out": "by_hand.safetensors"}))
    (pool / "in").mkdir()
    monkeypatch.chdir(pool / "in")
    main(["make", "../recipe.yaml"])  # which names files beside it
    assert (pool / "by_hand.safetensors").read_bytes() == whole
    for i, name in enumerate([START["init"], *MODELS]):
        (pool / name).rename(f"{9 - i}.safetensors")
    main(["make", "../soup.safetensors.recipe.yaml", "--folder", ".", "--force"])
    assert (pool / "soup.safetensors").read_bytes() == whole


def test_a_soup_of_torch_save_and_a_folder_are_made_again_as_they_were(hugging_face, pool, capsys):
    (pool / "texts").symlink_to(hugging_face / "texts")
    pickles = []
    for i in (1, 2):
        pickles.append(pool / f"run{i}.pt")
        torch.save({"model": load_file(f"run{i}.safetensors")}, pickles[-1])
    soups.uniform(pickles).save("soup.pt")
    soups.uniform("texts/checkpoint-*").save("soup")
    main(["make", "soup.pt.recipe.yaml", "--out", "again.pt"])
    main(["make", "soup/recipe.yaml", "--folder", "texts", "--out", "again"])
    assert answer(pool / "again", pool / "texts")[0]
    assert (pool / "again.pt").read_bytes() == (pool / "soup.pt").read_bytes()
    files = {path.name for path in (pool / "soup").iterdir()}
    assert files == {path.name for path in (pool / "again").iterdir()} and "tokenizer.json" in files
    files.remove("README.md")  # whose table is in the order in which models were typed
    assert all((pool / "soup" / name).read_bytes() == (pool / "again" / name).read_bytes() for name in files)
    assert "it lies in a soup's folder: --out DIR names" in refused(["make", "soup/recipe.yaml"], capsys)
    nowhere = ["make", "soup/recipe.yaml", "--folder", "nowhere", "--out", "third"]
    assert "nowhere is not a folder" in refused(nowhere, capsys)


def test_a_folder_that_is_made_again_has_the_config_of_the_model_that_was_named_first(hugging_face, pool):
    shutil.copytree(hugging_face / "texts", pool / "texts")
    models = sorted((pool / "texts").glob("checkpoint-*"))
    for path in models:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"marked": path.name}))
    for first in models:
        soup = soups.uniform([first, *(path for path in models if path != first)]).save(f"soup of {first.name}")
        main(["make", f"{soup}/recipe.yaml", "--folder", "texts", "--out", f"{first.name} again"])
        assert json.loads((pool / f"{first.name} again/config.json").read_text())["marked"] == first.name


def test_a_recipe_that_was_changed_and_a_model_that_is_another_are_refused(pool, capsys):
    soups.uniform(MODELS).save("soup.safetensors")
    path = pool / "soup.safetensors.recipe.yaml"
    text = path.read_text()
    assert "no whole record" in refused(["make", _with(path, text.replace("run1", "run3")), "--out", "s.pt"], capsys)
    assert "leave out --dtype" in refused(["make", _with(path, text), "--out", "s.pt", "--dtype", "F16"], capsys)
    save_file({**load_file("run1.safetensors"), "same": torch.zeros(3, 3)}, "run1.safetensors")
    assert "run1.safetensors was changed; --folder DIR" in refused(["make", path, "--out", "s.pt"], capsys)
    assert not (pool / "s.pt").exists()


def _with(path, text):
    path.write_text(text)
    return path


# mergekit


def delta(states, name, i):
    return states[f"run{i}"][name].double() - states["start"][name]


def trimmed(change, density):
    """Exactly a share of the largest, of equal ones the first."""
    kept = change.abs().float().flatten().argsort(descending=True, stable=True)[: max(1, int(density * change.numel()))]
    mask = torch.zeros(change.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view(change.shape), change, 0)


def ties_at_once(states, name, weights, densities, scale=1.0, *, normalize=True):
    changes = [w * trimmed(delta(states, name, i), d) for i, w, d in zip((1, 2), weights, densities, strict=True)]
    majority = torch.where(sum(changes) >= 0, 1, -1)
    agree = [change.sign() == majority for change in changes]
    merged = sum(torch.where(a, change, 0) for a, change in zip(agree, changes, strict=True))
    divisor = sum(w * a.double() for a, w in zip(agree, weights, strict=True))
    return states["start"][name] + scale * (merged / torch.where(divisor == 0, 1, divisor) if normalize else merged)


def slerp_at_once(one, other, t):
    cosine = (one * other).sum() / one.norm() / other.norm()
    if cosine > 0.9995:
        return (1 - t) * one + t * other
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def of(weight, density=None, **more):
    """Two models with parameters of their own."""
    densities = [{}, {}] if density is None else [{"density": each} for each in density]
    each = [{"weight": w} | d for w, d in zip(weight, densities, strict=True)]
    return {"models": [{"model": m, "parameters": p} for m, p in zip(MODELS, each, strict=True)], **more}


BASE = {"base_model": "start.safetensors"}
MERGED = {
    "linear": (of([1.0, "3e0"]), lambda s, n: (s["run1"][n] + 3 * s["run2"][n]) / 4),
    "linear, sum": (
        of([0.5, 0.25], parameters={"normalize": False}),
        lambda s, n: 0.5 * s["run1"][n] + 0.25 * s["run2"][n],
    ),
    "linear, negative": (of([1.5, -0.5]), lambda s, n: 1.5 * s["run1"][n] - 0.5 * s["run2"][n]),
    "linear, weights of all": (
        {"models": [{"model": m} for m in MODELS], "parameters": {"weight": 1.0}},
        lambda s, n: (s["run1"][n] + s["run2"][n]) / 2,
    ),
    "task_arithmetic": (
        of([0.5, -0.25], **BASE, parameters={"lambda": 2.0, "int8_mask": True}),
        lambda s, n: s["start"][n] + 2 * (0.5 * delta(s, n, 1) - 0.25 * delta(s, n, 2)),
    ),
    "task_arithmetic, normalized": (
        of([1, 3], **BASE, parameters={"normalize": True}),
        lambda s, n: s["start"][n] + (delta(s, n, 1) + 3 * delta(s, n, 2)) / 4,
    ),
    "ties": (
        of([1.0, 0.5], [0.3, 0.6], **BASE, parameters={"lambda": 1.5}),
        lambda s, n: ties_at_once(s, n, [1.0, 0.5], [0.3, 0.6], 1.5),
    ),
    "ties, sum": (
        of([1.0, -0.5], **BASE, parameters={"normalize": False, "density": 0.5}),
        lambda s, n: ties_at_once(s, n, [1.0, -0.5], [0.5, 0.5], normalize=False),
    ),
    "dare_linear, all": (
        of([0.5, 0.25], [1.0, 1.0], **BASE),
        lambda s, n: s["start"][n] + 0.5 * delta(s, n, 1) + 0.25 * delta(s, n, 2),
    ),
    "slerp": (
        {"base_model": MODELS[1], "models": [{"model": m} for m in MODELS], "parameters": {"t": 0.3}},
        lambda s, n: slerp_at_once(s["run2"][n], s["run1"][n], 0.3),
    ),
}


def merge(values, pool, method, *words):
    (pool / "mergekit.yaml").write_text(yaml.safe_dump({"merge_method": method, **values}))
    main(["make", "mergekit.yaml", "--out", "soup.safetensors", "--force", *words])
    return load_file("soup.safetensors")


@pytest.mark.parametrize("case", MERGED)
def test_a_yaml_of_mergekit_gives_the_numbers_of_its_formula_and_can_be_verified(case, states, pool):
    values, formula = MERGED[case]
    found = merge(values, pool, case.partition(",")[0])
    wide = {model: {name: tensor.double() for name, tensor in state.items()} for model, state in states.items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, formula(wide, name).float(), rtol=1e-6, atol=1e-9, msg=name)
    assert answer(pool / "soup.safetensors") == (
        True,
        f"{pool / 'soup.safetensors'}: equal to the byte when made again from its ingredients",
    )


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_linear_drops_a_share_and_rescales_to_the_sum_of_magnitudes(rescale, states, pool):
    values = {"models": [{"model": MODELS[0]}], **BASE, "parameters": {"weight": 2, "density": 0.4, "rescale": rescale}}
    found = merge(values, pool, "dare_linear")
    for name in ("w", "coarse"):
        change, made = delta(states, name, 1), found[name].double() - states["start"][name].double()
        left = torch.where(made != 0, change, 0)
        assert left.count_nonzero() / change.count_nonzero() == pytest.approx(0.4, abs=0.07)
        factor = change.abs().sum() / left.abs().sum() if rescale else 1.0
        torch.testing.assert_close(made, 2 * factor * left, rtol=1e-4, atol=1e-6)


def test_the_dtype_of_a_yaml_of_mergekit_is_that_of_the_soup(states, pool):
    found = merge(of([1, 1], dtype="float32", out_dtype="bfloat16"), pool, "linear")
    assert torch.equal(found["w"], ((states["run1"]["w"].double() + states["run2"]["w"]) / 2).bfloat16())
    assert merge(of([1, 1], dtype="float16"), pool, "linear")["w"].dtype == torch.float16


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        ("linear", of([1, 1], tokenizer_source="base"), "tokenizer_source is not read here"),
        ("linear", of([1, 1], chat_template="auto"), "chat_template is not read here"),
        ("linear", {"slices": []}, "slices is not read here"),
        ("passthrough", of([1, 1]), "passthrough is not made here; known are linear"),
        ("linear", of([1, [0, 1]]), "weight of run2.safetensors: gradients and filters"),
        ("slerp", of([1, 1], **BASE), "parameters of run1.safetensors: weight is not read here"),
        (
            "slerp",
            {
                "base_model": MODELS[0],
                "models": [{"model": MODELS[1]}],
                "parameters": {"t": [{"filter": "mlp", "value": 1}]},
            },
            "t: gradients and filters",
        ),
        ("ties", of([1, 1]), "merge_method: ties needs a base_model"),
        ("linear", of([1, 1], **BASE), "has no base_model but one of the models"),
        ("ties", of([1, 1], **BASE, parameters={"rescale": True}), "parameters of ties: rescale is not read here"),
        ("ties", of([1, 1], [0.5, 0], **BASE), r"density is a share in (0, 1], got 0"),
        ("ties", of([1, 1], **BASE, parameters={"int8_mask": "yes"}), "int8_mask: write true or false"),
        ("linear", {"models": [{"model": MODELS[0]}]}, "weight of run1.safetensors: write a number, not None"),
        ("linear", of([1, 1], dtype="int8"), "dtype: int8 is not made here"),
        ("linear", {"models": [{"model": "a+lora", "parameters": {"weight": 1}}]}, "a LoRA is merged"),
        ("linear", of([1, -1]), "whose sum is above 0"),
    ],
)
def test_what_mergekit_does_and_is_not_done_here_is_refused_by_name(method, values, words, pool, capsys):
    (pool / "mergekit.yaml").write_text(yaml.safe_dump({"merge_method": method, **values}))
    assert words in refused(["make", "mergekit.yaml", "--out", "soup.safetensors"], capsys)
    assert not (pool / "soup.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "recipe.yaml is no yaml"),
        ("- a", "recipe.yaml is no recipe: write a setting a line"),
        ("models: [a]", "recipe.yaml: a recipe has `recipe: NAME`"),
        ("{recipe: ties, models: [a], densty: 1}", "recipe.yaml: the following arguments are required: --out, --init"),
        (
            "{recipe: uniform, models: [run1.safetensors], out: s.pt, densty: 1}",
            "recipe.yaml: unrecognized arguments: --densty=1",
        ),
        ("{recipe: doctor, models: [a]}", "recipe.yaml: recipe: doctor makes no soup"),
        ("{recipe: uniform, models: [a], dtype: {a: 1}}", "dtype: write a number, a word or a list"),
        ("{recipe: uniform, models: [nothing.pt], out: s.pt}", "nothing.pt does not exist"),
    ],
)
def test_a_recipe_that_says_nothing_that_is_known_is_one_line_that_names_the_file(text, words, pool, capsys):
    (pool / "recipe.yaml").write_text(text)
    assert words in refused(["make", "recipe.yaml"], capsys)


# Models of the hub


@pytest.fixture
def hub(pool, monkeypatch):
    """A server that answers as the hub does for two models of one revision, and an empty cache."""
    files = {}
    for i in (1, 2):
        content = (pool / f"run{i}.safetensors").read_bytes()
        name = f"org/run{i}"
        listed = [{"type": "file", "path": "model.safetensors", "oid": "0", "size": len(content)}]
        info = json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode()
        files |= dict.fromkeys((f"api/models/{name}/revision/{revision}" for revision in ("v2", "main")), info)
        files[f"api/models/{name}/tree/{COMMIT}"] = json.dumps(listed).encode()
        files[f"{name}/resolve/{COMMIT}/model.safetensors"] = content
    with serving(files, headers={"X-Repo-Commit": COMMIT, "ETag": '"0"'}) as served:
        for name, value in (("ENDPOINT", served.url), ("HF_HUB_CACHE", str(pool / "cache")), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", HUB_URL.replace("HUB", served.url)
        )
        yield served


COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_URL = "HUB/{repo_id}/resolve/{revision}/{filename}"


def test_models_of_the_hub_are_recorded_with_their_commit_and_fetched_again_to_verify(hub, pool, capsys):
    expected = soups.uniform(MODELS).save("local.safetensors")
    (pool / "recipe.yaml").write_text(
        yaml.safe_dump({"recipe": "uniform", "models": ["hf:org/run1@v2", "hf:org/run2"], "out": "soup.safetensors"})
    )
    main(["make", "recipe.yaml"])
    assert f"hf:org/run1@{COMMIT}" in (pool / "soup.safetensors.recipe.yaml").read_text()
    made, local = load_file("soup.safetensors"), load_file(expected)
    assert all(torch.equal(made[name], local[name]) for name in local)
    shutil.rmtree(pool / "cache")
    for i in (1, 2):
        (pool / f"run{i}.safetensors").unlink()
    assert answer(pool / "soup.safetensors")[0]
    assert any(name == f"org/run2/resolve/{COMMIT}/model.safetensors" for name, _ in hub.asked)
    shutil.rmtree(pool / "cache")
    hub.files[f"org/run2/resolve/{COMMIT}/model.safetensors"] = hub.files[
        f"org/run1/resolve/{COMMIT}/model.safetensors"
    ]
    assert f"hf:org/run2@{COMMIT} was changed" in answer(pool / "soup.safetensors")[1]
    shutil.rmtree(pool / "cache")
    hub.files.clear()
    said = answer(pool / "soup.safetensors")[1]
    assert f"hf:org/run1@{COMMIT} cannot be had from the hub" in said and "\n" not in said


def test_a_name_of_mergekit_that_is_no_file_is_one_of_the_hub(hub, pool):
    values = {"models": [{"model": f"org/run{i}@v2", "parameters": {"weight": 1}} for i in (1, 2)]}
    found = merge(values, pool, "linear")
    assert torch.equal(found["w"], load_file(soups.uniform(MODELS).save("local.safetensors"))["w"])
