"""Towers and heads of three libraries give the features and zero-shot heads of the libraries' own, from local files."""

import copy
import json
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AlignConfig,
    AlignModel,
    CLIPConfig,
    CLIPModel,
    EfficientNetImageProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from configs.errors import UserError
from configs.schema import load
from configs.training import Model
from finetune.dist import blocks, wrap
from finetune.train import ONE_PROCESS
from models.backbones import mean_and_std
from models.classifier import DepthwiseConv2d, architecture, pretrained, random_head, speed_up_depthwise

CLIP = "a-clip-of-three-blocks"
NAMES = ("red fox", "tea pot", "grand piano")
WORDS = ["[PAD]", "[EOS]", "a", "photo", "of", "red", "fox", "tea", "pot", "grand", "piano", "the", ".", "one", "bad"]
ANY = Model(kind="timm", name="test_vit.r160_in1k", image_size=160, normalize=False, head="random", probe_c=(1,))


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """A small CLIP, made known to open_clip by name, and a file with its weights."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    (folder / f"{CLIP}.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / f"{CLIP}.json")
    torch.manual_seed(0)
    clip = open_clip.create_model(CLIP)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return clip.eval(), folder / "open_clip_model.safetensors"


def clip_model(path, **changes):
    values = {"kind": "open_clip", "name": CLIP, "weights": path, "image_size": 64, "normalize": True}
    return Model(**(values | {"head": "zero_shot", "templates": "name", "probe_c": (1,)} | changes))


def test_an_open_clip_file_gives_open_clips_own_features_and_zero_shot_logits(clip_file, images):
    clip, path = clip_file
    classifier = pretrained(clip_model(path, templates="openai"), NAMES).eval()
    seen = (images.float() / 255 - classifier.mean / 255) / (classifier.std / 255)
    assert classifier.mean.flatten().tolist() == pytest.approx([255 * m for m in (0.48145466, 0.4578275, 0.40821073)])
    with torch.no_grad():
        features = clip.encode_image(seen, normalize=True)
        torch.testing.assert_close(classifier.features(images), features, atol=1e-5, rtol=1e-4)
        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
        head = open_clip.build_zero_shot_classifier(clip, open_clip.get_tokenizer(CLIP), NAMES, templates)
        expected = clip.logit_scale.exp() * features @ head
        torch.testing.assert_close(classifier(images), expected, atol=1e-3, rtol=1e-4)


def test_other_templates_give_another_head_and_features_may_keep_their_norm(clip_file, images):
    kinds = ({"templates": "emoji"}, {"templates": "name", "normalize": False})
    with_unit, with_long = (pretrained(clip_model(clip_file[1], **kind), NAMES).eval() for kind in kinds)
    assert not torch.allclose(with_unit.head.weight, with_long.head.weight)
    with torch.no_grad():
        unit, long = with_unit.features(images), with_long.features(images)
    torch.testing.assert_close(F.normalize(long, dim=-1), unit)
    assert not torch.allclose(long.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize(("name", "activation"), [("ViT-B-32-quickgelu", "QuickGELU"), ("ViT-B-32", "GELU")])
def test_openai_weights_meet_the_activation_that_they_were_trained_with(name, activation):
    with torch.device("meta"):
        found = architecture(clip_model(None, name=name, pretrained="openai", image_size=224), 1000)
    assert {type(module).__name__ for module in found.modules() if "GELU" in type(module).__name__} == {activation}
    assert sum(parameter.numel() for parameter in found.tower.parameters()) == 87_849_216  # the visual half


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    torch.manual_seed(0)
    network = timm.create_model("test_vit.r160_in1k", pretrained=False)
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(network.state_dict(), path)
    return network.eval(), path


def test_a_timm_file_gives_timms_own_pooled_features_under_its_own_mean(timm_file):
    network, path = timm_file
    classifier = pretrained(replace(ANY, weights=path), NAMES).eval()
    images = torch.randint(0, 256, (2, 3, 160, 160), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        seen = (images / 255 - mean) / std
        expected = network.forward_head(network.forward_features(seen), pre_logits=True)
        torch.testing.assert_close(classifier.features(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["lcnet_050", "ghostnet_050", "vgg11", "mobilenetv3_small_050", "hgnetv2_b0"])
def test_a_head_is_as_wide_as_what_comes_out_where_the_last_layer_is_not(name):
    with torch.device("meta"):
        network = architecture(replace(ANY, name=name, image_size=64), 3)
        assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "pretrained", "mean"),
    [
        ("ViT-B-16-SigLIP", None, (0.5, 0.5, 0.5)),
        ("MobileCLIP-S1", None, (0.0, 0.0, 0.0)),
        ("ViT-B-32", None, open_clip.OPENAI_DATASET_MEAN),
        ("ViT-L-14", None, open_clip.OPENAI_DATASET_MEAN),  # one of its weights had other statistics
        ("ViT-L-14", "laion2b_s32b_b82k", (0.5, 0.5, 0.5)),
        ("ViT-S-32-alt", None, open_clip.OPENAI_DATASET_MEAN),  # has no published weights
    ],
)
def test_images_are_normalised_as_the_weights_or_else_all_published_ones_want_it(name, pretrained, mean):
    assert mean_and_std(name, pretrained)[0] == mean


def test_a_random_head_is_small_and_the_same_for_the_same_sizes(timm_file):
    _, path = timm_file
    heads = [pretrained(replace(ANY, weights=path), NAMES).head for _ in range(2)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert 0.015 < heads[0].weight.std() < 0.025
    assert heads[0].bias.abs().max() == 0
    assert not torch.equal(random_head(4, 8)[0][:3], random_head(3, 8)[0])


def saved(folder, network, processor, *, text):
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    if text:
        words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="."))
        words.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]").save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def hub_clip(folder):
    vision = SMALL | {"image_size": 64, "patch_size": 16}
    text = SMALL | {"vocab_size": len(WORDS), "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    processor = ViTImageProcessor(do_normalize=True, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    return network.eval(), saved(folder, network, processor, text=True)


def hub_align(folder):
    vision = {"image_size": 64, "hidden_dim": 320, "initializer_range": 0.5}
    vision |= {"width_coefficient": 0.1, "depth_coefficient": 0.1}
    text = SMALL | {"vocab_size": len(WORDS), "pad_token_id": 0}
    network = AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=32))
    processor = EfficientNetImageProcessor(do_normalize=False, rescale_offset=True)
    return network.eval(), saved(folder, network, processor, text=True)


def hub_vit(folder):
    network = ViTModel(ViTConfig(**SMALL, image_size=64, patch_size=16))
    return network.eval(), saved(folder, network, ViTImageProcessor(), text=False)


def hub_model(folder, **changes):
    values = {"kind": "transformers", "name": "owner/name", "weights": folder, "image_size": 64, "normalize": True}
    return Model(**(values | {"head": "zero_shot", "templates": "name", "probe_c": (1,)} | changes))


@pytest.mark.parametrize(
    ("make", "mean", "std"), [(hub_clip, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), (hub_align, [0.5] * 3, [0.5] * 3)]
)
def test_a_dual_encoder_of_the_hub_gives_its_similarities_under_its_preprocessing_and_leaves_its_text_tower_behind(
    make, mean, std, tmp_path, images
):
    torch.manual_seed(0)
    network, folder = make(tmp_path)
    classifier = pretrained(hub_model(folder), NAMES).eval()
    assert not [name for name in classifier.state_dict() if "text" in name or "scale" in name or "temperature" in name]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = tokenizer(list(NAMES), padding="max_length", max_length=64, return_tensors="pt")
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
    with torch.no_grad():
        expected = network(**tokens, pixel_values=(images / 255 - mean) / std).logits_per_image
        torch.testing.assert_close(classifier(images), expected, atol=1e-4, rtol=1e-4)


def test_a_vision_network_of_the_hub_gives_its_pooled_output_and_has_no_zero_shot_head(tmp_path, images):
    network, folder = hub_vit(tmp_path)
    classifier = pretrained(hub_model(folder, head="random", templates=None, normalize=False), NAMES).eval()
    with torch.no_grad():
        expected = network(pixel_values=(images.float() - classifier.mean) / classifier.std).pooler_output
        torch.testing.assert_close(classifier.features(images), expected)
    with pytest.raises(UserError, match=r"owner/name has no text tower: set model.templates=null"):
        pretrained(hub_model(folder), NAMES)


def test_an_architecture_has_the_tensors_of_the_pretrained_model(clip_file, timm_file, tmp_path):
    _, folder = hub_clip(tmp_path)
    for model in (clip_model(clip_file[1]), replace(ANY, weights=timm_file[1]), hub_model(folder)):
        blank, full = architecture(model, len(NAMES)).state_dict(), pretrained(model, NAMES).state_dict()
        assert {name: tensor.shape for name, tensor in blank.items()} == {n: t.shape for n, t in full.items()}


@pytest.mark.parametrize(("kind", "depth"), [("open_clip", 3), ("timm", 6), ("transformers", 3)])
def test_recomputed_activations_give_the_same_gradients_block_by_block(kind, depth, clip_file, timm_file, tmp_path):
    model = {"open_clip": clip_model(clip_file[1]), "timm": replace(ANY, weights=timm_file[1])}.get(kind)
    model = model or hub_model(hub_clip(tmp_path)[1])
    images = torch.randint(0, 256, (2, 3, model.image_size, model.image_size))
    compute, gradients, calls = load("demo_tiny").compute, [], []
    for recompute in (False, True):
        classifier = pretrained(model, NAMES)
        network = wrap(classifier, replace(compute, gradient_checkpointing=recompute), ONE_PROCESS).train()
        parts = blocks(classifier)
        assert len(parts) == depth
        count = [0]
        inner = next(module for module in parts[1].modules() if isinstance(module, torch.nn.LayerNorm))
        inner.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        network(images).logsumexp(dim=1).sum().backward()
        gradients.append({n: p.grad for n, p in classifier.named_parameters() if p.grad is not None})
        calls.append(count[0])
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    "shape", [(2, 3, 1), (2, 5, 1), (3, 5, 1), (4, 5, 2), (5, 7, 1), (9, 7, 2), (9, 5, 1), (5, 3, 1)]
)
@pytest.mark.parametrize("wider", [0, 2])
def test_depthwise_convolutions_of_small_images_keep_their_results_and_gradients(shape, wider):
    torch.manual_seed(0)
    size, kernel, stride = shape
    first = torch.nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6).double()
    second = copy.deepcopy(first)
    speed_up_depthwise(second)
    assert type(second) is DepthwiseConv2d
    images = torch.randn(3, 6, size, size + wider, dtype=torch.float64)
    found = []
    for conv in (first, second):
        seen = images.clone().requires_grad_()
        out = conv(seen)
        out.square().sum().backward()
        found.append([out.detach(), seen.grad, conv.weight.grad, conv.bias.grad])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_depthwise_convolutions_in_bfloat16_are_as_they_were():
    conv = torch.nn.Conv2d(6, 6, 5, padding=2, groups=6).bfloat16()
    images = torch.randn(3, 6, 4, 4).bfloat16()
    expected = conv(images)
    speed_up_depthwise(conv)
    assert torch.equal(conv(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv.float()(images.float())
    out.square().sum().backward()
    assert (out.dtype, conv.weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_only_square_depthwise_convolutions_that_pad_by_their_radius_are_replaced():
    conv = torch.nn.Conv2d
    kept = [
        conv(4, 4, 3, padding=1),
        conv(4, 4, 3, padding=1, groups=2),
        conv(4, 4, 3, groups=4),
        conv(4, 4, (3, 5), padding=(1, 2), groups=4),
        conv(4, 4, 3, padding=2, dilation=2, groups=4),
        conv(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
        conv(4, 4, 3, stride=(1, 2), padding=1, groups=4),
        conv(4, 8, 3, padding=1, groups=4),
    ]
    network = torch.nn.Sequential(*kept, conv(4, 4, 3, padding=1, groups=4))
    speed_up_depthwise(network)
    assert [type(layer) is DepthwiseConv2d for layer in network] == [False] * len(kept) + [True]


@pytest.mark.parametrize("depth", [2, 3])
def test_no_block_of_a_shallow_network_is_inside_another(depth):
    def mlp():
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))

    repeated = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.LayerNorm(4), mlp()) for _ in range(depth)])
    assert blocks(torch.nn.Sequential(torch.nn.Linear(3, 4), repeated)) == list(repeated)
    stages = torch.nn.ModuleList([torch.nn.Sequential(mlp(), mlp()) for _ in range(2)])  # two lists of two in two
    assert blocks(stages) == list(stages)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "open_clip", "name": "ViT-Z-99"}, "open_clip knows no model.name=ViT-Z-99"),
        ({"kind": "timm", "name": "vit_zzz"}, "timm knows no model.name=vit_zzz"),
        ({"weights": "nowhere.safetensors"}, "model.weights=nowhere.safetensors: no such file or folder"),
        ({"kind": "open_clip", "name": "ViT-B-32", "pretrained": "mine"}, "no model.pretrained=mine of ViT-B-32, only"),
    ],
)
def test_wrong_names_and_files_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        pretrained(replace(ANY, **changes), NAMES)


@pytest.mark.parametrize("kind", ["open_clip", "timm"])
def test_a_truncated_or_foreign_file_is_named(kind, clip_file, timm_file, tmp_path):
    right, wrong = (clip_file[1], timm_file[1]) if kind == "open_clip" else (timm_file[1], clip_file[1])
    model = clip_model(None) if kind == "open_clip" else ANY
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(right.read_bytes()[:5000])
    for path in (cut, wrong):
        with pytest.raises(UserError, match=rf"model.weights=.*{path.name} is not a whole file of {kind} model"):
            pretrained(replace(model, weights=path), NAMES)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("timm/vit_base_patch32_clip_224.openai", {"kind": "open_clip", "name": "ViT-B-32-quickgelu"}),
        ("timm/vit_base_patch32_224.augreg_in21k", {"kind": "timm", "name": "vit_base_patch32_224.augreg_in21k"}),
        ("kakaobrain/align-base config.json", {"kind": "transformers", "name": "kakaobrain/align-base"}),
    ],
)
def test_without_internet_the_error_says_what_to_download_and_where_to_name_it(file, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    published = {"pretrained": "openai"} if settings["kind"] == "open_clip" else {}
    with pytest.raises(UserError, match=rf"`hf download {file}.*then set model\.weights=FOLDER"):
        pretrained(replace(ANY, image_size=224, **settings, **published), NAMES)
