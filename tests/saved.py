"""Weight files for tests, in each of the formats that are read, and what a soup's file says of itself."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from soups.files.folders import INDEX


def save(folder, name, state, how="safetensors"):
    """Write a state dict as one file or as two shards; tied tensors only in .pt."""
    folder.mkdir(parents=True, exist_ok=True)
    if how == "pt":
        torch.save(state, folder / f"{name}.pt")
        return folder / f"{name}.pt"
    state = {key: tensor.clone().contiguous() for key, tensor in state.items()}
    if how == "safetensors":
        save_file(state, folder / f"{name}.safetensors")
        return folder / f"{name}.safetensors"
    shards = folder / name
    shards.mkdir(exist_ok=True)
    names = sorted(state)
    for i in range(2):
        save_file({key: state[key] for key in names[i::2]}, shards / f"part-{i}.safetensors")
    place = {key: f"part-{i}.safetensors" for i in range(2) for key in names[i::2]}
    (shards / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return shards


def record_in(path):
    """How a soup was made, as its safetensors file says."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["soup"])
