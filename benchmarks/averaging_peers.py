"""Other ways to average weight files, to stand beside ours; each is called in a process of its own."""

import hashlib
import os
from pathlib import Path


def read(out: str, paths: list[str]) -> None:
    """The floor: every byte once, into one reused buffer of 1 MiB; nothing is written."""
    buffer = memoryview(bytearray(1 << 20))
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)


def loop(out: str, paths: list[str]) -> None:
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


def timm(out: str, paths: list[str]) -> None:
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
    hashlib.sha256(Path(out).read_bytes()).hexdigest()
