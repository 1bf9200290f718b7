"""Learned soups in processes of their own: killed and started again, on two ranks, and measured for memory."""

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from soups.descent import LearnedSettings, learned, shuffled
from soups.files.weights import save_weights
from tests.commands import in_two, python
from tests.test_learned import Network, data, loaders, pool

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # processes are started


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from soups.descent import LearnedSettings, learned, shuffled
from soups.files.weights import save_weights
from tests.test_learned import Network, data, loaders, pool
folder, kill_at, seen = Path(sys.argv[1]), int(sys.argv[2]), []
ordered = shuffled(*data(), 16, 0)
def batches(epoch):
    for batch in ordered(epoch):
        seen.append(epoch)
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
settings = LearnedSettings(per="layer", save_every=2)
soup = learned(Network(), loaders(pool(3)), batches, settings, state_path=folder / "state.pt")
save_weights(folder / "soup.safetensors", soup.weights)
(folder / "seen").write_text(str(len(seen)))
"""


def child(*arguments):
    return subprocess.Popen([python(), *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path):
    torch.set_num_threads(1)
    # 5 minibatches an epoch, a state every 2 steps: killed in step 10, the last of epoch 1, it goes on after step 8.
    assert child("-c", CHILD, tmp_path, 10).wait(timeout=120) == -signal.SIGKILL
    assert not (tmp_path / "soup.safetensors").exists()
    assert child("-c", CHILD, tmp_path, -1).wait(timeout=120) == 0
    assert (tmp_path / "seen").read_text() == str(15 - 8 + 3)  # the 3 before it in that epoch are passed over
    whole = tmp_path / "whole"
    settings = LearnedSettings(per="layer", save_every=2)
    state = whole / "state.pt"
    soup = learned(Network(), loaders(pool(3)), shuffled(*data(), 16, 0), settings, state_path=state)
    save_weights(whole / "soup.safetensors", soup.weights)
    for name in ("soup.safetensors", "state.pt"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


RANK = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
from soups.descent import learned, shuffled
from tests.test_learned import Network, data, loaders, pool
from tests.test_learned_processes import RANKS
dist.init_process_group("gloo")
folder, rank = Path(sys.argv[1]), dist.get_rank()
called = [[] for _ in range(3)]
def noting(i, load):
    return lambda: called[i].append(1) or load()
models = [noting(i, load) for i, load in enumerate(loaders(pool(3)))]
results = []
for settings in RANKS:
    soup = learned(Network(), models, shuffled(*data(67), 16, 0), settings, state_path=folder / f"{settings.place}.st")
    results.append((soup.coefficients, soup.beta, soup.losses, soup.weights["blocks.0.weight"]))
torch.save((results, [len(calls) for calls in called]), folder / f"{rank}.pt")
dist.destroy_process_group()
"""
RANKS = [LearnedSettings(per="layer"), LearnedSettings(per="tensor", place="host", differences=True)]


def test_two_processes_with_a_share_of_the_ingredients_each_learn_what_one_learns(tmp_path):
    ended = in_two(["-c", RANK, str(tmp_path)])
    assert [status for status, _, _ in ended] == [0, 0], ended
    (one, calls_of_one), (other, calls_of_other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    # Each of two runs reads all three at its end, and before that its own share: 0 and 2, or 1.
    assert (calls_of_one, calls_of_other) == ([4, 2, 4], [2, 4, 2])
    for settings, mine, theirs in zip(RANKS, one, other, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[3], theirs[3])
        alone = learned(Network(), loaders(pool(3)), shuffled(*data(67), 16, 0), settings)
        torch.testing.assert_close(mine[0], alone.coefficients, rtol=1e-4, atol=1e-5)
        assert mine[1] == theirs[1] == pytest.approx(alone.beta, rel=1e-4)
        assert mine[2] == theirs[2] == pytest.approx(alone.losses, rel=1e-4)


MEMORY = """
import re, sys, threading, time
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
from soups.descent import LearnedSettings, learned
from soups.files.weights import LazyWeights
from store.workers import little_memory
network = nn.Sequential(*[nn.Linear(800, 800) for _ in range(12)])
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
batch = torch.randn(8, 800), torch.randint(800, (8,))
small = nn.Linear(800, 800)  # what torch itself loads at the first step is no memory of ours
learned(small, [small.state_dict] * 2, lambda epoch: [batch], LearnedSettings(epochs=1))
before, peak, done = anonymous(), [0.0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
models = [lambda i=i: LazyWeights(Path(sys.argv[1]) / f"{i % 2}.safetensors") for i in range(int(sys.argv[2]))]
with little_memory():
    learned(network, models, lambda epoch: [batch], LearnedSettings(per="layer", epochs=1))
done.append(1)
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of anonymous memory")
def test_streaming_needs_less_than_four_models_of_memory_whatever_their_number(tmp_path):
    network = nn.Sequential(*[nn.Linear(800, 800) for _ in range(12)])
    size = sum(parameter.numel() for parameter in network.parameters()) * 4 / 2**20  # MiB
    for i in range(2):
        save_weights(tmp_path / f"{i}.safetensors", {name: t + i for name, t in network.state_dict().items()})
    beside_the_network = float(child("-c", MEMORY, tmp_path, 16).communicate(timeout=120)[0])
    assert 0.5 * size < beside_the_network < 3 * size
