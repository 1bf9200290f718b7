"""Soups of a user's own files in the libraries that load them, each by the library's own call."""

import json

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from soups.errors import UserError
from soups.export.files import export_soup
from soups.made_up import make_hugging_face, make_open_clip, make_timm
from soups.mean import average_files


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    torch.manual_seed(0)
    make_timm(folder / "timm")
    make_open_clip(folder / "open_clip")
    make_hugging_face(folder / "images", folder / "texts")
    average_files(
        [folder / f"timm/run{i}.safetensors" for i in range(3)], folder / "soup.safetensors", note={"recipe": "uniform"}
    )
    return folder


def test_timm_loads_a_soup_with_the_names_of_its_classes(pools, tmp_path):
    soup, out = pools / "soup.safetensors", tmp_path / "out"
    printed = export_soup(soup, "timm", out, network="timm:test_vit", classes=["a", "b", "c"])
    assert printed.startswith(f"{out}: loaded by timm, outputs within 0.0e+00")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    for name, tensor in load_file(soup).items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    card = (out / "README.md").read_text()
    assert "| run0.safetensors | 0.3333 |" in card and 'library_name: "timm"' in card
    assert "loaded by timm" in export_soup(out, "timm", tmp_path / "again")  # the folder says what it is


def test_open_clip_loads_a_soup_of_its_folders(pools, tmp_path):
    source = pools / "open_clip/run1"
    export_soup(source, "open_clip", tmp_path / "out")
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    for name, tensor in load_file(source / "open_clip_model.safetensors").items():
        assert torch.equal(clip.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "architecture"), [("images", "ViTForImageClassification"), ("texts", "BertForSequenceClassification")]
)
def test_transformers_loads_a_file_by_the_config_of_an_ingredient(kind, architecture, pools, tmp_path):
    soup = tmp_path / "soup.safetensors"
    average_files([pools / kind / f"checkpoint-{i}" for i in range(3)], soup)
    export_soup(soup, "transformers", tmp_path / "out", network=f"transformers:{pools / kind}/checkpoint-0")
    loaded = getattr(transformers, architecture).from_pretrained(tmp_path / "out")
    assert loaded.num_labels == (3 if kind == "images" else 2)
    written = load_file(tmp_path / "out/model.safetensors")  # transformers' networks have newer names than its files
    for name, tensor in load_file(soup).items():
        assert torch.equal(written[name], tensor), name
    beside = "preprocessor_config.json" if kind == "images" else "tokenizer.json"
    assert (tmp_path / "out" / beside).exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_onnxruntime_gives_the_logits_of_a_classifier_of_transformers(kind, pools, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    source = pools / kind / "checkpoint-0"
    export_soup(source, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    known = json.loads((tmp_path / "out/preprocessing.json").read_text())
    if kind == "texts":
        tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(["a good film"], return_tensors="pt")
        model = transformers.BertForSequenceClassification.from_pretrained(source).eval()
        (logits,) = session.run(None, {"input_ids": tokens["input_ids"].numpy()})
        assert known["class_names"] == ["no", "yes"]
        torch.testing.assert_close(torch.from_numpy(logits), model(**tokens).logits, rtol=1e-4, atol=1e-4)
    else:
        pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
        model = transformers.ViTForImageClassification.from_pretrained(source).eval()
        (logits,) = session.run(None, {"images": pixels.numpy()})
        seen = (pixels / 255 - 0.5) / 0.5
        torch.testing.assert_close(torch.from_numpy(logits), model(pixel_values=seen).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        ("soup.safetensors", "timm", {}, "does not say of which network it is: type --network timm:NAME"),
        ("soup.safetensors", "timm", {"network": "test_vit"}, "type timm:NAME, open_clip:NAME or transformers:FOLDER"),
        ("soup.safetensors", "timm", {"network": "timm:test_vitt"}, "timm knows no network 'test_vitt'"),
        (
            "soup.safetensors",
            "timm",
            {"network": "timm:test_resnet"},
            "no head 'fc'.weight, which .* test_resnet has",
        ),
        ("soup.safetensors", "timm", {"network": "timm:test_vit2"}, "the soup is not of timm's test_vit2"),
        ("soup.safetensors", "timm", {"network": "timm:test_vit", "classes": ["a"]}, "1 names of classes were given"),
        ("soup.safetensors", "open_clip", {"network": "timm:test_vit"}, "it can go to timm or onnx"),
        ("soup.safetensors", "keras", {}, "--to keras: known are timm, open_clip, transformers, onnx"),
        ("open_clip/run0", "open_clip", {"classes": ["a"]}, "has no head"),
        ("texts/checkpoint-0", "transformers", {"classes": ["a"]}, "1 names of classes were given"),
        ("soup.safetensors", "transformers", {"network": "transformers:/nowhere/texts"}, "has no config.json"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case, pools, tmp_path):
    soup, library, options, words = case
    with pytest.raises(UserError, match=words):
        export_soup(pools / soup, library, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_soup(tmp_path / "soup.safetensors", "timm", tmp_path, network="timm:test_vit")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_with_other_outputs_than_the_soup_is_refused(pools, tmp_path, monkeypatch):
    from soups.export import timm as to_timm

    write = to_timm.write

    def wrong(network, folder):
        write(network, folder)
        state = load_file(folder / "model.safetensors")
        state["head.bias"][0] += 0.01  # of one class; the other outputs are the soup's
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(to_timm, "write", wrong)
    with pytest.raises(UserError, match=r"its outputs differ by 0\.01"):
        export_soup(pools / "soup.safetensors", "timm", tmp_path / "out", network="timm:test_vit")
    assert list(tmp_path.iterdir()) == []
