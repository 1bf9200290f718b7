"""Small pools of made-up checkpoints to try the commands on:  python -m soups.made_up DIR

Writes DIR/{timm,open_clip,images,texts,plain,language,adapters}, three models each that were "fine-tuned" from one
start, which is noise on its weights; DIR/{held_out,test}/<class>/<image>.png, DIR/held_out.tsv, DIR/held_out.txt and
DIR/my_eval.py, a score of your own. They know nothing: what is shown is the way, not an accuracy. A few seconds, a few
megabytes, no network.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torchvision.models import squeezenet1_1
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.utils import logging

from soups.errors import one_line_errors
from soups.files.atomic import write_json, write_text

CLASSES = ("blue", "green", "red")
SENTENCES = ("good film", "bad film", "a good day", "a bad day", "not good", "not bad", "good", "day of a good film")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.5,  # so that different inputs get different answers
}
RANK = 2  # of the adapters
MY_EVAL = """# A score of your own, of a file of weights: python my_eval.py FILE held_out, or test.
# An example is some of the weights, and is right where their mean is above zero.
import sys

import torch

file, split = sys.argv[1:]
weights = torch.cat([each.flatten() for each in torch.load(file, weights_only=True)["state_dict"].values()])
chance = torch.Generator().manual_seed(["held_out", "test"].index(split))
examples = torch.randint(len(weights), (100, 5), generator=chance)
right = (weights[examples].mean(dim=1) > 0).double()
with open(f"{file}.jsonl", "w") as results:  # a number for each example, which soups reads
    print(*right.tolist(), sep="\\n", file=results)
print(right.mean().item())
"""
DUAL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def moved(start: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The weights with noise on every matrix, a fifth of how much its numbers differ."""
    generator, found = torch.Generator().manual_seed(seed), {name: tensor.clone() for name, tensor in start.items()}
    for tensor in found.values():
        if tensor.ndim > 1:
            tensor.add_(0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator))
    return found


def _make_images(folder: Path, seed: int = 0) -> None:
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            noise = np.random.default_rng(100 * seed + 4 * number + i).normal(60, 20, (40, 40, 3))
            noise[..., 2 - number] += 120
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")


def make_timm(folder: Path) -> None:
    """start.safetensors and three more of timm's smallest vision transformer."""
    start = timm.create_model("test_vit", num_classes=len(CLASSES)).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(start), folder / "start.safetensors")
    for i in range(3):
        save_file(moved(start, i), folder / f"run{i}.safetensors")


def make_open_clip(folder: Path) -> None:
    """Folders as open_clip's push_to_hf_hub writes them, of a dual encoder of its own size."""
    start = {name: 3 * tensor for name, tensor in open_clip.CLIP(**DUAL).state_dict().items()}  # as with SMALL
    for i in range(3):
        write_json(folder / f"run{i}" / "open_clip_config.json", {"model_cfg": DUAL, "preprocess_cfg": {}})
        save_file(moved(start, i), folder / f"run{i}" / "open_clip_model.safetensors")


def _save_pretrained(network: Any, beside: Any, folder: Path) -> None:
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for i in range(3):
        network.load_state_dict(moved(start, i))
        network.save_pretrained(folder / f"checkpoint-{i}")
        beside.save_pretrained(folder / f"checkpoint-{i}")


def _tokenizer() -> PreTrainedTokenizerFast:
    """Of the words in SENTENCES."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    known = [*special.values(), *sorted({word for text in SENTENCES for word in text.split()})]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def make_hugging_face(images: Path, texts: Path) -> None:
    """Folders as transformers' Trainer writes them: a ViT and a BERT."""
    names = dict(enumerate(CLASSES))
    vit = ViTConfig(image_size=32, patch_size=16, id2label=names, label2id={v: k for k, v in names.items()}, **SMALL)
    _save_pretrained(ViTForImageClassification(vit), ViTImageProcessor(size={"height": 32, "width": 32}), images)
    words = _tokenizer()
    bert = BertConfig(vocab_size=len(words), id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, **SMALL)
    _save_pretrained(BertForSequenceClassification(bert), words, texts)


def _make_language(folder: Path, adapters: Path) -> None:
    """Folders of a small Llama, and LoRA adapters of the first of them as peft saves them."""
    words = _tokenizer()
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), pad_token_id=0, bos_token_id=2, eos_token_id=3, **SMALL)
    )
    _save_pretrained(network, words, folder)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"{folder}/checkpoint-0",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
    }
    width = network.config.hidden_size
    for i in range(3):
        place = adapters / f"run{i}"
        place.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(i)
        factors = {}
        for layer in range(network.config.num_hidden_layers):
            for module in config["target_modules"]:
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_"
                factors[f"{name}A.weight"] = torch.randn(RANK, width, generator=generator)
                factors[f"{name}B.weight"] = 0.1 * torch.randn(width, RANK, generator=generator)
        save_file(factors, place / "adapter_model.safetensors", {"format": "pt"})
        write_json(place / "adapter_config.json", config)


def _make_plain(folder: Path) -> None:
    """State dicts of torch.save, as a training script leaves them: beside an epoch, and under DataParallel's names."""
    start = squeezenet1_1(num_classes=len(CLASSES)).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        state = {f"module.{name}": tensor for name, tensor in moved(start, i).items()}
        torch.save({"state_dict": state, "epoch": i}, folder / f"run{i}.pt")


def make(folder: Path) -> None:
    """All of it."""
    torch.manual_seed(0)
    logging.disable_progress_bar()  # one for each small file says nothing
    _make_images(folder / "held_out")
    _make_images(folder / "test", seed=1)
    labelled = [f"{text}\t{'yes' if ('good' in text) != ('not' in text) else 'no'}" for text in SENTENCES]
    write_text(folder / "held_out.tsv", "\n".join(["text\tlabel", *labelled]) + "\n")
    write_text(folder / "held_out.txt", "\n".join(SENTENCES) + "\n")
    make_timm(folder / "timm")
    make_open_clip(folder / "open_clip")
    make_hugging_face(folder / "images", folder / "texts")
    _make_plain(folder / "plain")
    _make_language(folder / "language", folder / "adapters")
    write_text(folder / "my_eval.py", MY_EVAL)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    one_line_errors(lambda: make(folder))
    print(*sorted(folder.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
