"""Evaluation of a miniature in ImageNet's layout: label spaces, annotations, and one forward pass for each image."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from configs.errors import UserError
from configs.schema import load
from eval import forward as passes
from eval.forward import Evaluator
from eval.pool import evaluate
from finetune.train import train_row
from store.processes import Processes
from store.runs import RunFolder
from tasks.load import check_annotations

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
    data = [f"task.folder={folder}", "task.num_classes=4", "task.shifts=[r]", "+task.folders.test=val"]
    data += ["+task.subsets.r=2", f"+task.annotations.real={folder / 'right.json'}", "task.held_out_per_class=2"]
    network = ["model=timm", "model.name=test_vit.r160_in1k", "model.image_size=32", "model.probe_c=[1]"]
    network += [f"model.weights={folder / 'model.safetensors'}", "compute=cpu", "optim.batch_size=4"]
    return load("own_images", *data, *network, f"paths.runs={folder / 'runs'}")


@pytest.fixture(scope="module")
def folder(config):
    """The initialisation's, after evaluation."""
    train_row(config, 0)
    evaluate(config, RunFolder.of(config).ingredient(0))
    return RunFolder.of(config).ingredient(0)


def scores(folder):
    return {(row["split"], row["metric"]): row for row in map(json.loads, (folder / "scores.jsonl").open())}


def test_a_split_with_some_of_the_classes_is_scored_over_these_alone(config, folder):
    raw = torch.tensor([[9.0, 1.0, 0.0, 2.0], [9.0, 3.0, 0.0, 2.0]])  # class 0 is not in this split
    assert Evaluator(config).predicted(raw, "r").tolist() == [1, 0]
    row = scores(folder)["r", "top1"]
    (cached,) = (RunFolder.of(config).root / "logits/r").glob("*.npy")
    logits = np.load(cached)
    assert logits.shape == (8, 4) and row["n"] == 8  # raw, over all classes
    assert row["correct"] == (logits[:, [1, 3]].argmax(axis=1) == np.repeat([0, 1], 4)).sum()


def test_annotations_count_only_images_that_have_an_answer(folder):
    row = scores(folder)["test", "real"]
    assert (row["correct"], row["n"]) == (4, 4)  # one of each class is annotated, and every answer is right


def test_multilabel_accuracy_is_the_mean_over_classes_and_real_accuracy_over_images(config, tmp_path):
    names = [f"{name}_{i}.png" for name in CLASSES for i in range(3)]
    answers = {name: [0] for name in ("cat_0.png", "cat_1.png", "cat_2.png")} | {"dog_0.png": [1], "dog_1.png": []}
    (tmp_path / "right.json").write_text(json.dumps(answers))
    files = {"real": tmp_path / "right.json", "multilabel": tmp_path / "right.json"}
    evaluator = Evaluator(replace(config, task=replace(config.task, annotations=files)))
    logits = torch.zeros(len(names), 4)
    logits[:3, 0] = logits[3:, 2] = 1.0  # all cats are right, the dog that counts is not
    found = evaluator.annotated(logits)
    assert found["real"].accuracy == 3 / 4
    assert found["multilabel"].accuracy == (1 + 0) / 2


def test_a_missing_file_of_answers_is_told_before_any_work_and_null_is_no_column(config):
    there = load("table4_vitg").task
    assert set(there.annotations) == set(load("tablec1_basic").task.annotations) == {"real", "multilabel"}
    missing = replace(config.task, annotations={"real": Path("nowhere/real.json")})
    with pytest.raises(UserError, match=r"no nowhere/real.json.*\+\+task.annotations.real=null"):
        check_annotations(missing)
    check_annotations(replace(missing, folder=Path("nowhere")))  # where the data are not, they are on another machine
    assert set(load("table4_vitg", "++task.annotations.real=null").task.annotations) == {"multilabel"}
    assert not load("demo", "++task.annotations.real=null").task.annotations
    with pytest.raises(UserError, match="annotations"):
        load("table4_vitg", "+task.annotations.reel=real.json")


def test_what_was_looked_at_is_not_looked_at_again(config, folder, monkeypatch):
    seen = []
    original = passes._outputs
    monkeypatch.setattr(passes, "_outputs", lambda *args, **kwargs: seen.append(1) or original(*args, **kwargs))
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


def test_features_are_filled_shard_by_shard_by_several_processes_and_survive_a_kill(config, monkeypatch, capsys):
    config = replace(config, name="shards", compute=replace(config.compute, eval_batch=3))
    reference = Evaluator(replace(config, name="whole"))
    weights, expected = reference.model.state_dict(), reference.features("train")  # of 16 images
    monkeypatch.setattr(passes, "FEATURES_SHARD", 4)  # images, which are no whole number of batches
    monkeypatch.setattr(passes, "wait_for_all", lambda processes: None)
    monkeypatch.setattr(passes, "any_of", lambda flag, processes: True)
    original, looks = passes.forward, []

    def counted(model, batches, precision, outputs):
        looks.append(len(batches[0]))
        if sum(looks) > killed_after:
            raise KeyboardInterrupt
        return original(model, batches, precision, outputs)

    monkeypatch.setattr(passes, "forward", counted)

    def of_process(rank, world):
        evaluator = Evaluator(config, Processes(rank, world, torch.device("cpu")))
        evaluator.model.load_state_dict(weights)
        looks.clear()
        return evaluator

    def shards():
        return sorted(path.name for path in (RunFolder.of(config).root / "features").rglob("*.npy"))

    killed_after = 6
    with pytest.raises(KeyboardInterrupt):
        of_process(1, 2).fill_features("train")
    assert shards() == ["00001.npy"]  # of the second process's 1 and 3
    killed_after = 100
    of_process(1, 2).fill_features("train")
    assert shards() == ["00001.npy", "00003.npy"] and sum(looks) == 4
    alone = of_process(0, 1)  # which takes what others have filled
    torch.testing.assert_close(alone.features("train"), expected, atol=1e-5, rtol=1e-5)
    assert len(shards()) == 4 and sum(looks) == 8

    path = next((RunFolder.of(config).root / "features").rglob("00002.npy"))
    np.save(path, np.load(path)[:, ::-1])
    again = of_process(0, 1)
    torch.testing.assert_close(again.features("train"), expected, atol=1e-5, rtol=1e-5)
    assert sum(looks) == 4 and "00002.npy is damaged" in capsys.readouterr().out
