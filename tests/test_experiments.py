"""The network of every experiment can be built, without weights and without memory, and its optimiser with it."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, EfficientNetImageProcessor

from configs.schema import load
from finetune.optimisers import build
from finetune.rows import row_config
from models.classifier import architecture

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def align(tmp_path_factory):
    """A folder with the configs of a network of ALIGN's kind, as a download would have them; they are transformers'."""
    folder = tmp_path_factory.mktemp("align")
    AutoConfig.for_model("align").save_pretrained(folder)
    EfficientNetImageProcessor(do_normalize=False, rescale_offset=True).save_pretrained(folder)
    return folder


@cache
def network(model, num_classes):
    """The network of these settings; experiments share it, since only its shapes are looked at."""
    with torch.device("meta"):
        return architecture(model, num_classes)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_network_and_the_optimiser_of_every_row_are_built(name, align):
    typed = ["task.folder=images", "task.num_classes=3"] if name == "own_images" else []
    config = load(name, *typed)
    if config.model.kind == "transformers":
        config = load(name, *typed, f"model.weights={align}")
    rows = [row_config(config, row) for row in range(1, config.sweep.size + 1)]
    for model, classes in {(row.model, row.task.size) for row in rows}:
        built = network(model, classes)
        parameters = list(built.parameters())
        assert all(parameter.is_meta for parameter in parameters)
        assert built.head.weight.shape[0] == classes
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        for optim in {row.optim for row in rows}:
            groups = build(optim, built).param_groups
            assert sum(parameter.numel() for group in groups for parameter in group["params"]) == trained
