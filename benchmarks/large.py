"""Soups of checkpoints of 7 B parameters, ours beside mergekit:  python -m benchmarks.large [--folder DIR]

Four folders with a config.json and bfloat16 shards, as save_pretrained writes them, in the shapes of Llama 7B (6.7 B
parameters, 13.5 GB): two of them hold random bits, the other two are further names (hard links) of these. Each recipe
is a command, a process of its own that writes a folder of shards; `greedy` takes two models and a score that costs
nothing, so that what is measured is the reading, one mixture for the score and the soup. Every command runs twice:

  cold  with the files out of the page cache, by /proc/sys/vm/drop_caches where that can be written (as root), else by
        posix_fadvise for each file
  warm  right after it, with what of the files the memory holds

Peak anonymous memory is the sum of RssAnon over the command and all processes below it, looked at every 5 ms, and
rather too large: a process that was just forked counts with what it shares. The bar is 300 MiB. mergekit merges the
same folders from an environment of its own, which --mergekit-python names; it has no greedy recipe.

At the end the folder is deleted, unless --keep says otherwise. Writes results/measured/bench_large.csv, or the file
named by --out.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.run import ROOT, Options, benchmark, run
from benchmarks.soups import MERGEKIT_PYTHON, OURS, version_of_mergekit
from soups.errors import UserError
from soups.files.atomic import write_json
from soups.files.checkpoints import Entry, in_file_order, streamed
from soups.files.folders import INDEX

DROP = Path("/proc/sys/vm/drop_caches")
SHARDS = 3
RECIPES = ("uniform", "arithmetic", "greedy")


@cache
def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama by name: of width 4096 the 32 layers of Llama 7B, narrower ones have fewer in proportion."""
    with torch.device("meta"):
        return {
            name: tuple(each.shape)
            for name, each in LlamaForCausalLM(LlamaConfig(**config(width))).state_dict().items()
        }


def parameters(width: int) -> int:
    """How many numbers a Llama of this width has."""
    return sum(map(prod, shapes(width).values()))


def width_of(number: float) -> int:
    """The width of the largest Llama with about so many numbers, a multiple of 128: 4096 of 7e9."""
    return 128 * max(1, int((number * 128 / 12.0625) ** (1 / 3) / 128))  # nearly all stand in the layers


def config(width: int) -> dict[str, Any]:
    """config.json as transformers writes it."""
    heads = max(1, width // 128)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
        "hidden_size": width,
        "intermediate_size": 43 * width // 16,
        "vocab_size": 125 * width // 16,
        "num_hidden_layers": heads,
    }


def make_model(folder: Path, width: int, seed: int) -> None:
    """Write a folder of shards: numbers of either sign, 1/128 to 1/64 in size, whose last 3 bits are this model's."""
    entries = {name: Entry("BF16", shape) for name, shape in shapes(width).items()}
    total, start, moved = parameters(width), np.random.default_rng(0), np.random.default_rng(seed)
    shards: list[dict[str, Entry]] = [{} for _ in range(SHARDS)]
    before = 0
    for name in in_file_order(entries):
        shards[before * SHARDS // total][name] = entries[name]
        before += entries[name].size
    files = [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    for file, part in zip(files, shards, strict=True):
        with streamed(folder / file, part, lambda: {"format": "pt"}) as write:
            for name, entry in part.items():
                for first in range(0, entry.size, 1 << 22):
                    size = 2 * min(1 << 22, entry.size - first)
                    same = np.frombuffer(start.bytes(size), np.uint16) & 0x8078  # sign and the first of 7 fraction bits
                    write(name, first, same | np.frombuffer(moved.bytes(size), np.uint16) & 7 | 0x3C00)
    places = {name: file for file, part in zip(files, shards, strict=True) for name in part}
    write_json(folder / INDEX, {"metadata": {"total_size": 2 * total}, "weight_map": places})
    write_json(folder / "config.json", config(width))  # last: what has one is whole


def make_pool(folder: Path, width: int) -> list[Path]:
    """Write what is not there yet of two models and two further names of theirs."""
    paths = [folder / f"width_{width}" / f"run{i}" for i in range(4)]
    for i, path in enumerate(paths):
        if (path / "config.json").exists():
            continue
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        if i < 2:
            make_model(path, width, i + 1)
        else:
            for file in paths[i - 2].iterdir():
                (path / file.name).hardlink_to(file)
    return paths


def out_of_the_cache(paths: Sequence[Path], *, drop: bool) -> str:
    """Take files out of the page cache, and return how."""
    os.sync()  # a page that is not written yet stays
    if drop:
        DROP.write_text("1\n")
        return "drop_caches"
    for file in (file for path in paths for file in path.iterdir()):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "posix_fadvise"


def command(contender: str, recipe: str, paths: Sequence[Path], out: Path, mergekit: Path | None) -> list[str]:
    """How a contender is started: the mean, or the first model plus 0.3 of what each other one changed."""
    if contender == OURS:
        more = {
            "uniform": [*paths],
            "arithmetic": [*paths[1:], "--init", paths[0], "--scales", ",".join(["0.3"] * len(paths[1:]))],
            "greedy": [*paths[:2], "--score", "wc -c < {soup}/config.json", "--goal", "max"],
        }
        return [sys.executable, "-m", "soups", recipe, *map(str, more[recipe]), "--out", str(out)]
    assert mergekit is not None
    models: list[dict[str, Any]] = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
    method: dict[str, Any] = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    if recipe == "arithmetic":
        models = [{"model": str(path), "parameters": {"weight": 0.3}} for path in paths[1:]]
        method |= {"merge_method": "task_arithmetic", "base_model": str(paths[0]), "models": models}
    settings = out.with_suffix(".yaml")
    settings.write_text(json.dumps(method))  # JSON is YAML too
    return [str(mergekit.with_name("mergekit-yaml")), str(settings), str(out), "--no-copy-tokenizer"]


@contextmanager
def room(work: Path, width: int, *, keep: bool) -> Iterator[None]:
    """A folder for what is measured, which is deleted in the end: two models and, while a soup is cut, two more."""
    needed = 4 * 2 * parameters(width)
    there = sum(file.stat().st_size for file in work.rglob(f"width_{width}/run[01]/*.safetensors"))
    free = shutil.disk_usage(next(place for place in (work, *work.parents) if place.exists())).free
    if free + there < needed:
        raise UserError(
            f"{work}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: name another disk by --folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not keep:
            shutil.rmtree(work)


def rows_of(work: Path, width: int, mergekit: Path | None, *, drop: bool) -> list[dict[str, Any]]:
    """A row for each contender, recipe and state of the page cache."""
    paths, rows = make_pool(work, width), []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for recipe in RECIPES:
        for contender in (OURS, "mergekit") if mergekit and recipe != "greedy" else (OURS,):
            for state in ("cold", "warm"):
                out = work / f"out_{contender}"
                how = out_of_the_cache(paths, drop=drop) if state == "cold" else ""
                found = run(command(contender, recipe, paths, out, mergekit))
                shutil.rmtree(out)
                row = {"contender": contender, "recipe": recipe, "models": 2 if recipe == "greedy" else len(paths)}
                row |= {"parameters": parameters(width), "state": state, "cold_by": how}
                row |= {"seconds": round(found.seconds, 2), "peak_anonymous_mib": round(found.anonymous, 1)}
                rows.append(row | {"memory_mib": memory >> 20, "mergekit": version_of_mergekit(mergekit)})
                print(f"{recipe}, {contender}, {state}: {found.seconds:.1f} s, {found.anonymous:.0f} MiB", flush=True)
    return rows


def measured(options: Options) -> list[dict[str, Any]]:
    """The rows, in a folder that goes at the end."""
    work, mergekit = options.folder.resolve() / "bench_large", options.mergekit_python
    width = width_of(options.parameters)
    drop = os.access(DROP, os.W_OK) if options.cold is None else options.cold == "drop_caches"
    with room(work, width, keep=options.keep):
        if mergekit is None:
            print("mergekit is left out: no environment that has it was named with --mergekit-python")
        (work / "tmp").mkdir(exist_ok=True)
        os.environ.update(TMPDIR=str(work / "tmp"), HF_HUB_OFFLINE="1")  # of the commands: mixtures are large
        return rows_of(work, width, mergekit, drop=drop)


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["contender", "recipe", "state", "seconds", "peak_anonymous_mib"],
        packages=["torch", "numpy", "safetensors"],
        folder=(ROOT / "runs", "where bench_large/ is made, 55 GB"),
        parameters=(7e9, "of a model, about; fewer are for trials"),
        mergekit_python=MERGEKIT_PYTHON,
        cold={"choices": ("drop_caches", "posix_fadvise"), "help": "how the page cache is emptied"},
        keep={"action": "store_true", "help": "leave the checkpoints for another time"},
    )
