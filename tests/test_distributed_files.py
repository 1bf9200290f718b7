"""Folders of torch.distributed.checkpoint: any sharding, the layouts that trainers write, and nothing executed."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import soups
from soups.errors import UserError
from tests.apart import exits

pytestmark = pytest.mark.filterwarnings("ignore")
FULL = {
    "rows": torch.arange(35.0).reshape(7, 5),
    "columns": torch.arange(42.0).reshape(2, 3, 7),
    "both": torch.arange(45.0, dtype=torch.float64).reshape(5, 9).bfloat16(),
    "turned": torch.arange(24.0).reshape(4, 6).t(),
    "number": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "large": torch.arange(700_000.0).reshape(1000, 700),  # more than a block
}
SHARDS = {"rows": [Shard(0)], "columns": [Shard(2)], "both": [Shard(1)], "turned": [Shard(0)], "large": [Shard(1)]}


def save_sharded(folder):
    """One of two processes that save a model of which each has a part."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    state = {
        name: distribute_tensor(tensor, mesh, SHARDS[name]) if name in SHARDS else tensor
        for name, tensor in FULL.items()
    }
    dcp.save({"model": state}, checkpoint_id=folder / "saved")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    assert exits(save_sharded, folder, processes=2) == [0, 0]
    return folder / "saved"


def test_tensors_in_shards_by_rows_and_by_columns_are_read_whole_and_block_by_block(sharded):
    assert len(list(sharded.glob("*.distcp"))) == 2
    found = soups.load(sharded)
    assert set(found) == set(FULL)
    for name, tensor in FULL.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    for name in ("large", "columns"):
        blocks = found.blocks(name, torch.empty(1 << 20, dtype=torch.uint8).numpy(), 1013 if name == "large" else 11)
        assert torch.equal(torch.cat([block.clone() for block in blocks]), FULL[name].reshape(-1))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return network, optimizer


@pytest.mark.parametrize("layout", ["bare", "beside", "flat", "nested"])
def test_the_model_is_found_beside_whatever_state_of_an_optimizer(layout, trained, tmp_path):
    network, optimizer = trained
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    if layout == "bare":
        state = state["model"]
    elif layout != "beside":
        options = StateDictOptions(flatten_optimizer_state_dict=layout == "flat")
        state = dict(zip(("model", "optim"), get_state_dict(network, optimizer, options=options), strict=True))
    dcp.save(state, checkpoint_id=tmp_path / "saved")
    found = soups.load(tmp_path / "saved")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in network.state_dict().items()
    }


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_metadata_that_would_run_code_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("saved").mkdir()
    Path("saved/.metadata").write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        soups.load("saved")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), "its file __0_0.distcp is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "__0_0.distcp is truncated"),
        (lambda file: file.write_bytes(b"\0" * file.stat().st_size), "__0_0.distcp is damaged at byte"),
        (lambda file: file.with_name(".metadata").write_bytes(b"\x80\x04N."), r"\.metadata is damaged"),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(harm, message, tmp_path):
    dcp.save({"w": torch.ones(100, 2)}, checkpoint_id=tmp_path)
    harm(tmp_path / "__0_0.distcp")
    with pytest.raises(UserError, match=message):
        soups.load(tmp_path)["w"]


def test_a_single_shard_is_referred_to_its_folder(tmp_path):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path)
    with pytest.raises(UserError, match="is one shard of a model: name its folder"):
        soups.load(tmp_path / "__0_0.distcp")
