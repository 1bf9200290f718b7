"""Evaluation of a miniature in ImageNet's layout: label spaces, annotations, and one forward pass for each image."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from configs.schema import load
from eval import forward as passes
from eval.forward import Evaluator
from eval.pool import evaluate
from finetune.train import train_row
from store.runs import RunFolder

CLASSES = ("cat", "dog", "fox", "owl")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count, classes in (("train", 6, CLASSES), ("val", 3, CLASSES), ("r", 4, ("dog", "owl"))):
        for name in classes:
            for i in range(count):
                path = folder / split / name / f"{name}_{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit.r160_in1k", img_size=32).state_dict(), folder / "model.safetensors")
    right = {f"{name}_{i}.png": [0, 1, 2, 3] if i == 0 else [] for name in CLASSES for i in range(3)}
    (folder / "right.json").write_text(json.dumps(right))
    return load(
        "own_images",
        f"task.folder={folder}",
        "task.num_classes=4",
        "task.shifts=[r]",
        "+task.folders.test=val",
        "+task.subsets.r=2",
        f"+task.annotations.real={folder / 'right.json'}",
        "task.held_out_per_class=2",
        "model=any_timm",
        "model.name=test_vit.r160_in1k",
        "model.image_size=32",
        "model.probe_c=[1]",
        f"model.weights={folder / 'model.safetensors'}",
        "compute=cpu",
        "optim.batch_size=4",
        f"paths.runs={folder / 'runs'}",
    )


@pytest.fixture(scope="module")
def folder(config):
    train_row(config, 0)
    return RunFolder.of(config).ingredient(0)


def scores(folder):
    return {(row["split"], row["metric"]): row for row in map(json.loads, (folder / "scores.jsonl").open())}


def test_a_split_with_some_of_the_classes_is_scored_over_these_alone(config, folder):
    evaluate(config, folder)
    evaluator = Evaluator(config)
    weights = evaluator.model.state_dict()
    raw = torch.tensor([[9.0, 1.0, 0.0, 2.0], [9.0, 3.0, 0.0, 2.0]])  # class 0 is not in this split
    assert evaluator.predicted(raw, "r").tolist() == [1, 0]
    assert weights["head.weight"].shape[0] == 4
    row = scores(folder)["r", "top1"]
    assert row["n"] == 8
    cached = next((RunFolder.of(config).root / "logits/r").glob("*.npy"))
    logits = np.load(cached)
    assert logits.shape == (8, 4)  # raw, over all classes
    labels = np.repeat([0, 1], 4)
    assert row["correct"] == (logits[:, [1, 3]].argmax(axis=1) == labels).sum()


def test_annotations_count_only_images_that_have_an_answer(config, folder):
    evaluate(config, folder)
    row = scores(folder)["test", "real"]
    assert (row["correct"], row["n"]) == (4, 4)  # one of each class is annotated, and every answer is right


def test_what_was_looked_at_is_not_looked_at_again(config, folder, monkeypatch):
    evaluate(config, folder)
    seen = []
    original = passes._look
    monkeypatch.setattr(passes, "_look", lambda *args, **kwargs: seen.append(1) or original(*args, **kwargs))
    evaluate(config, folder)
    assert not seen
    for cached in (RunFolder.of(config).root / "logits/test").glob("*.npy"):
        cached.unlink()
    evaluate(config, folder)
    assert len(seen) == 1  # twelve images are one batch


def test_decoded_copies_are_kept_of_all_splits_but_the_training_one(config, tmp_path):
    compute = replace(config.compute, decoded=tmp_path)
    evaluator = Evaluator(replace(config, compute=compute))
    for split in ("train", "held_out", "test", "r"):
        list(evaluator.batches(split))
    assert len(list(tmp_path.iterdir())) == 3
