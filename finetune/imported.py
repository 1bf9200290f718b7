"""Rows that were trained elsewhere: the authors' released checkpoints, as finished rows of a run."""

from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import Experiment
from models.released import convert
from store.tables import ROOT
from store.weights import Weights


def _file(config: Experiment, row: int) -> Path:
    """A row's checkpoint.

    Raises:
        UserError: it is missing.
    """
    assert config.sweep.imported is not None
    path = ROOT / config.sweep.imported / f"model_{row}.pt"
    if not path.exists():
        raise UserError(f"{path} is missing: python -m soups.released download --folder {config.sweep.imported}")
    return path


def check_imports(config: Experiment) -> None:
    """Say that a checkpoint, or the list of held-out images, is missing before anything is done.

    Of rows that are trained nothing is checked.

    Raises:
        UserError: names the first one.
    """
    if config.sweep.imported is not None:
        for row in range(config.sweep.size + 1):
            _file(config, row)
        index = config.task.held_out_index
        if index is not None and not (ROOT / index).exists():
            raise UserError(f"task.held_out_index={index} is missing: python -m soups.released download brings it")


def imported_row(config: Experiment, row: int) -> tuple[Weights, dict[str, Any]]:
    """A row's weights, and what its done.json says of where they are from.

    Args:
        config: of an experiment with `sweep.imported`.
        row: 0 is the initialisation.

    Raises:
        UserError: the checkpoint is missing, damaged, or of another network than the experiment's.
    """
    model = config.model
    if (model.kind, model.name, model.normalize) != ("open_clip", "ViT-B-32-quickgelu", True):
        raise UserError("sweep.imported: the released checkpoints are of model=clip_vit_b32, of no other network")
    path = _file(config, row)
    weights, dropped = convert(path)
    return weights, {"imported": {"file": path.name, "bytes": path.stat().st_size, "dropped": sorted(dropped)}}
