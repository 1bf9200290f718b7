"""Finished runs with random weights, one for each kind of network that can be exported."""

import json

import open_clip
import torch
from pools import moved
from readers import bert_folder, encoder_folder, t5_folder
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ResNetConfig, ResNetModel

from configs.schema import dump, load
from models.classifier import architecture
from soups.files.atomic import write_json, write_jsonl
from soups.files.weights import save_weights
from store.runs import RunFolder

SMALL = "a-small-clip"


def open_clip_file(folder):
    """A CLIP of open_clip, made known to it by name, and a file with its weights."""
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{SMALL}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{SMALL}.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model(SMALL).state_dict(), folder / "small.safetensors")
    return folder / "small.safetensors"


def clip_folder(folder):
    """A CLIPModel of transformers."""
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = part | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49}
    vision = part | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def resnet_folder(folder):
    """A ResNetModel of transformers."""
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


def network_of(kind, folder):
    """What is typed for a network of one of the libraries; of transformers there are an image network and a CLIP."""
    match kind:
        case "timm":
            return "demo", ["model=timm", "model.name=test_vit", "model.image_size=160"]
        case "open_clip":
            named = [f"model.name={SMALL}", f"model.weights={open_clip_file(folder)}", "model.templates=null"]
            return "demo", ["model=open_clip", "model.image_size=32", *named]
        case "dual" | "resnet":
            weights = (clip_folder if kind == "dual" else resnet_folder)(folder)
            sizes = ["model.image_size=32", "model.eval_resize=40", f"model.normalize={str(kind == 'dual').lower()}"]
            named = ["model.name=small", f"model.weights={weights}", "model.templates=null"]
            return "demo", ["model=transformers", *named, *sizes]
        case "text_encoder":
            weights = encoder_folder(folder, num_hidden_layers=1)
            return "demo_text", ["model=text_encoder", "model.name=small", f"model.weights={weights}"]
    weights = bert_folder(folder, num_hidden_layers=1) if kind == "masked_lm" else t5_folder(folder, num_layers=1)
    model = "bert_base" if kind == "masked_lm" else "t5_small"
    return "demo_text", [f"model={model}", f"model.weights={weights}", "optim.loss=likelihood"]


EMBEDDED = {"emoji_clip": "demo", "imagenet_lite0": "demo_imagenet_init"}


def finished_soup(kind, folder, *more):
    """A run of such a network with a soup called greedy, and the network with the soup's weights."""
    experiment, typed = (EMBEDDED[kind], []) if kind in EMBEDDED else network_of(kind, folder / "hub")
    config = load(experiment, *typed, *more, f"paths.runs={folder / 'runs'}")
    run = RunFolder.of(config)
    write_json(run.ingredient(0) / "config.json", dump(config))
    torch.manual_seed(1)
    network = architecture(config.model, config.task.size, config.task.answers).eval()
    network.load_state_dict(moved(network.state_dict(), 1, 0.1))
    digest = save_weights(run.soup("greedy") / "weights.safetensors", network.state_dict())
    done = {"drawn": {"optim.lr": 0.001}, "held_out": {"correct": 30, "n": 40}, "digest": "0", "status": "done"}
    for row in (1, 2):
        write_json(run.ingredient(row) / "done.json", done)
    parts = [{"row": row, "digest": "0", "weight": 0.5} for row in (1, 2)]
    soup = {"digest": digest, "recipe": "greedy", "ingredients": parts, "provenance": {"commit": "abc", "versions": {}}}
    write_json(run.soup("greedy") / "soup.json", soup)
    row = {"weights": digest, "split": config.task.test, "correct": 50, "n": 100, "top1": 0.5}
    write_jsonl(run.soup("greedy") / "scores.jsonl", [row | {"metric": "top1", "score": 0.5}])
    return run.soup("greedy"), network
