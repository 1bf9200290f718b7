"""Pretrain the embedded CLIP on icons and their names:  python -m embedded.pretrain

Reads   the pictures of embedded/pairs.py (made on the first call) and ImageNet weights for the image tower
Writes  <out>/weights.safetensors (float16), <out>/vocabulary.json and <out>/pretrain.csv (the loss curve), last of all;
        <out>/overlap.json, how far the captions speak of the benchmark's classes;
        <state>, every `--state-every` steps, from which the same command continues after a stop
Takes   about 15 minutes on 2 CPU cores: 830 steps of 256 pairs
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from embedded.icons import check_tools
from embedded.pairs import CACHE, benchmark_images, collect, overlap, read_sources, render_pairs
from embedded.training import Settings, export, train
from models.emoji_clip.model import HERE, imagenet_file
from soups.errors import one_line_errors
from soups.files.atomic import write_text
from tasks.emoji.load import class_names

# glibc gives memory back to the system after each step and asks for it again, which takes half of the time on few
# cores; read when a process starts, hence the second start in main()
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": "67108864"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; its defaults are `Settings`'."""
    parser = argparse.ArgumentParser(prog="python -m embedded.pretrain", description="Pretrain the embedded CLIP.")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the drawn pairs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the finished weights")
    parser.add_argument("--state", type=Path, default=None, help="file to stop and go on; in the cache if not given")
    parser.add_argument("--state-every", type=int, default=50, help="steps")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    """Draw the pairs, train, write the weights."""
    if any(os.environ.get(key) != value for key, value in ALLOCATOR.items()) and sys.platform == "linux":
        command = [sys.executable, "-m", "embedded.pretrain", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ALLOCATOR})
    arguments = parse_arguments()
    check_tools("resvg_py")
    imagenet_file()
    torch.set_num_threads(arguments.threads)
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    pairs = render_pairs(collect(read_sources()), benchmark_images(), arguments.cache)
    shares = overlap(pairs.captions, class_names())
    write_text(arguments.out / "overlap.json", json.dumps(shares, indent=1) + "\n")
    state = arguments.state or arguments.cache / "pretrain-state.pt"
    clip, curve = train(pairs, settings, state, arguments.state_every)
    print(export(clip, curve, pairs, settings, arguments.out))
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    one_line_errors(main)
