"""Several processes evaluate as one does, to the bit; a batch size is found by trying."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import CONFIGS
from eval.forward import largest_that_fits, shares_of_batches
from tests.commands import here, python

ROOT = CONFIGS.parent
TINY = ["experiment=demo_tiny", "task.classes=9"]


def evaluate(runs, processes):
    words = ["-m", "eval", *TINY, f"paths.runs={runs}", "compute.eval_batch=7"]
    if processes == 1:
        ended = here(words)
    else:
        call = [python(), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
        ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


@pytest.mark.slow
def test_processes_give_the_logits_and_scores_of_one_for_sizes_that_do_not_divide(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert here(["-m", "finetune", *TINY, f"paths.runs={alone}", "sweep.index=0"]).returncode == 0
    shutil.rmtree(alone / "demo_tiny/logits")
    shutil.copytree(alone, together)
    evaluate(alone, 1)
    evaluate(together, 3)
    sizes = set()
    for score in (alone / "demo_tiny").rglob("scores.jsonl"):
        assert score.read_bytes() == (together / score.relative_to(alone)).read_bytes()
        sizes |= {json.loads(line)["n"] for line in score.read_text().splitlines()}
    arrays = sorted(path.relative_to(alone) for path in alone.rglob("logits/*/*.npy"))
    assert arrays == sorted(path.relative_to(together) for path in together.rglob("logits/*/*.npy"))
    assert all(np.array_equal(np.load(alone / path), np.load(together / path)) for path in arrays)
    assert any(size % 3 for size in sizes)


@pytest.mark.parametrize(("fits", "found"), [(5000, 1024), (600, 256), (7, 4), (8, 4), (9, 4), (31, 8)])
def test_the_batch_size_is_half_of_the_largest_that_fits(fits, found):
    def attempt(images):
        if images > fits:
            raise torch.OutOfMemoryError

    assert largest_that_fits(attempt) == found


def test_a_model_that_is_too_large_for_any_batch_says_so():
    def attempt(images):
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="not even 4 examples fit"):
        largest_that_fits(attempt)


@pytest.mark.parametrize(("images", "batch", "world"), [(31, 7, 3), (8, 4, 2), (3, 7, 4)])
def test_each_image_is_looked_at_by_one_process(images, batch, world):
    shares = shares_of_batches(torch.arange(images), batch, world)
    assert len(shares) == world
    assert sorted(torch.cat(shares).tolist()) == list(range(images))
