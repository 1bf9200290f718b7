"""Files are whole or absent, and say so when they are damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from store.arrays import cached_array
from store.atomic import read_json, read_jsonl, replacing, write_json, write_jsonl, write_text
from store.provenance import provenance
from store.runs import finished, sole_writer
from store.weights import digest, load_weights, save_weights

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


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from configs.cli import one_line_errors
from store.weights import save_weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
one_line_errors(lambda: save_weights(Path(sys.argv[1]), {"w": torch.zeros(10_000_000)}))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written():
    folder = Path("/dev/shm") / f"model-soups-full-{os.getpid()}"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False
    ).returncode
    try:
        if mounted != 0:
            pytest.skip("mounting a 1 MiB file system needs root")
        command = [sys.executable, "-c", FULL_DISK, str(folder / "weights.safetensors")]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert answer.returncode == 2, answer.stderr
        assert answer.stderr.startswith("error: no space left on the disk for ")
        assert len(answer.stderr.splitlines()) == 1
        assert not list(folder.iterdir())
    finally:
        if mounted == 0:
            subprocess.run(["umount", folder], check=True)
        folder.rmdir()


@pytest.mark.parametrize("content", ["", "{", "\x00\xff"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "done.json"
    write_text(path, content)
    with pytest.raises(UserError, match=r"done.json is damaged"):
        read_json(path)


def test_json_lines_round_trip(tmp_path):
    rows = [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 1 / 3}]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert read_jsonl(tmp_path / "metrics.jsonl") == rows


def test_weights_come_back_to_the_bit_and_equal_weights_are_equal_files(tmp_path):
    name = save_weights(tmp_path / "one.safetensors", WEIGHTS)
    save_weights(tmp_path / "two.safetensors", dict(reversed(WEIGHTS.items())))
    back = load_weights(tmp_path / "one.safetensors", name)
    assert all(torch.equal(back[key], WEIGHTS[key]) and back[key].dtype == WEIGHTS[key].dtype for key in WEIGHTS)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"a": WEIGHTS["a"] + 1e-7},
        {"a": WEIGHTS["a"].view(3, 2)},
        {"c": WEIGHTS["c"].half()},
        {"d": torch.zeros(0)},
    ],
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


def test_logits_are_computed_once(tmp_path):
    path, calls = tmp_path / "logits/test/abc.npy", []

    def compute():
        calls.append(1)
        return torch.arange(6.0).view(2, 3)

    first, second = (cached_array(path, (2, 3), compute) for _ in range(2))
    assert torch.equal(first, second)
    assert len(calls) == 1


def test_damaged_or_foreign_logits_are_named(tmp_path):
    path = tmp_path / "abc.npy"
    cached_array(path, (2, 3), lambda: torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"abc.npy: float32 \(2, 3\), not float32 \(4, 3\)"):
        cached_array(path, (4, 3), lambda: torch.zeros(4, 3))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"abc.npy is damaged"):
        cached_array(path, (2, 3), lambda: torch.zeros(2, 3))
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"abc.npy is damaged"):
        cached_array(path, (1, 1), lambda: torch.zeros(1, 1))


HOLD = """
import sys, time
from pathlib import Path
from store.runs import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


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
    half = tmp_path / ".weights.123.abcd.tmp.safetensors"
    half.write_bytes(b"half")
    (tmp_path / "weights.safetensors").write_bytes(b"whole")
    with sole_writer(tmp_path):
        assert not half.exists()
    assert (tmp_path / "weights.safetensors").read_bytes() == b"whole"


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
