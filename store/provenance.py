"""Where a result comes from: commit, versions, machine."""

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "transformers", "numpy", "scikit-learn", "safetensors")
ROOT = Path(__file__).resolve().parents[1]


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def provenance() -> dict[str, Any]:
    """Commit and whether files differ from it, package versions and the machine.

    None stands for what is not known: the commit without git or outside a checkout, the version of an absent package.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit else None
    versions: dict[str, str | None] = dict.fromkeys((*PACKAGES, "datasets", "wandb"))
    for package in versions:
        with suppress(PackageNotFoundError):  # W&B and transformers are needed by some experiments only
            versions[package] = version(package)
    machine = {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()}
    machine["capability"] = torch.backends.cpu.get_cpu_capability()
    known = {"commit": commit, "modified": None if changes is None else bool(changes)}
    return known | {"python": platform.python_version(), "versions": versions, "machine": machine}
