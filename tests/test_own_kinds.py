"""Greedy on made-up pools of each library, by the real command, and pools that no soup is made of."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from released_files import random_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from configs.errors import UserError
from configs.own_pool import OwnNetwork, OwnPool
from models.released import convert
from soups.made_up import CLASSES, DUAL, make, moved
from soups.own import cook_files
from soups.own_examples import class_folders, examples_of
from soups.own_greedy import accuracy_on, fitting
from soups.own_networks import build
from soups.refusals import refuse_unsuitable

pytestmark = pytest.mark.slow  # pools of every library are cooked

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    make(folder)
    return folder


def settings(folder, kind, ingredients, **network):
    task = {"kind": "image_folder", "root": folder / "held_out"}
    if kind == "texts":
        task = {"kind": "text_file", "file": folder / "held_out.tsv", "columns": ("text",), "label": "label"}
    library = {"images": "transformers", "texts": "transformers", "plain": "function"}.get(kind, kind)
    model = {"kind": library, "batch_size": 5, **network}
    return OwnPool(recipe="greedy", ingredients=(ingredients,), out=folder / "soup.safetensors", task=task, model=model)


def scored(pool, paths):
    """Accuracy of each file, by way of our own classifier."""
    own = build(pool.model, paths, list(names_of(paths[0])), class_folders(pool.task))
    accuracy = accuracy_on(own, examples_of(pool.task, own, pool.model.batch_size), pool.task.metric)
    return [accuracy(fitting(path, own)()) for path in paths]


def names_of(path):
    from soups.residents import FileWeights

    return list(FileWeights(path))


def pictures(folder):
    """Held-out pictures and the place of their class among the names."""
    return [
        (Image.open(path).convert("RGB"), CLASSES.index(path.parent.name))
        for path in sorted((folder / "held_out").rglob("*.png"))
    ]


def test_a_timm_pool_is_scored_as_timm_itself_does(pools):
    paths = sorted((pools / "timm").glob("run*.safetensors"))
    theirs = []
    for path in paths:
        network = timm.create_model("test_vit", num_classes=3, checkpoint_path=str(path)).eval()
        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
        theirs.append(share_right(pools, lambda image, n=network, t=transform: n(t(image)[None])))
    assert scored(settings(pools, "timm", "x", name="test_vit"), paths) == pytest.approx(theirs)


@torch.no_grad()
def share_right(pools, answer):
    seen = pictures(pools)
    return sum(int(answer(image).argmax()) == label for image, label in seen) / len(seen)


def test_a_pool_of_hugging_face_vision_models_is_scored_as_transformers_does(pools):
    paths = sorted((pools / "images").iterdir())
    theirs = []
    for path in paths:
        network = AutoModelForImageClassification.from_pretrained(path).eval()
        reader = AutoImageProcessor.from_pretrained(path)
        theirs.append(share_right(pools, lambda image, n=network, r=reader: n(**r(image, return_tensors="pt")).logits))
    assert scored(settings(pools, "images", "x"), paths) == pytest.approx(theirs)


def test_a_pool_of_hugging_face_text_models_is_scored_as_transformers_does(pools):
    paths = sorted((pools / "texts").iterdir())
    lines = [line.split("\t") for line in (pools / "held_out.tsv").read_text().splitlines()[1:]]
    theirs = []
    for path in paths:
        network = AutoModelForSequenceClassification.from_pretrained(path).eval()
        words = AutoTokenizer.from_pretrained(path)
        with torch.no_grad():
            said = [int(network(**words(text, return_tensors="pt")).logits.argmax()) for text, _ in lines]
        theirs.append(sum(network.config.id2label[i] == label for i, (_, label) in zip(said, lines, strict=True)) / 8)
    assert scored(settings(pools, "texts", "x"), paths) == pytest.approx(theirs)


def test_classes_are_matched_by_the_names_of_config_json_and_not_by_their_order(pools, tmp_path):
    originals, order = sorted((pools / "images").iterdir()), [2, 0, 1]
    paths = [tmp_path / path.name for path in originals]
    for original, path in zip(originals, paths, strict=True):
        shutil.copytree(original, path)
        weights = load_file(path / "model.safetensors")
        for name in ("classifier.weight", "classifier.bias"):
            weights[name] = weights[name][order].contiguous()
        save_file(weights, path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        config["id2label"] = {str(i): CLASSES[j] for i, j in enumerate(order)}
        config["label2id"] = {CLASSES[j]: i for i, j in enumerate(order)}
        (path / "config.json").write_text(json.dumps(config))
    pool = settings(pools, "images", "x")
    assert scored(pool, paths) == scored(pool, originals)
    config["id2label"]["0"] = "purple"
    (paths[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"are not the classes in the network's config\.json"):
        scored(pool, paths[:1])


def test_an_open_clip_pool_answers_by_the_class_names_in_the_templates(pools):
    path = pools / "open_clip/run1"
    network = open_clip.CLIP(**DUAL).eval()
    network.load_state_dict(load_file(path / "open_clip_model.safetensors"))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    tokenizer = open_clip.SimpleTokenizer()
    with torch.no_grad():
        rows = []
        for name in CLASSES:
            texts = tokenizer([template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES])
            rows.append(torch.nn.functional.normalize(network.encode_text(texts), dim=-1).mean(0))
        head = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    theirs = share_right(pools, lambda image: network.encode_image(transform(image)[None]) @ head.T)
    assert scored(settings(pools, "open_clip", "x"), [path]) == pytest.approx([theirs])


def test_a_plain_pool_is_scored_by_the_function_that_builds_its_network(pools):
    paths = sorted((pools / "plain").iterdir())
    pool = settings(pools, "plain", "x", name="torchvision.models:squeezenet1_1", image_size=64)
    assert all(0 <= score <= 1 for score in scored(pool, paths))


@pytest.mark.slow
def test_a_released_file_and_its_conversion_are_one_classifier(tmp_path):
    for i in range(1000):
        (tmp_path / "held_out" / f"{i:04d}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "held_out" / f"{i:04d}" / "0.png") if i < 1000 else None
    torch.save(random_state(), tmp_path / "model_0.pt")
    save_file(convert(tmp_path / "model_0.pt")[0], tmp_path / "model_0.safetensors")
    network = OwnNetwork(kind="open_clip", name="ViT-B-32-quickgelu", batch_size=1)
    image, found = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8), []
    for path in (tmp_path / "model_0.pt", tmp_path / "model_0.safetensors"):
        own = build(network, [path], names_of(path), [str(i) for i in range(1000)])
        weights = fitting(path, own)()
        named = {own.own_name(name): weights[name] for name in weights}
        own.network.load_state_dict({name: tensor for name, tensor in named.items() if name})
        with torch.no_grad():
            found.append(own.logits(image))
    torch.testing.assert_close(*found, atol=0, rtol=0)


COMMANDS = {
    "timm": ["ingredients=[{}/timm/run*.safetensors]", "task=image_folder", "model=timm", "model.name=test_vit"],
    "open_clip": ["ingredients=[{}/open_clip/*]", "task=image_folder", "model=open_clip"],
    "images": ["ingredients=[{}/images/*]", "task=image_folder", "model=transformers"],
    "texts": ["ingredients=[{}/texts/*]", "task=text_file", "model=transformers"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_cooks_a_greedy_soup_that_its_library_loads(kind, pools, tmp_path):
    words = [word.format(pools) for word in COMMANDS[kind]]
    words.append(f"task.file={pools}/held_out.tsv" if kind == "texts" else f"task.root={pools}/held_out")
    words += ["recipe=greedy", f"out={tmp_path}/model.safetensors"]
    answer = subprocess.run(
        [sys.executable, "-m", "soups", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        note = json.loads(file.metadata()["soup"])["note"]
    assert len(note["decisions"]) == 3
    assert note["held_out"]["n"] == (8 if kind == "texts" else 12)
    if kind in ("images", "texts"):
        for path in (pools / kind / "checkpoint-0").glob("*.json"):
            shutil.copy(path, tmp_path)
        library = AutoModelForImageClassification if kind == "images" else AutoModelForSequenceClassification
        _, info = library.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


# What no soup is made of.


def files(folder, **states):
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in states]


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(rank, seed=0):
    begin = "base_model.model.q"
    return {f"{begin}.lora_A.weight": noise(seed, rank, 8), f"{begin}.lora_B.weight": noise(seed, 8, rank)}


def test_models_that_started_elsewhere_are_refused_and_a_new_head_is_no_other_start(tmp_path):
    start = {f"layer{i}.weight": noise(i, 8, 8) for i in range(3)}
    own_heads = [moved(start, i) | {"head.weight": 50 * noise(7 + i, 3, 8)} for i in range(3)]
    refuse_unsuitable(files(tmp_path / "kin", a=own_heads[0], b=own_heads[1], c=own_heads[2]))
    stranger = {f"layer{i}.weight": noise(90 + i, 8, 8) for i in range(3)}
    paths = files(tmp_path / "mixed", a=start, b=moved(start, 1), c=stranger, d=moved(start, 2))
    with pytest.raises(UserError, match=r"mixed/c\.safetensors started elsewhere: weights have a cosine of -?0\.[01]"):
        refuse_unsuitable(paths)
    refuse_unsuitable(paths, unrelated=True)
    ingredients = tuple(map(str, paths))
    pool = OwnPool(recipe="uniform", ingredients=ingredients, out=tmp_path / "soup.safetensors", unrelated="average")
    cook_files(pool)
    with pytest.raises(UserError, match="started elsewhere"):
        cook_files(OwnPool(recipe="uniform", ingredients=ingredients, out=tmp_path / "soup.safetensors"))


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (lora(4), lora(8), r"LoRA adapters are of different rank, 4 in .*a\.safetensors and 8 in .*b\.safetensors"),
        (lora(4), lora(4, 1), r"LoRA adapters are in .*a\.safetensors .*merge_and_unload"),
        ({"w.qweight": torch.ones(2, 2).int()}, {"w.qweight": torch.ones(2, 2).int()}, "is of quantised weights"),
        ({"w.weight": torch.ones(2, 2).to(torch.int8)}, {"w.weight": torch.ones(2, 2).to(torch.int8)}, "quantised"),
        ({"w": torch.ones(2, 2)}, {"w": torch.ones(2, 3)}, r"tensor 'w' is F32 \(2, 3\), but F32 \(2, 2\)"),
        ({"w": torch.ones(2, 2)}, {"v": torch.ones(2, 2)}, "tensor 'v' is not in"),
    ],
)
def test_what_no_mean_is_made_of_is_refused_by_file_and_tensor(tmp_path, one, other, words):
    with pytest.raises(UserError, match=words) as caught:
        refuse_unsuitable(files(tmp_path, a=one, b=other))
    assert "\n" not in str(caught.value)


def test_classes_in_another_order_are_refused_though_all_shapes_agree(pools, tmp_path):
    for i in range(2):
        shutil.copytree(pools / f"images/checkpoint-{i}", tmp_path / str(i))
    config = json.loads((tmp_path / "1/config.json").read_text())
    config["id2label"] = {"0": "red", "1": "green", "2": "blue"}
    (tmp_path / "1/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"differ in 'id2label' .*another network or label space"):
        refuse_unsuitable([tmp_path / "0", tmp_path / "1"])


def test_the_state_of_an_optimizer_is_no_model_and_a_folder_has_a_model_beside_it(pools, tmp_path):
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match=r"optimizer\.pt holds the state of an optimizer, not a model"):
        refuse_unsuitable([tmp_path / "optimizer.pt"])
    folder = tmp_path / "checkpoint-9"
    shutil.copytree(pools / "texts/checkpoint-0", folder)
    shutil.copy(tmp_path / "optimizer.pt", folder)
    refuse_unsuitable([folder, pools / "texts/checkpoint-1"])


def test_a_folder_with_a_pickle_alone_is_read_and_one_with_sharded_pickles_is_told_what_to_do(tmp_path):
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    refuse_unsuitable([tmp_path])
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match="has shards of pickles: load it and save it with save_pretrained"):
        refuse_unsuitable([tmp_path])


@pytest.mark.parametrize(
    ("kind", "network", "words"),
    [
        ("timm", {}, "needs model.name=NAME"),
        ("timm", {"name": "nothing"}, "model.name=nothing"),
        ("open_clip", {"name": "nothing"}, "model.name=nothing"),
        ("plain", {"name": "torchvision.models:nothing"}, "torchvision.models:nothing"),
        ("texts", {"name": "images/checkpoint-0"}, "no text classifier|not of the network of"),
    ],
)
def test_a_network_that_is_not_there_is_one_line(pools, kind, network, words):
    place = {"timm": "timm/run0.safetensors", "open_clip": "timm/run0.safetensors", "plain": "plain/run0.pt"}
    if kind == "texts":
        network = {"name": str(pools / network["name"])}
    with pytest.raises(UserError, match=words) as caught:
        scored(settings(pools, kind, "x", **network), [pools / place.get(kind, "texts/checkpoint-0")])
    assert "\n" not in str(caught.value)


def test_texts_are_read_by_transformers_alone():
    with pytest.raises(ValueError, match="texts are read by model=transformers"):
        replace(settings(Path("x"), "texts", "x"), model=OwnNetwork(kind="timm", name="resnet18", batch_size=1))
