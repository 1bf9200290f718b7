"""Data on the node's own disk, lists of files that are made once, and what finished runs can do without."""

import shutil
import tarfile
import threading
import time
import zipfile

import pytest
import torch
from pictures import rgb, save_tree

from configs.cli import parts_of
from configs.errors import UserError
from configs.schema import load
from slurm.clean import clean, removable
from store import staging
from store.rows import identity
from store.staging import staged
from tasks import files, prefetch
from tasks.load import load_split


@pytest.fixture
def data(tmp_path):
    return save_tree(tmp_path / "shared/pictures")


def experiment(data, *typed):
    own = ("task.folder=" + str(data), "task.num_classes=4", f"paths.runs={data.parents[1] / 'runs'}")
    return load("own_images", *own, *typed)


def archived(data, kind):
    archive = data.parent / f"archive.{kind}"
    if kind == "folder":
        shutil.copytree(data, archive)
    elif kind == "zip":
        with zipfile.ZipFile(archive, "w") as made:
            for file in sorted(data.rglob("*.*")):
                made.write(file, file.relative_to(data))
    else:
        with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as made:
            made.add(data, arcname="." if kind == "tar.gz" else data.name)
    return archive


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "folder"])
def test_jobs_read_the_data_of_an_archive_from_the_local_disk(data, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "node"))
    config = experiment(data, f"cluster.stage={archived(data, kind)}")
    there = staged(config)
    assert there.task.folder.is_relative_to(tmp_path / "node") and there.task.folder.name == "pictures"
    assert identity(there, 1) == identity(config, 1)
    before, after = load_split(config.task, "train"), load_split(there.task, "train")
    assert before.digest == after.digest and after.stored.path(0).is_relative_to(tmp_path / "node")
    assert staged(config) == there
    assert staged(experiment(data)) == experiment(data)


def test_tasks_on_one_node_unpack_once_and_wait_for_each_other(data, tmp_path, monkeypatch):
    config = experiment(data, f"cluster.stage={archived(data, 'tar')}", f"cluster.stage_to={tmp_path / 'node'}")
    calls, unpack = [], staging._unpack

    def slowly(source, folder):
        calls.append(folder)
        time.sleep(0.2)
        unpack(source, folder)

    monkeypatch.setattr(staging, "_unpack", slowly)
    found = []
    threads = [threading.Thread(target=lambda: found.append(staged(config).task.folder)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(set(found)) == 1 and len(found) == 3


def test_what_a_killed_job_left_half_unpacked_is_not_taken_for_whole(data, tmp_path, monkeypatch):
    config = experiment(data, f"cluster.stage={archived(data, 'tar')}", f"cluster.stage_to={tmp_path / 'node'}")

    def killed(source, folder):
        folder.mkdir(parents=True)
        (folder / "a file of another time").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(staging, "_unpack", killed)
        patched.setattr(shutil, "rmtree", lambda *words, **more: None)  # a killed job deletes nothing
        staged(config)
    assert [path for path in (tmp_path / "node").iterdir() if path.name.endswith(".tmp")]
    folder = staged(config).task.folder
    assert {path.name for path in folder.iterdir()} == {path.name for path in data.iterdir()}
    assert not [path for path in (tmp_path / "node").iterdir() if path.name.endswith(".tmp")]


def test_what_cannot_be_unpacked_or_is_of_several_data_sets_is_said_in_one_line(data, tmp_path, monkeypatch):
    archive, to = archived(data, "tar"), f"cluster.stage_to={tmp_path / 'node'}"
    with tarfile.open(archive) as whole:
        between, inside = whole.getmembers()[-1].offset, whole.getmembers()[-1].offset_data + 9
    for name, end in (("between.tar", between), ("inside.tar", inside), ("words.txt", 99)):
        (tmp_path / name).write_bytes(archive.read_bytes()[:end])

    def refused(source, words):
        with pytest.raises(UserError, match=words):
            staged(experiment(data, f"cluster.stage={source}", to))

    refused(tmp_path / "none.tar", r"cluster\.stage=.*none\.tar: No such file")
    refused(tmp_path / "between.tar", r"between\.tar cannot be unpacked")
    refused(tmp_path / "inside.tar", r"inside\.tar cannot be unpacked")
    refused(tmp_path / "words.txt", r"neither a folder nor an archive \(\.tar, ")
    (data / "link").symlink_to(tmp_path / "nowhere")
    refused(data, r"pictures cannot be unpacked \(.*pictures/link")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0))
    refused(archive, r"type cluster\.stage_to=FOLDER of a larger local disk")
    typed = ["parts=[figuree1_cars,figuree1_dtd]", f"cluster.stage={archive}"]
    with pytest.raises(UserError, match=r"cluster\.stage is the data of one experiment"):
        parts_of(load("table5", *typed), typed)


def test_a_data_set_is_listed_once_and_again_when_a_file_is_added_deleted_or_of_another_size(data, monkeypatch):
    task = experiment(data).task
    assert task.listings is not None
    calls = []
    monkeypatch.setattr(files, "_scan", lambda *words: calls.append(words) or found(*words))

    def listed():
        files.scanned.cache_clear()
        load_split.cache_clear()
        calls.clear()
        return len(load_split(task, "train")), load_split(task, "train").digest, len(calls)

    n, digest, times = listed()
    assert (n, times) == (12, 1)
    assert listed() == (n, digest, 0)  # from the kept list
    rgb(9, 8).save(data / "train/a b/more.png")
    assert listed()[0::2] == (n + 1, 1)
    (data / "train/a b/more.png").unlink()
    assert listed() == (n, digest, 1)
    first = sorted((data / "train/a b").iterdir())[0]
    whole = first.read_bytes()
    first.write_bytes(whole + b" ")  # in place: no folder changes
    assert listed()[1:] != (digest, 0)
    first.write_bytes(whole)
    assert listed()[1] == digest
    (file,) = task.listings.glob("*.npz")
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(b"0.jpg")] ^= 1  # a name
    file.write_bytes(damaged)
    assert listed() == (n, digest, 1)  # a damaged list is made anew
    file.write_bytes(file.read_bytes()[:100])
    assert listed() == (n, digest, 1)


found = files._scan


def test_sizes_of_listed_files_are_asked_for_once(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("x", "y"):
        (tmp_path / "a" / name).write_text(name * 3)
    names = ("a/y", "a/x")

    def sizes():
        return files.looked_up(tmp_path, names, tmp_path / "list.txt", tmp_path / "keep").sizes.tolist()

    assert sizes() == [3, 3]
    with monkeypatch.context() as patched:
        patched.setattr(files, "packed", lambda *words: pytest.fail("listed again"))
        assert sizes() == [3, 3]
    (tmp_path / "a/x").write_text("longer")
    assert sizes() == [3, 6]


def test_batches_that_do_not_fit_into_shared_memory_are_refused_before_a_worker_dies_of_it(monkeypatch):
    monkeypatch.setattr(prefetch.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(64, 0, 64 * 10**6))
    with pytest.raises(UserError, match=r"need 0\.24 GB of shared memory, and /dev/shm has 0\.06 GB left: .*shm-size"):
        next(prefetch.prefetch(torch.zeros, [1] * 4, workers=3, bytes_each=40 * 10**6))
    prefetch.refuse_little_shared_memory(40 * 10**6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"need 0\.32 GB"):
        prefetch.refuse_little_shared_memory(40 * 10**6)


def test_only_what_finished_runs_can_do_without_is_deleted(tmp_path, capsys):
    config = load("demo", f"paths.runs={tmp_path}")
    root = tmp_path / "demo"
    kept = ["ingredients/001/weights.safetensors", "ingredients/001/done.json", "ingredients/002/state.pt"]
    kept += ["ingredients/000/done.json", "soups/best/weights.safetensors"]
    safe = {"states": "ingredients/001/state.pt", "features": "features/train/a.npy", "logits": "logits/test/a.npy"}
    safe["variants"] = "ingredients/001/ema_0.999.safetensors"
    for name in (*kept, *safe.values()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    assert removable(config)["logits"] == removable(config)["variants"] == []  # of tables that are not there
    with pytest.raises(UserError, match="say what to delete"):
        clean(config, (), delete=True)
    clean(config, (), delete=False)
    assert "Nothing was deleted" in capsys.readouterr().out
    (root / "analysis").mkdir()
    (root / "analysis/provenance.json").write_text("{}")
    clean(config, tuple(safe), delete=True)
    assert all((root / name).exists() for name in kept)
    assert not any((root / name).exists() for name in safe.values())
    with pytest.raises(UserError, match="weights is no kind of files that can be deleted"):
        clean(config, ("weights",), delete=True)
