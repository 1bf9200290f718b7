"""Short trainings of a small network on the images of demo_tiny, for tests."""

import tempfile
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch

from configs.schema import load
from configs.training import Optim
from finetune.train import fine_tune
from models.classifier import pretrained
from tasks.load import class_names, load_split
from tests.pools import small_network

OPTIM = {field.name for field in fields(Optim)}
GROUPS = ("augment", "regularizer", "compute", "tracking")


@cache
def _saved_network():
    folder = tempfile.TemporaryDirectory()  # deleted when this process ends
    return folder, small_network(Path(folder.name))


def small_config(*settings):
    """demo_tiny with batches of 8 and a network of 0.4 million parameters."""
    return load("demo_tiny", *_saved_network()[1], "optim.batch_size=8", *settings)


@cache
def small_split():
    """The training images of demo_tiny."""
    return load_split(load("demo_tiny").task, "train")


def network(config):
    """The pretrained network with its head."""
    torch.set_num_threads(1)
    return pretrained(config.model, class_names(config.task))


def trained(config, train, folder, model=None, **changes):
    """Train for three steps, or as changed settings of the optimiser, or other groups and arguments, say."""
    optim = {name: changes.pop(name) for name in list(changes) if name in OPTIM}
    groups = {name: changes.pop(name) for name in GROUPS if name in changes}
    steps = {} if "epochs" in optim else {"steps": 3}
    settings = replace(config, optim=replace(config.optim, **steps | optim), **groups)
    model = network(config) if model is None else model
    return fine_tune(model, train, settings, run_seed=1, folder=folder, **changes)


def distance(one, two):
    """The largest difference between two state dicts."""
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one)
