"""Files are whole or absent, and say so when they are damaged."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from soups.files.atomic import read_json, replacing, write_json, write_text
from soups.files.weights import digest, load_weights, save_weights
from store.arrays import cached_array
from store.provenance import provenance
from store.runs import finished, sole_writer

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "c": torch.tensor(0.5, dtype=torch.bfloat16)}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as temporary:
        temporary.write_text("{")
        raise RuntimeError("half way")
    assert read_json(path) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("content", ["", "{", "\x00\xff"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "done.json"
    write_text(path, content)
    with pytest.raises(UserError, match=r"done.json is damaged"):
        read_json(path)


def test_weights_come_back_to_the_bit_and_equal_weights_are_equal_files(tmp_path):
    name = save_weights(tmp_path / "one.safetensors", WEIGHTS)
    save_weights(tmp_path / "two.safetensors", dict(reversed(WEIGHTS.items())))
    back = load_weights(tmp_path / "one.safetensors", name)
    assert all(torch.equal(back[key], WEIGHTS[key]) and back[key].dtype == WEIGHTS[key].dtype for key in WEIGHTS)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"a": WEIGHTS["a"] + 1e-7}, {"a": WEIGHTS["a"].view(3, 2)}, {"c": WEIGHTS["c"].half()}, {"d": torch.zeros(0)}],
)
def test_a_digest_tells_contents_shapes_dtypes_and_names_apart(change):
    assert digest(WEIGHTS | change) != digest(WEIGHTS)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_damaged_weights_are_named_with_the_remedy(tmp_path, damage):
    path = tmp_path / "ingredients/003/weights.safetensors"
    name = save_weights(path, WEIGHTS)
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-4])
        case "other":
            save_weights(path, WEIGHTS | {"a": torch.zeros(2, 3)})
    with pytest.raises(UserError, match=r"ingredients/003/weights.safetensors.*delete its folder .*003 and run again"):
        load_weights(path, name)


@pytest.mark.parametrize(
    ("damage", "why"),  # bytes of the file, or another array
    [
        (lambda content: content[:128] + bytes([content[128] ^ 1]) + content[129:], "its content is not what was writ"),
        (lambda content: content[:-4], ""),
        (lambda content: content[:140], ""),
        (lambda content: b"", ""),
        (lambda content: b"no array at all", ""),
        (np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1], "it ends without the digest of its content"),
        (np.zeros((3, 3), np.float32), r"float32 \(3, 3\), not float32 \(2, 3\)"),
        (np.zeros((2, 3)), r"float64 \(2, 3\), not float32 \(2, 3\)"),
        (np.array([{"a": 1}]), "Python objects"),
    ],
)
def test_damaged_or_foreign_logits_are_computed_anew_with_a_word(tmp_path, capsys, damage, why):
    path, right = tmp_path / "abc.npy", torch.arange(6.0).view(2, 3)
    cached_array(path, (2, 3), lambda: right)
    path.write_bytes(damage(path.read_bytes())) if callable(damage) else np.save(path, damage, allow_pickle=True)
    assert torch.equal(cached_array(path, (2, 3), lambda: right), right)
    assert re.search(rf"cached array .*abc.npy is damaged \(.*{why}.*\): computing it anew", capsys.readouterr().out)
    assert torch.equal(cached_array(path, (2, 3), lambda: torch.zeros(2, 3)), right)  # whole again
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "right", [torch.arange(6.0).view(3, 2).T, torch.tensor([[1 / 3, 2 / 3, 1]] * 2, dtype=torch.float64)]
)
def test_an_array_is_computed_once_and_read_by_numpy_alone_whatever_its_layout_and_type(tmp_path, right):
    path = tmp_path / "logits/test/abc.npy"
    computed = cached_array(path, (2, 3), lambda: right)
    read = cached_array(path, (2, 3), lambda: pytest.fail("computed twice"))
    assert computed.dtype == read.dtype == torch.float32
    assert torch.equal(computed, read) and torch.equal(read, right.float())
    assert np.array_equal(np.load(path), read.numpy())
    with pytest.raises(ValueError, match=r"b\.npy: need \(2, 4\) numbers, got \(2, 3\)"):
        cached_array(tmp_path / "b.npy", (2, 4), lambda: right)
    assert not (tmp_path / "b.npy").exists()


HOLD = """
import sys, time
from pathlib import Path
from store.runs import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_folder_has_one_writer_and_is_free_when_that_one_was_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"being written by process {holder.pid} on"), sole_writer(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with sole_writer(tmp_path):
        pass


def test_the_next_writer_deletes_what_a_killed_one_left_half_written(tmp_path):
    (tmp_path / ".weights.123.abcd.tmp.safetensors").write_bytes(b"half")
    (tmp_path / ".export.123.abcd.tmp").mkdir()
    (tmp_path / ".export.123.abcd.tmp/part").write_bytes(b"half")
    (tmp_path / "weights.safetensors").write_bytes(b"whole")
    with sole_writer(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"lock", "weights.safetensors"}


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def without(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    words = r"lock cannot be locked \(No locks available\): type paths\.runs=FOLDER"
    with pytest.raises(UserError, match=words), sole_writer(tmp_path):
        pass


def test_finished_work_with_other_settings_is_refused_and_not_overwritten(tmp_path):
    assert finished(tmp_path, "a") is None
    write_json(tmp_path / "done.json", {"identity": "a", "row": 1})
    assert finished(tmp_path, "a")["row"] == 1
    with pytest.raises(UserError, match=r"made with other settings.*give this experiment another name"):
        finished(tmp_path, "b")


def test_provenance_says_where_a_result_comes_from():
    record = json.loads(json.dumps(provenance()))
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["machine"]["cores"] >= 1
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert record["commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)


def test_provenance_goes_without_git_and_without_a_package(monkeypatch):
    monkeypatch.setattr("store.provenance.PACKAGES", ("torch", "a-package-that-is-absent"))
    monkeypatch.setenv("PATH", "")
    record = provenance.__wrapped__()
    assert (record["commit"], record["modified"], record["versions"]["a-package-that-is-absent"]) == (None, None, None)
    assert record["versions"]["torch"] is not None
