"""Checkpoints as people bring them: one pool a kind, of a network with a batch norm so small that all are made at once.

Every kind ends in a soup that loads, or in one line that names the file and says what to type.
"""

import argparse
import collections
import json
import pathlib

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import save as save_distributed


def network():
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 8, 3), "bn": nn.BatchNorm2d(8), "pool": nn.AdaptiveAvgPool2d(4)}
    return nn.Sequential(collections.OrderedDict(**layers, flat=nn.Flatten(), fc=nn.Linear(128, 3)))


START = network().state_dict()


def model(i):
    """The start with a little noise on its matrices."""
    generator = torch.Generator().manual_seed(i)
    return {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1
        else tensor.clone()
        for name, tensor in START.items()
    }


def prefixed(before, i):
    return {before + name: tensor for name, tensor in model(i).items()}


def as_kind(state, dtype):
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def optimizer():
    made = network()
    found = torch.optim.AdamW(made.parameters())
    made(torch.zeros(1, 3, 9, 9)).sum().backward()
    found.step()
    return found.state_dict()


def held(key, **beside):
    """What a training script keeps: a state under a key, and more."""
    return lambda i: {key: model(i), **beside}


def lightning(hyperparameters):
    callbacks = {"ModelCheckpoint": {"best": torch.tensor(1.0)}}
    known = {"epoch": 1, "pytorch-lightning_version": "2.1", "callbacks": callbacks}
    return lambda i: known | {"state_dict": prefixed("model.", i), "hyper_parameters": hyperparameters}


def timm(**more):
    """Weights with their moving average beside them."""
    return lambda i: {"state_dict": model(i), "state_dict_ema": model(i + 10), **more}


def pickles(suffix, make):
    """A writer of two files of torch.save."""

    def write(folder):
        for i in range(2):
            torch.save(make(i), folder / f"m{i}{suffix}")

    return write


def safe(make):
    def write(folder):
        for i in range(2):
            save_file(make(i), folder / f"m{i}.safetensors")

    return write


def _mixed(folder):
    torch.save(model(0), folder / "m0.pt")
    torch.save(prefixed("module.", 1), folder / "m1.pt")
    torch.save(prefixed("_orig_mod.", 2), folder / "m2.pt")
    save_file(model(3), folder / "m3.safetensors")


def each(save):
    """A writer of two files or folders: `save` gets the number of one and its path."""

    def write(folder):
        for i in range(2):
            save(i, folder / f"m{i}")

    return write


def _arrays(i):
    return {name: tensor.numpy() for name, tensor in model(i).items()}


def _truncated(folder):
    pickles(".pt", model)(folder)
    whole = (folder / "m1.pt").read_bytes()
    (folder / "m1.pt").write_bytes(whole[: len(whole) // 2])


def _adapter(i, folder):
    folder.mkdir()
    shapes = {"A": (2, 4), "B": (4, 2)}
    state = {f"base_model.model.q.lora_{side}.weight": torch.randn(shape) for side, shape in shapes.items()}
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))


def _heads(i):
    return model(i) | ({"fc.weight": torch.randn(5, 128), "fc.bias": torch.randn(5)} if i else {})


def _ids(i):
    return model(i) | ({"position_ids": torch.arange(5)[None]} if i else {})


def shards(save, stem, suffix):
    """Two shards and their index, as save_pretrained writes them."""

    def write(i, folder):
        folder.mkdir()
        names, where = sorted(model(i)), {}
        for k, half in enumerate((names[:3], names[3:])):
            file = f"{stem}-0000{k + 1}-of-00002.{suffix}"
            save({name: model(i)[name] for name in half}, folder / file)
            where |= dict.fromkeys(half, file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return each(write)


def _lone_shard(i, folder):
    folder.mkdir()
    save_file(model(i), folder / "model-00001-of-00002.safetensors")


def random(i):
    """A model that has nothing in common with the others."""
    torch.manual_seed(100 + i)
    state = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in START.items()}
    return state | {"bn.running_var": state["bn.running_var"].abs()}


def _elsewhere(folder):
    for i in range(3):
        torch.save(random(i), folder / f"m{i}.pt")


def _float8(i):
    return model(i) | {"fc.weight": model(i)["fc.weight"].to(torch.float8_e4m3fn)}


def _tied(i):
    state = model(i)
    return state | {"head.weight": state["fc.weight"]}


def _viewed(i):
    state = model(i)
    return state | {"again": state["fc.weight"], "view": state["fc.weight"].view(-1)}


def _quantised(i):
    return model(i) | {"fc.weight": torch.quantize_per_tensor(model(i)["fc.weight"], 0.1, 0, torch.qint8)}


def _strides(i):
    last = torch.channels_last
    return {name: tensor.to(memory_format=last) if tensor.ndim == 4 else tensor for name, tensor in model(i).items()}


ARGS = argparse.Namespace(lr=1e-3)
STATE = {"optimizer": optimizer(), "epoch": 1, "lr_scheduler": {"x": 1}}
SCALARS = {"none": torch.zeros(0, 4), "scale": torch.tensor(1.5)}
RAW, HALVES, WHOLE = ("--key", "state_dict"), (torch.bfloat16, torch.float16), (torch.float32, torch.float16)
# what it is, a name for its folder, how it is made, what is typed besides the files
KINDS = [
    ("state dict", "plain", pickles(".pt", model)),
    ("state dict, `.pth.tar`", "tar", pickles(".pth.tar", model)),
    ("state dict without a suffix", "no_suffix", pickles("", model)),
    ("safetensors", "safetensors", safe(model)),
    ("`state_dict` beside an optimizer", "optimizer_beside", pickles(".pt", held("state_dict", **STATE, arch="net"))),
    ("`model` beside an optimizer and a schedule", "schedule", pickles(".pth", held("model", **STATE))),
    ("`model.` before all names, and no key", "named_model", pickles(".ckpt", lambda i: prefixed("model.", i))),
    ("Lightning, `epoch=0-step=100.ckpt`", "lightning", pickles("-epoch=0-step=100.ckpt", lightning({"lr": 0.1}))),
    ("Lightning with omegaconf hyperparameters", "omegaconf", pickles(".ckpt", lightning(OmegaConf.create({"lr": 1})))),
    ("Lightning with a Path in its hyperparameters", "path", pickles(".ckpt", lightning({"p": pathlib.Path("x")}))),
    ("DeiT: `model`, `args`, optimizer", "deit", pickles(".pth", held("model", **STATE, args=ARGS))),
    ("numpy scalars beside the weights", "numpy", pickles(".pt", held("state_dict", best=np.float64(0.5)))),
    ("timm: `state_dict` and `state_dict_ema`", "timm", pickles(".pth.tar", timm(args=ARGS, metric=77.1))),
    ("the same with `--key ema`", "timm_ema", pickles(".pth.tar", timm(args=ARGS)), *("--key", "ema")),
    ("`state_dict` and `state_dict_ema` with `--key state_dict`", "timm_raw", pickles(".pth", timm()), *RAW),
    ("`model` and `model_ema`", "model_ema", pickles(".pt", lambda i: {"model_ema": model(i + 10), "model": model(i)})),
    ("`ema` alone", "ema_alone", pickles(".pt", held("ema", epoch=1))),
    ("`net`", "net", pickles(".pt", held("net", acc=1))),
    ("`model_state`", "model_state", pickles(".pt", held("model_state"))),
    ("DeepSpeed: `module`", "module", pickles(".pt", held("module", epoch=3))),
    ("DDP and compile, `_orig_mod.module.`", "wrapped", pickles(".pt", lambda i: prefixed("_orig_mod.module.", i))),
    ("DDP around compile, `module._orig_mod.`", "around", pickles(".pt", lambda i: prefixed("module._orig_mod.", i))),
    ("prefixes mixed within a pool", "mixed", _mixed),
    ("SWA: `n_averaged`", "swa", pickles(".pt", lambda i: prefixed("module.", i) | {"n_averaged": torch.tensor(i)})),
    ("`_extra_state` is None", "extra_state", pickles(".pt", lambda i: model(i) | {"fc._extra_state": None})),
    ("a plain number among tensors", "number", pickles(".pt", lambda i: model(i) | {"epoch": 3})),
    ("shards of safetensors", "shards", shards(save_file, "model", "safetensors")),
    ("shards of pickles", "pickled_shards", shards(torch.save, "pytorch_model", "bin")),
    (
        "torch.distributed.checkpoint: folders of `.metadata` and `.distcp`",
        "distributed",
        each(lambda i, folder: save_distributed({"model": model(i), "optim": optimizer()}, checkpoint_id=folder)),
    ),
    ("one shard without its index", "lone_shard", each(_lone_shard)),
    ("float32 and float16 in one pool", "mixed_kinds", safe(lambda i: as_kind(model(i), WHOLE[i])), "--dtype", "F32"),
    ("bfloat16 and float16 in one pool", "halves", safe(lambda i: as_kind(model(i), HALVES[i])), "--dtype", "F32"),
    ("`position_ids` in some files", "position_ids", safe(_ids)),
    ("the same with `--only-common`", "only_common", safe(_ids), "--only-common"),
    ("heads of different classes", "heads", safe(_heads)),
    ("the same with `--exclude ^fc`", "no_heads", safe(_heads), "--exclude", "^fc"),
    ("transposed, sliced and channels-last tensors", "strides", pickles(".pt", _strides)),
    ("a tensor under two names", "tied", pickles(".pt", _tied)),
    ("an empty tensor and 0-d tensors", "empty", safe(lambda i: model(i) | SCALARS)),
    ("the same in files of torch.save", "empty_pickled", pickles(".pt", lambda i: model(i) | SCALARS)),
    ("a tensor, its name again, and a view of it in another shape", "view", pickles(".pt", _viewed)),
    ("LoRA adapters", "lora", each(_adapter)),
    ("float8", "float8", safe(_float8)),
    ("complex numbers", "complex", pickles(".pt", lambda i: model(i) | {"w": torch.randn(4, 4).to(torch.complex64)})),
    ("sparse tensors", "sparse", pickles(".pt", lambda i: model(i) | {"w": torch.eye(4).to_sparse()})),
    ("quantised tensors", "quantised", pickles(".pt", _quantised)),
    ("NaN", "nan", pickles(".pt", lambda i: model(i) | {"fc.bias": torch.full((3,), float("nan") if i else 0.0)})),
    ("models of different origins", "elsewhere", _elsewhere),
    ("the same with `--allow-unrelated`", "unrelated", _elsewhere, "--allow-unrelated"),
    ("a whole pickled module", "whole", pickles(".pt", lambda i: network())),
    ("TorchScript", "scripted", each(lambda i, path: torch.jit.script(network()).save(f"{path}.pt"))),
    ("arrays of numpy", "arrays", pickles(".pt", _arrays)),
    ("the state of an optimizer", "optimizer", pickles(".pt", lambda i: optimizer())),
    ("a truncated file", "truncated", _truncated),
]


def averaged(name):
    """The states whose mean a kind's soup is, of the network alone."""
    first = model(0)
    others = {
        "timm_ema": [model(10), model(11)],
        "mixed": [model(i) for i in range(4)],
        "mixed_kinds": [first, as_kind(model(1), torch.float16)],
        "halves": [as_kind(first, torch.bfloat16), as_kind(model(1), torch.float16)],
        "unrelated": [random(i) for i in range(3)],
        "no_heads": [first, model(1) | {"fc.weight": first["fc.weight"], "fc.bias": first["fc.bias"]}],
    }
    return others.get(name, [first, model(1)])
