"""Soups in the libraries that load them: every folder is loaded by the library's own call."""

import json
import subprocess
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from exports import finished_soup
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from configs.errors import UserError
from configs.exporting import Export
from soups.card import interval
from soups.experiment.export.formats import export, loaded_back
from soups.experiment.export.source import read_source
from soups.experiment.export.usage import usage
from tests.commands import python

pytestmark = pytest.mark.slow  # folders are written and loaded by four libraries

ROOT = Path(__file__).resolve().parents[1]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def exported(kind, to, folder, *more):
    """The folder, the soup's own network and where the soup is."""
    soup, network = finished_soup(kind, folder, *more)
    export(Export(soup=soup, to=to, out=folder / "out"))
    return folder / "out", network, soup


def pixels(size, seed=0):
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def picture(path, size=(90, 75)):
    """A picture that is not square, of broad patches so that resampling matters little to no one."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def run_card(source, to, folder, image):
    """The logits that the card's own code gives for a picture."""
    code = usage(source, to).replace("FOLDER", str(folder)).replace("image.png", str(image))
    space = {}
    with torch.no_grad():
        exec(code, space)
    return torch.as_tensor(space["logits"])


def of_picture(source, image):
    """The logits of the soup itself."""
    with torch.no_grad():
        return source.network(source.images(Image.open(image).convert("RGB"))[None])


@pytest.mark.parametrize("kind", ["timm", "imagenet_lite0"])
def test_timm_loads_it_with_class_names_and_preprocessing(kind, tmp_path):
    out, network, soup = exported(kind, "timm", tmp_path, "model.eval_resize=170")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    seen = timm.data.resolve_model_data_config(loaded)
    size = seen["input_size"][-1]
    images = pixels(size)
    mean, std = (torch.tensor(seen[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(loaded((images / 255 - mean) / std), network(images), **CLOSE)
    source = read_source(Export(soup=soup, to="timm", out=out))
    assert tuple(loaded.pretrained_cfg["label_names"]) == source.class_names
    image = picture(tmp_path / "picture.png", (300, 200))
    torch.testing.assert_close(run_card(source, "timm", out, image), of_picture(source, image), **CLOSE)


@pytest.mark.parametrize("kind", ["open_clip", "emoji_clip"])
def test_open_clip_loads_it_and_unit_features_meet_the_head(kind, tmp_path):
    out, _, soup = exported(kind, "open_clip", tmp_path)
    clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    head = load_file(out / "classifier.safetensors")
    image = picture(tmp_path / "picture.png")
    seen = transform(Image.open(image))[None]
    with torch.no_grad():
        logits = F.linear(clip.eval().encode_image(seen, normalize=True), head["weight"], head["bias"])
    source = read_source(Export(soup=soup, to="open_clip", out=out))
    torch.testing.assert_close(logits, of_picture(source, image), **CLOSE)
    torch.testing.assert_close(run_card(source, "open_clip", out, image), logits, **CLOSE)
    assert tuple(json.loads((out / "classes.json").read_text())) == source.class_names


def test_the_text_tower_beside_it_is_the_pretrained_one(tmp_path):
    out, _, _ = exported("open_clip", "open_clip", tmp_path)
    clip = open_clip.create_model(f"local-dir:{out}")
    before = load_file(tmp_path / "hub/small.safetensors")
    assert torch.equal(clip.token_embedding.weight, before["token_embedding.weight"])
    assert not torch.equal(clip.visual.proj, before["visual.proj"])


@pytest.mark.parametrize("kind", ["dual", "resnet"])
def test_transformers_loads_an_image_network_and_its_preprocessing(kind, tmp_path):
    out, _, soup = exported(kind, "transformers", tmp_path)
    model, processor = AutoModel.from_pretrained(out).eval(), AutoImageProcessor.from_pretrained(out)
    head = load_file(out / "classifier.safetensors")
    image = picture(tmp_path / "picture.png")
    seen = processor(Image.open(image).convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features_of = model.get_image_features if kind == "dual" else model
        features = features_of(pixel_values=seen).pooler_output.flatten(1)
        features = F.normalize(features, dim=-1) if kind == "dual" else features
        logits = F.linear(features, head["weight"], head["bias"])
    source = read_source(Export(soup=soup, to="transformers", out=out))
    torch.testing.assert_close(run_card(source, "transformers", out, image), logits, **CLOSE)
    # Its resampling is of tensors, ours of Pillow: pixels may differ by one of 255 here and there.
    torch.testing.assert_close(logits, of_picture(source, image), rtol=0.02, atol=0.02)
    assert [model.config.id2label[i] for i in range(len(head["bias"]))] == list(source.class_names)


def test_transformers_loads_a_text_encoder(tmp_path):
    out, network, _ = exported("text_encoder", "transformers", tmp_path)
    model, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    head = load_file(out / "classifier.safetensors")
    ids = tokenizer(["the film is good"], add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(F.linear(F.normalize(mean, dim=-1), head["weight"], head["bias"]), network(ids))


@pytest.mark.parametrize("kind", ["masked_lm", "seq2seq_lm"])
def test_transformers_loads_what_answers_prompts(kind, tmp_path):
    out, network, soup = exported(kind, "transformers", tmp_path)
    auto = AutoModelForMaskedLM if kind == "masked_lm" else AutoModelForSeq2SeqLM
    loaded = auto.from_pretrained(out)
    for (name, ours), theirs in zip(network.network.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(AutoTokenizer.from_pretrained(out)) == len(
        read_source(Export(soup=soup, to="onnx", out=out)).tokenizer.tokenizer
    )


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("emoji_clip", ("model.eval_resize=73", "model.squash=false")),
        ("timm", ()),
        ("open_clip", ("model.eval_resize=41", "model.squash=true")),
        ("dual", ()),
        ("text_encoder", ()),
        ("masked_lm", ()),
        ("seq2seq_lm", ()),
    ],
)
def test_onnxruntime_loads_it_takes_batches_of_any_size_and_its_card_says_how_pixels_look(kind, settings, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    out, network, soup = exported(kind, "onnx", tmp_path, *settings)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (given,) = session.get_inputs()
    source = read_source(Export(soup=soup, to="onnx", out=out))
    for count in (1, 4):
        inputs = source.example(count)
        with torch.no_grad():
            ours = network(inputs)
        (logits,) = session.run(["logits"], {given.name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), ours, **CLOSE)
    known = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(known["class_names"])) == source.class_names
    assert json.loads(known["class_names"]) == json.loads((out / "preprocessing.json").read_text())["class_names"]
    if not source.model.is_reader:
        image = picture(tmp_path / "picture.png")
        torch.testing.assert_close(run_card(source, "onnx", out, image), of_picture(source, image), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "to", "instead"),
    [
        ("emoji_clip", "timm", "to=open_clip or to=onnx"),
        ("emoji_clip", "transformers", "to=open_clip or to=onnx"),
        ("timm", "open_clip", "to=timm or to=onnx"),
        ("imagenet_lite0", "transformers", "to=timm or to=onnx"),
        ("open_clip", "timm", "to=open_clip or to=onnx"),
        ("resnet", "timm", "to=transformers or to=onnx"),
        ("text_encoder", "open_clip", "to=transformers or to=onnx"),
    ],
)
def test_other_libraries_are_refused_with_those_that_are_possible(kind, to, instead, tmp_path):
    soup, _ = finished_soup(kind, tmp_path)
    with pytest.raises(UserError, match=instead):
        export(Export(soup=soup, to=to, out=tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def test_timm_has_no_place_for_unit_features(tmp_path):
    soup, _ = finished_soup("timm", tmp_path, "model.normalize=true")
    with pytest.raises(UserError, match=r"unit norm before the head .* it can go to=onnx"):
        export(Export(soup=soup, to="timm", out=tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_with_other_logits_is_refused(tmp_path):
    out, _, soup = exported("resnet", "transformers", tmp_path)
    source = read_source(Export(soup=soup, to="transformers", out=out))
    assert loaded_back(source, "transformers", out) < 1e-4
    head = load_file(out / "classifier.safetensors")
    head["bias"][3] += 0.01
    save_file(head, out / "classifier.safetensors")
    with pytest.raises(UserError, match=r"outputs differ by 0\.01"):
        loaded_back(source, "transformers", out)


def test_the_card_says_recipe_ingredients_scores_licence_and_proxies(tmp_path):
    soup, _ = finished_soup("imagenet_lite0", tmp_path)
    export(Export(soup=soup, to="timm", out=tmp_path / "out", license="apache-2.0"))
    _, front, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    matter = yaml.safe_load(front)
    assert (matter["license"], matter["library_name"], matter["pipeline_tag"]) == (
        "apache-2.0",
        "timm",
        "image-classification",
    )
    (result,) = matter["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.5}]
    assert "| test | test | top1 | 0.5000 | 50.0 % | 40.4 to 59.6 % | 100 |" in body
    assert "| row 1 | 0.5 | 75.0 % | optim.lr=0.001 |" in body
    assert "a proxy for ViT-B/32 pretrained on ImageNet-22k" in body
    assert "recipe `greedy`" in body and "was set to apache-2.0" in body
    assert str(tmp_path) not in body + front


def test_an_interval_is_wilsons():
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with z = 1.959964, p = 9 / 10, n = 10
    assert interval(9, 10) == pytest.approx((0.59585, 0.98212), abs=1e-5)


def test_an_ensemble_a_full_folder_and_a_missing_soup_are_refused(tmp_path):
    soup, _ = finished_soup("emoji_clip", tmp_path)
    record = json.loads((soup / "soup.json").read_text())
    with pytest.raises(UserError, match="is there already"):
        export(Export(soup=soup, to="open_clip", out=tmp_path))
    with pytest.raises(UserError, match=r"classes has 2 names, and the task 620"):
        export(Export(soup=soup, to="open_clip", out=tmp_path / "out", classes=("a", "b")))
    (soup / "soup.json").write_text(json.dumps(record | {"digest": None}))
    with pytest.raises(UserError, match="is an ensemble"):
        export(Export(soup=soup, to="open_clip", out=tmp_path / "out"))
    with pytest.raises(UserError, match="no such file or folder"):
        export(Export(soup=tmp_path / "none", to="open_clip", out=tmp_path / "out"))


def test_without_onnx_the_command_names_the_file_to_install(tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['onnx', 'onnxruntime', 'onnxscript']))\n"
        "from soups.experiment.export.__main__ import *\n"
        f"sys.argv = ['x', 'soup={tmp_path}', 'to=onnx', 'out={tmp_path / 'out'}']\nexport_entry_point(run)()"
    )
    answer = subprocess.run([python(), "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr == (
        "error: onnx needs onnx, onnxruntime, onnxscript: pip install onnx onnxruntime onnxscript\n"
    )
