"""The network of every experiment can be built, without weights and without memory, and its optimiser with it."""

from functools import cache

import pytest
import torch

from finetune.optimisers import build
from finetune.rows import row_config
from models.classifier import architecture
from tests.experiments import EXPERIMENTS, hub_folders, loaded_locally


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hub_folders(tmp_path_factory.mktemp("hub"))


@cache
def network(model, num_classes, options):
    """The network of these settings; experiments share it, since only its shapes are looked at."""
    with torch.device("meta"):
        return architecture(model, num_classes, options)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_network_and_the_optimiser_of_every_row_are_built(name, folders):
    config = loaded_locally(name, folders)
    rows = [row_config(config, row) for row in range(1, config.sweep.size + 1)]
    for model, classes, options in {(row.model, row.task.size, row.task.options) for row in rows}:
        built = network(model, classes, options)
        parameters = list(built.parameters())
        assert all(parameter.is_meta for parameter in parameters)
        assert built.num_classes == classes
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        for optim in {row.optim for row in rows}:
            groups = build(optim, built).param_groups
            assert sum(parameter.numel() for group in groups for parameter in group["params"]) == trained
