"""The benchmark of loaders runs on small pictures, and its own pictures are of ImageNet's size."""

from argparse import Namespace

import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks.data import AUGMENT, BATCH, SIZE, make_folder, measured, table, ways
from benchmarks.run import save_photographs

pytestmark = pytest.mark.slow  # a benchmark runs


def test_the_generated_photographs_are_of_imagenets_mean_size(tmp_path):
    save_photographs(tmp_path, 1, 1)
    (path,) = tmp_path.rglob("*.jpg")
    with Image.open(path) as image:
        assert image.size == (500, 375)
    assert 105_000 < path.stat().st_size < 115_000


def test_every_way_gives_whole_batches_of_bytes(tmp_path):
    images = make_folder(tmp_path, 2 * BATCH + 1, 40, 30)
    found = ways(images, tmp_path / "copies")
    assert {transform for _, transform in found} == {"minimal", "medium", "rand", "fixed"}
    for load in found.values():
        batches = list(load(0))
        assert [(batch.shape, batch.dtype) for batch in batches] == 2 * [((BATCH, 3, SIZE, SIZE), torch.uint8)]


def test_the_ratio_is_the_median_of_those_within_rounds(tmp_path):
    images = make_folder(tmp_path, 4, 40, 30)
    # torchvision's medians would say 20 / 20; round by round ours is 2, 0.5 and 2 times as fast
    found = {
        ("torchvision", "minimal", 0): [10.0, 40.0, 20.0],
        ("ours", "minimal", 0): [20.0, 20.0, 40.0],
    }
    rows = pd.DataFrame(table(found, images)).set_index("contender")
    assert rows.times_torchvision["ours"] == 2
    assert rows.images_per_second["ours"] == 20


def test_every_contender_loads_and_is_measured(monkeypatch):
    monkeypatch.setattr("benchmarks.data.WORKERS", (0, 1))
    monkeypatch.setattr("benchmarks.data.AUGMENT", {"medium": AUGMENT["medium"]})  # the test of every way has them all
    rows = pd.DataFrame(measured(Namespace(images=2 * BATCH, width=40, height=30, rounds=1)))
    ours = {"ours", "ours_simplejpeg", "ours_copies", "ours_copies_fast"}
    assert rows.groupby("transform").contender.apply(set).to_dict() == {
        "medium": {"torchvision", "decode_jpeg", "timm"} | ours,
        "fixed": {"torchvision", "ours", "ours_decoded"},
    }
    assert set(rows.workers) == {0, 1} and len(rows) == 2 * 7 + 2 * 2 + 1
    assert (rows.images_per_second > 0).all()
    assert (rows.times_torchvision[rows.contender == "torchvision"] == 1).all()
