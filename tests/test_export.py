"""Soups in the libraries that load them: every folder is loaded by the library's own call."""

import json
import sys

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
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from configs.errors import UserError
from configs.stages import Export
from soups.experiment.export.card import usage
from soups.experiment.export.formats import export, loaded_back
from soups.experiment.export.source import read_source
from tests.commands import here

pytestmark = pytest.mark.slow  # folders are written and loaded by four libraries

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A function that makes a soup of a kind and settings, and its network, once; nobody writes where they are."""
    made = {}

    def find(kind, *settings):
        if (kind, settings) not in made:
            made[kind, settings] = finished_soup(kind, tmp_path_factory.mktemp(kind), *settings)
        return made[kind, settings]

    return find


@pytest.fixture
def exported(finished, tmp_path):
    """A function that exports a soup: the folder, the soup's own network and what the soup says of itself."""

    def folder_of(kind, to, *settings):
        soup, network = finished(kind, *settings)
        chosen = Export(soup=soup, to=to, out=tmp_path / "out")
        export(chosen)
        return chosen.out, network, read_source(chosen)

    return folder_of


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


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("timm", "timm"),
        ("imagenet_lite0", "timm"),
        ("open_clip", "open_clip"),
        ("emoji_clip", "open_clip"),
        ("dual", "transformers"),
        ("resnet", "transformers"),
    ],
)
def test_the_code_on_the_card_loads_it_by_the_librarys_call_and_gives_the_soups_logits(kind, to, exported, tmp_path):
    out, _, source = exported(kind, to, *(["model.eval_resize=170"] if to == "timm" else []))
    image = picture(tmp_path / "picture.png", (300, 200) if to == "timm" else (90, 75))
    # The resampling of transformers is of tensors, ours of Pillow: pixels may differ by one of 255 here and there.
    near = {"rtol": 0.02, "atol": 0.02} if to == "transformers" else CLOSE
    torch.testing.assert_close(run_card(source, to, out, image), of_picture(source, image), **near)
    match to:
        case "timm":
            names = timm.create_model(f"local-dir:{out}", pretrained=True).pretrained_cfg["label_names"]
        case "open_clip":
            names = json.loads((out / "classes.json").read_text())
        case _:
            names = AutoModel.from_pretrained(out).config.id2label.values()
    assert tuple(names) == source.class_names
    if kind == "open_clip":  # the text tower beside it is the pretrained one
        clip, before = open_clip.create_model(f"local-dir:{out}"), load_file(source.model.weights)
        assert torch.equal(clip.token_embedding.weight, before["token_embedding.weight"])
        assert not torch.equal(clip.visual.proj, before["visual.proj"])


def test_transformers_loads_a_text_encoder(exported):
    out, network, _ = exported("text_encoder", "transformers")
    model, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    head = load_file(out / "classifier.safetensors")
    ids = tokenizer(["the film is good"], add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(F.linear(F.normalize(mean, dim=-1), head["weight"], head["bias"]), network(ids))


@pytest.mark.parametrize("kind", ["masked_lm", "seq2seq_lm"])
def test_transformers_loads_what_answers_prompts(kind, exported):
    out, network, source = exported(kind, "transformers")
    auto = AutoModelForMaskedLM if kind == "masked_lm" else AutoModelForSeq2SeqLM
    loaded = auto.from_pretrained(out)
    for (name, ours), theirs in zip(network.network.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(AutoTokenizer.from_pretrained(out)) == len(source.tokenizer.tokenizer)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("open_clip", ("model.eval_resize=41", "model.squash=false")),
        ("timm", ("model.eval_resize=170", "model.squash=true")),
        ("dual", ()),
        ("text_encoder", ()),
        ("masked_lm", ()),
        ("seq2seq_lm", ()),
    ],
)
def test_onnxruntime_loads_it_takes_batches_of_any_size_and_its_card_says_how_pixels_look(
    kind, settings, exported, tmp_path
):
    onnxruntime = pytest.importorskip("onnxruntime")
    out, network, source = exported(kind, "onnx", *settings)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (given,) = session.get_inputs()
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
        ("timm", "timm", r"unit norm before the head .* it can go to=onnx"),
        ("timm", "open_clip", "to=timm or to=onnx"),
        ("imagenet_lite0", "transformers", "to=timm or to=onnx"),
        ("open_clip", "timm", "to=open_clip or to=onnx"),
        ("resnet", "timm", "to=transformers or to=onnx"),
        ("text_encoder", "open_clip", "to=transformers or to=onnx"),
    ],
)
def test_other_libraries_are_refused_with_those_that_are_possible(kind, to, instead, finished, tmp_path):
    unit = ["model.normalize=true"] if (kind, to) == ("timm", "timm") else []  # before the head
    with pytest.raises(UserError, match=instead):
        export(Export(soup=finished(kind, *unit)[0], to=to, out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_logits_is_refused(exported):
    out, _, source = exported("resnet", "transformers")
    assert loaded_back(source, "transformers", out) < 1e-4
    head = load_file(out / "classifier.safetensors")
    head["bias"][3] += 0.01
    save_file(head, out / "classifier.safetensors")
    with pytest.raises(UserError, match=r"outputs differ by 0\.01"):
        loaded_back(source, "transformers", out)


def test_the_card_says_recipe_ingredients_scores_licence_and_proxies(finished, tmp_path):
    soup, _ = finished("imagenet_lite0", "model.eval_resize=170")
    export(Export(soup=soup, to="timm", out=tmp_path / "out", license="apache-2.0"))
    _, front, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    matter = yaml.safe_load(front)
    named = ("license", "library_name", "pipeline_tag")
    assert [matter[name] for name in named] == ["apache-2.0", "timm", "image-classification"]
    (result,) = matter["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.5}]
    assert "| test | test | top1 | 0.5000 | 50.0 % | 40.4 to 59.6 % | 100 |" in body
    assert "| row 1 | 0.5 | 75.0 % | optim.lr=0.001 |" in body
    assert "a proxy for ViT-B/32 pretrained on ImageNet-22k" in body
    assert "recipe `greedy`" in body and "was set to apache-2.0" in body
    assert str(tmp_path.parent) not in body + front


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


def test_without_onnx_the_command_names_what_to_install(tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    answer = here(["-m", "soups.experiment.export", f"soup={tmp_path}", "to=onnx", f"out={tmp_path / 'out'}"])
    words = "onnx needs onnx, onnxruntime, onnxscript: pip install onnx onnxruntime onnxscript"
    assert (answer.returncode, answer.stderr) == (2, f"error: {words}\n")
