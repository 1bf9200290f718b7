"""Other ways to average weight files, to stand beside ours:  python -m benchmarks.averaging_peers KIND OUT FILES...

Each is run as a process of its own, so that its imports and its memory are its own.
"""

import argparse
import hashlib
import os
from pathlib import Path


def read(out: Path, paths: list[Path]) -> None:
    """The floor: every byte once, into one reused buffer of 1 MiB; nothing is written."""
    buffer = memoryview(bytearray(1 << 20))
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)


def loop(out: Path, paths: list[Path]) -> None:
    """As the authors of the paper do: load each state dict, scale it, add it in its own precision."""
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    soup: dict[str, torch.Tensor] = {}
    for path in paths:
        state = load_file(path)
        if not soup:
            soup = {name: tensor.clone() * (1 / len(paths)) for name, tensor in state.items()}
        else:
            soup = {name: tensor.clone() * (1 / len(paths)) + soup[name] for name, tensor in state.items()}
    torch.save(soup, out)


def timm(out: Path, paths: list[Path]) -> None:
    """The procedure of timm's averaging script, which its wheel does not contain: float64 sums of whole models."""
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    total: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in load_file(path).items():
            if name in total:
                total[name] += tensor.to(dtype=torch.float64)
            else:
                total[name] = tensor.clone().to(dtype=torch.float64)
    limits = torch.finfo(torch.float32)
    means = {name: tensor.div_(len(paths)).clamp(limits.min, limits.max) for name, tensor in total.items()}
    torch.save({name: tensor.to(dtype=torch.float32) for name, tensor in means.items()}, out)
    hashlib.sha256(out.read_bytes()).hexdigest()


PEERS = {"read": read, "loop": loop, "timm": timm}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=PEERS)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    PEERS[arguments.kind](arguments.out, arguments.files)
