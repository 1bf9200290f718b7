"""Checkpoints as training scripts write them: which weights are meant, under which names, with nothing executed."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from soups.cli import main
from soups.errors import UserError
from soups.files.checkpoints import digest_file
from soups.files.folders import INDEX, short_names
from soups.files.opening import open_checkpoint, opened
from soups.files.reading import Reading
from soups.files.weights import LazyWeights, checkpoint_of
from soups.mean import average_files
from soups.verify import verify

ROOT = Path(__file__).resolve().parents[1]
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def read(path, **reading):
    with ExitStack() as stack:
        found = LazyWeights(open_checkpoint(path, stack, Reading(**reading)))
        return dict(found), found.checkpoint


def same(weights, state=STATE):
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) and weights[name].dtype == state[name].dtype for name in state)
    return True


class Harm:
    """A pickle that would write a file when loaded, and whose state would too."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,), {"x": 1}, iter([1]), iter([("k", Path(self.path))]))


def test_a_malicious_pickle_does_nothing_wherever_it_stands(tmp_path):
    owned = tmp_path / "owned"
    torch.save({"model": STATE, "args": Harm(owned), "list": [Harm(owned)]}, tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt")[0])
    torch.save({"w": STATE["b"], "x": Harm(owned)}, tmp_path / "b.pt")
    torch.save(Harm(owned), tmp_path / "c.pt")
    (tmp_path / "d.pt").write_bytes(pickle.dumps(Harm(owned)))
    for name in ("b.pt", "c.pt", "d.pt"):
        with pytest.raises(UserError, match=name) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not owned.exists()


@pytest.mark.parametrize(
    ("content", "key", "found"),
    [
        ({"state": {"model": {"module": STATE}}}, None, "state.model.module"),
        ({"model": {"b": STATE["b"]}, "model_ema": STATE}, "ema", "model_ema"),
        ({"trainer": {"model": STATE}, "ema": {"b": STATE["b"]}}, "model", "trainer.model"),
    ],
)
def test_the_weights_that_are_meant_are_found(tmp_path, content, key, found):  # more: tests/kinds.py
    torch.save(content, tmp_path / "a.pt")
    weights, checkpoint = read(tmp_path / "a.pt", key=key)
    assert same(weights)
    assert checkpoint.unwrapped == found


def test_a_key_that_means_nothing_is_refused(tmp_path):
    torch.save({"state_dict": STATE, "state_dict_ema": STATE}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"no weights that --key model means; there are state_dict, state_dict_ema"):
        read(tmp_path / "a.pt", key="model")
    torch.save(STATE, tmp_path / "b.pt")
    save_file(STATE, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"b.pt is one state dict by itself, without .* --key ema"):
        read(tmp_path / "b.pt", key="ema")
    with pytest.raises(UserError, match=r"c.safetensors has no keys, so --key ema means nothing"):
        read(tmp_path / "c.safetensors", key="ema")


def test_names_are_those_of_the_network_and_not_of_its_wrappers(tmp_path):
    prefix = "_orig_mod.module.module."
    torch.save({prefix + name: tensor for name, tensor in STATE.items()}, tmp_path / "a.pt")
    weights, checkpoint = read(tmp_path / "a.pt")
    assert same(weights)
    assert checkpoint.original == {name: prefix + name for name in STATE}
    assert list(read(tmp_path / "a.pt", as_stored=True)[0]) == [prefix + name for name in STATE]


def test_a_lightning_module_is_a_wrapper_where_a_network_of_transformers_is_none(tmp_path):
    state = {"model." + name: tensor for name, tensor in STATE.items()}
    torch.save({"state_dict": {f"model.{name}": t for name, t in STATE.items()}, "epoch": 1}, tmp_path / "epoch=1.ckpt")
    save_file(state, tmp_path / "llama.safetensors")
    assert same(read(tmp_path / "epoch=1.ckpt")[0])
    assert same(read(tmp_path / "llama.safetensors")[0], state)
    compiled = {"model._orig_mod." + name: tensor for name, tensor in STATE.items()}
    torch.save({"state_dict": compiled}, tmp_path / "b.ckpt")
    assert same(read(tmp_path / "b.ckpt")[0])


def test_prefixes_may_be_mixed_within_a_pool(tmp_path):
    for i, prefix in enumerate(("module.", "_orig_mod.", "", "model.")):
        torch.save({prefix + name: tensor + i for name, tensor in STATE.items()}, tmp_path / f"{i}.pt")
    paths = sorted(tmp_path.iterdir())
    average_files(paths, tmp_path / "soup.safetensors")
    assert same(load_file(tmp_path / "soup.safetensors"), {name: tensor + 1.5 for name, tensor in STATE.items()})
    with opened(paths) as together, opened(paths[3:]) as (alone,):
        assert together[3].original == {name: "model." + name for name in STATE}
        assert digest_file(together[3]) == digest_file(alone)  # a file's digest does not depend on its pool


def test_numbers_and_none_beside_tensors_are_kept(tmp_path):
    torch.save(STATE | {"_extra_state": None, "epoch": 3}, tmp_path / "a.pt")
    weights, checkpoint = read(tmp_path / "a.pt")
    assert same(weights)
    assert checkpoint.others == {"_extra_state": None, "epoch": 3}


def test_views_of_any_layout_are_read_to_the_bit(tmp_path):
    big = torch.randn(8, 8)
    parameter = torch.nn.Parameter(torch.randn(3))
    state = {
        "t": big.t(),
        "slice": big[2:5],
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "wide": torch.ones(1, 3).expand(4, 3),
        "u": torch.arange(3).to(torch.uint16),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(1.5),
        "p": parameter,
    }
    torch.save(state, tmp_path / "a.pt")
    weights, _ = read(tmp_path / "a.pt")
    assert same(weights, {name: tensor.detach() for name, tensor in state.items()})
    assert same(dict(LazyWeights(checkpoint_of("memory", state))), {n: t.detach() for n, t in state.items()})


def test_what_a_file_is_its_first_bytes_say(tmp_path):
    save_file(STATE, tmp_path / "plain")
    assert same(read(tmp_path / "plain")[0])
    (tmp_path / "x.onnx").write_bytes(b"some text that is long")
    with pytest.raises(UserError, match=r"x\.onnx: not a weight file"):
        read(tmp_path / "x.onnx")


def test_whole_objects_among_other_things_are_refused_with_what_to_do(tmp_path):  # alone: tests/test_kinds.py
    torch.save({"epoch": 3, "model": torch.nn.Linear(2, 2)}, tmp_path / "inside.pt")
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    torch.save({"x": Path("a"), "y": 1}, tmp_path / "set.pt")
    for name, words in (
        ("set.pt", r"'x' is a whole object \(pathlib\.\w*PosixPath\)"),
        ("inside.pt", r"'model' is a whole object \(torch.nn.modules.linear.Linear\)"),
        ("a.npz", "is a zip, but no checkpoint of torch.save"),
    ):
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)


def test_a_tensor_outside_of_its_storage_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(300, 7)}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"M,\x01K\x07\x86", b"M,\x02K\x07\x86", 1))  # of 556 rows
    assert path.read_bytes() != content
    with pytest.raises(UserError, match=r"a.pt is truncated, damaged"):
        read(path)


def index(folder, names, **places):
    (folder / names).write_text(json.dumps({"weight_map": places}))


def test_a_folder_is_the_model_that_transformers_would_load(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    index(tmp_path, INDEX, x="gone.safetensors")
    assert same(read(tmp_path)[0])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"its shard gone.safetensors is missing"):
        read(tmp_path)
    save_file(STATE, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="is one shard of a model: name its folder"):
        read(tmp_path / "model-00001-of-00002.safetensors")


def test_shards_of_pickles_are_read(tmp_path):
    w = torch.ones(4)
    torch.save({"a.weight": STATE["a.weight"], "w": w, "v": w}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": STATE["b"]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    index(tmp_path, "pytorch_model.bin.index.json", **{"a.weight": one, "w": one, "v": one, "b": two})
    weights, checkpoint = read(tmp_path)
    assert same(weights, STATE | {"w": w, "v": w})
    assert checkpoint.ties == {"w": "v"}


def test_two_files_of_one_name_are_told_apart(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        torch.save({"w": torch.ones(2)}, tmp_path / run / "best.pt")
    paths = [tmp_path / run / "best.pt" for run in ("a", "b")]
    soup = average_files(paths, tmp_path / "soup.safetensors")
    assert sorted(ingredient.file for ingredient in soup.ingredients) == ["a/best.pt", "b/best.pt"]
    assert short_names([Path("x/1/m"), Path("y/1/m"), Path("n")]) == ["x/1/m", "y/1/m", "n"]
    here = f"{Path.cwd().name}/m"
    assert short_names([Path("m"), Path("a/m"), Path("m")]) == [here, "a/m", here]
    assert short_names([Path("m").absolute(), Path("./b/../a/m")]) == [here, "a/m"]


def test_the_command_averages_either_format_without_torch(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    save_file(STATE, tmp_path / "b.safetensors")
    code = (
        "import sys; from soups.cli import main\n"
        "for name in ('a.pt', 'b.safetensors'): main(['uniform', name, '--out', f'soup of {name}.safetensors'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert len(list(tmp_path.glob("soup of *.safetensors"))) == 2


def test_the_command_says_what_it_read_left_out_and_did_not_average(tmp_path, capsys):
    for i in range(3):
        state = {"w": torch.tensor([float(i)]), "head": torch.ones(2 + (i == 2), 2), "mask": torch.tensor([-torch.inf])}
        state |= {"pos": torch.arange(4)} if i == 1 else {}
        state |= {"w": state["w"].half()} if i == 0 else {}
        torch.save(
            {"state_dict": state, "state_dict_ema": {"b": torch.ones(2)}, "args": Path("x")}, tmp_path / f"{i}.pt"
        )
    out = tmp_path / "soup.safetensors"
    words = ["uniform", *(str(tmp_path / f"{i}.pt") for i in range(3)), "--key", "state_dict", "--only-common"]
    main([*words, "--allow-unrelated", "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    for line in (
        "reads state_dict of 3 files",
        "leaves out state_dict_ema, args of 3 files",
        "head is not averaged: it is the first model's",
        "pos is dropped: the first model does not have it",
        "files have several kinds of numbers; the soup is F32",
    ):
        assert line in printed
    assert same(load_file(out), {"w": torch.ones(1), "head": torch.ones(2, 2), "mask": torch.tensor([-torch.inf])})
    assert verify(out) == ""
