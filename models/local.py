"""What the towers of all libraries share: local weights, the word where there are none, texts a few at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from configs.training import Model

ROOT = Path(__file__).resolve().parents[1]
TEXTS_AT_ONCE = 256


def local_path(model: Model) -> Path | None:
    """`model.weights`, from the project's root where it is not absolute.

    Raises:
        UserError: it is set, but there is no such file or folder.
    """
    if model.weights is None:
        return None
    path = ROOT / model.weights
    if not path.exists():
        raise UserError(f"model.weights={model.weights}: no such file or folder")
    return path


def unavailable(model: Model, repository: str, files: str, error: Exception) -> UserError:
    """What to do where weights are not here and cannot be downloaded."""
    return UserError(
        f"{model.kind} model {model.name} is not on this machine and cannot be downloaded ({_reason(error)}): "
        "where there is internet, run "
        f"`hf download {repository} {files} --local-dir FOLDER`; then set "
        f"model.weights=FOLDER{'' if model.kind == 'transformers' else f'/{files}'}"
    )


def not_whole(model: Model, error: Exception) -> UserError:
    """A local file that is damaged or of another model."""
    return UserError(
        f"model.weights={model.weights} is not a whole file of {model.kind} model {model.name} ({_reason(error)}): "
        "download it again, or name the model that it belongs to"
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


@torch.no_grad()
def in_parts(embed: Callable[[list[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """(N, width) float32 features of N texts on the CPU, each of unit length, a few hundred texts at a time."""
    parts = [list(texts[start : start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE)]
    return torch.cat([F.normalize(embed(part).float(), dim=-1).cpu() for part in parts])
