"""Finished sweeps without training: an initialisation, and rows that were moved away from it."""

import pickle
from concurrent.futures import Future

import timm
import torch

from configs.schema import load
from eval.forward import Evaluator
from models.classifier import pretrained, pretrained_network
from soups.files.atomic import write_json
from soups.files.weights import save_weights
from store.rows import identity
from store.runs import RunFolder
from tasks.load import class_names


class Here:
    """A pool of workers that does each call at once, in this process, as another one would understand it."""

    def submit(self, call):
        future = Future()
        future.set_result(pickle.loads(pickle.dumps(call))())
        return future


def small_network(folder):
    """Settings of a network of 0.4 million parameters, whose weights are saved here; it has no zero-shot head."""
    name, weights = "test_efficientnet.r160_in1k", folder / "network.safetensors"
    torch.manual_seed(0)
    save_weights(weights, timm.create_model(name).state_dict())
    return [
        "model=timm",
        f"model.name={name}",
        f"model.weights={weights}",
        "model.image_size=64",
        "model.frozen_stages=0",
    ]


def record(config, row, digest, status="done"):
    """Write the done.json of a row."""
    scores = {"split": "held_out", "correct": 10 + row, "n": 40}
    done = {"drawn": {}, "held_out": scores, "status": status, "seconds": 1.0, "digest": digest}
    done["identity"] = identity(config, row)
    folder = RunFolder.of(config).ingredient(row)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "done.json", done)


def recorded_pool(config, diverged=()):
    """Rows that say they are done, without weights."""
    for row in range(config.sweep.size + 1):
        record(config, row, f"{row:032d}", "diverged" if row in diverged else "done")


def moved_pool(config, step=0.05):
    """Row -> weights: row 0 is the zero-shot model, and each of the others moved on its own, in matrices alone."""
    start = pretrained_network(config.model, class_names(config.task), config.task.answers).state_dict()
    weights = {}
    for row in range(config.sweep.size + 1):
        generator = torch.Generator().manual_seed(row)
        moved = {
            name: tensor + step * row * tensor.std() * torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1
            else tensor
            for name, tensor in start.items()
        }
        weights[row] = moved
        folder = RunFolder.of(config).ingredient(row)
        folder.mkdir(parents=True)
        record(config, row, save_weights(folder / "weights.safetensors", moved))
    return weights


def moved(start, seed, scale):
    """The weights with noise on every parameter; batch-norm statistics stay."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.ndim and "running" not in name
        else tensor
        for name, tensor in start.items()
    }


def finished_pool(runs, *overrides, experiment="demo_tiny", classes=10, scale=0.2, small=True):
    """An experiment whose rows are all done, row 0 being the pretrained model, and its evaluator.

    It has the small network, unless the experiment's own is asked for, whose head is from the names of the classes.
    """
    words = ["analysis.resamples=200", *(small_network(runs) if small else []), *overrides]
    config = load(experiment, f"paths.runs={runs}", f"task.classes={classes}", *words)
    evaluator = Evaluator(config)
    start = pretrained(config.model, class_names(config.task)).state_dict()
    for row in range(config.sweep.size + 1):
        folder = RunFolder.of(config).ingredient(row)
        digest = save_weights(folder / "weights.safetensors", moved(start, row, scale) if row else start)
        logits = evaluator.logits_of_file(digest, folder / "weights.safetensors", config.task.held_out)
        done = {"status": "done", "row": row, "digest": digest, "ingredient": "raw", "variants": {}, "seconds": 0}
        done |= {"held_out": evaluator.scored(logits, config.task.held_out), "drawn": {}}
        done["identity"] = identity(config, row)
        write_json(folder / "done.json", done)
    return config, evaluator
