"""The network of every experiment can be built, without weights and without memory, and its optimiser with it."""

from functools import cache

import pytest
import torch

from finetune.optim import build
from models.classifier import architecture
from store.rows import row_config
from tests.experiments import EXPERIMENTS, hub_folders, loaded_locally


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hub_folders(tmp_path_factory.mktemp("hub"))


@cache
def network(model, num_classes, options):
    """The network of these settings; experiments share it, since only its shapes are looked at."""
    with torch.device("meta"):
        return architecture(model, num_classes, options)


# Searches whose pool holds the initialisation: the random one, as the released pool does, the extreme one and ALIGN's.
WITH_START = (
    *("table3_clip_b32", "released", "released_sweep", "figureg1_fmow", "figureg1_iwildcam", "figureg2_cifar10"),
    *("figureg3_in22k", "extreme_lp", "extreme_zeroshot", "figure5_align"),
)
TWO_AVERAGES = ("table4_vitg", "tablec1_basic")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_network_and_the_optimiser_of_every_row_are_built(name, folders):
    config = loaded_locally(name, folders)
    if not name.startswith(("demo", "own_")) and not config.parts:  # Sections 3.3.2, J.2; Appendix H
        assert config.cooking.initialisation == (name in WITH_START)
        assert len(config.cooking.individuals) == (2 if name in TWO_AVERAGES else 0)
    rows = [row_config(config, row) for row in range(1, config.sweep.size + 1)]
    for model, classes, answers in {(row.model, row.task.size, row.task.answers) for row in rows}:
        built = network(model, classes, answers)
        parameters = list(built.parameters())
        assert all(parameter.is_meta for parameter in parameters)
        assert built.num_classes == classes
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        for optim in {row.optim for row in rows}:
            groups = build(optim, built).param_groups
            assert sum(parameter.numel() for group in groups for parameter in group["params"]) == trained
