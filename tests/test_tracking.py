"""W&B gets the curves of each row, and never stands in the way of a training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import InterruptedBySignalError, UserError
from configs.schema import load
from finetune.log import run_id, tracked
from store.rows import row_config

wandb = pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[1]
POINT = {"step": 2, "loss": 0.5, "lr": 0.1, "examples_per_second": 64.0, "mfu": None}
EVALUATION = {"step": 2, "weights": "ema_0.999", "held_out_correct": 3, "held_out_n": 4}
DONE = {"status": "done", "seconds": 9.5, "ingredient": "raw", "held_out": {"correct": 3, "n": 4}, "variants": {}}
END = {"epoch": 1, "step": 2, "loss": 0.75, "lr": 0.1}


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user with no settings and no login, and a service that ends with the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    yield
    wandb.teardown()


def experiment(tmp_path, *settings):
    return load("demo", f"paths.runs={tmp_path / 'runs'}", "tracking=wandb", *settings)


def records(file: Path):
    """All of a run's records, once its service, which is another process, has written the last one."""
    for _ in range(300):
        found = records_so_far(file)
        if one(found, "exit"):
            break
        time.sleep(0.1)
    return found


def records_so_far(file: Path):
    """W&B's protocol buffers: after 7 bytes a log of LevelDB, 32 KiB blocks of pieces with (checksum, length, kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def one(found, field):
    """The first of the records that has a field, as that field; None where no record has it."""
    return next((getattr(record, field) for record in found if record.HasField(field)), None)


def runs_in(folder):
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.parent.name)


def service():
    """Process id of W&B's service of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (found,) = [int(pid) for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
    return found


@pytest.mark.slow
def test_an_offline_run_holds_the_group_the_settings_the_drawn_values_and_the_curves(tmp_path, capfd):
    config = row_config(experiment(tmp_path, "tracking.mode=offline"), 3)
    with tracked(config, 3, {"optim.lr": 0.25}, tmp_path / "003") as log:
        for metrics in (POINT, EVALUATION, END, DONE):
            log(metrics)
    (file,) = runs_in(tmp_path / "003")
    found = records(file)
    run = one(found, "run")
    named = (run.run_id, run.run_group, run.display_name, run.project)
    assert named == (run_id(config, 3), "demo", "row 003", "model-soups")
    settings = {item.key: item.value_json for item in run.config.update}
    assert settings["drawn"] == '{"optim.lr":0.25}'
    assert json.loads(settings["optim"])["lr"] == config.optim.lr != experiment(tmp_path).optim.lr
    summary = {item.key: item.value_json for record in found for item in record.summary.update}
    assert (summary["final/held_out/raw"], summary["status"]) == ("0.75", '"done"')
    points = [
        {".".join(item.nested_key) or item.key: float(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    named = [{key: value for key, value in point.items() if not key.startswith("_")} for point in points]
    assert named == [
        {"step": 2, "train/loss": 0.5, "train/lr": 0.1, "train/examples_per_second": 64},
        {"step": 2, "held_out/ema_0.999": 0.75},
        {"step": 2, "train/epoch": 1, "train/epoch_loss": 0.75, "train/lr": 0.1},
    ]
    axes = {(r.metric.glob_name or r.metric.name, r.metric.step_metric) for r in found if r.HasField("metric")}
    assert {("train/*", "step"), ("held_out/*", "step")} <= axes
    assert one(found, "exit").exit_code == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_row_started_again_continues_its_run_and_other_rows_have_others(tmp_path):
    config = experiment(tmp_path, "tracking.mode=offline")
    with pytest.raises(InterruptedBySignalError), tracked(config, 3, {}, tmp_path / "003"):
        raise InterruptedBySignalError(signal.SIGTERM)
    with tracked(config, 3, {}, tmp_path / "003"):
        pass
    stopped, ended = (records(file) for file in runs_in(tmp_path / "003"))
    assert one(stopped, "run").run_id == one(ended, "run").run_id
    assert one(stopped, "preempting")
    assert [one(found, "exit").exit_code for found in (stopped, ended)] == [1, 0]
    assert run_id(config, 4) != run_id(config, 3) != run_id(experiment(tmp_path / "elsewhere"), 3)


def test_without_a_login_one_error_says_what_to_do_before_anything_trains(tmp_path):
    words = r"nobody is logged in.*`wandb login`.*tracking\.mode=offline"
    with pytest.raises(UserError, match=words), tracked(experiment(tmp_path), 3, {}, tmp_path / "003"):
        pytest.fail("trained")


@pytest.mark.slow
def test_without_a_network_the_error_comes_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the port of "discard"
    monkeypatch.setattr("finetune.log.INIT_SECONDS", 2)
    words, started = r"W&B cannot track row 3 .*tracking\.mode=offline", time.monotonic()
    with pytest.raises(UserError, match=words), tracked(experiment(tmp_path), 3, {}, tmp_path / "003"):
        pytest.fail("trained")
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_a_row_trains_on_when_the_service_dies_and_the_next_row_is_tracked(tmp_path, capfd):
    config = experiment(tmp_path, "tracking.mode=offline")
    with tracked(config, 3, {}, tmp_path / "003") as log:
        os.kill(service(), signal.SIGKILL)
        time.sleep(0.5)
        for _ in range(3):
            log(POINT)
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "row 3: W&B failed" in err
    with tracked(config, 4, {}, tmp_path / "004") as log:
        log(POINT)
    (file,) = runs_in(tmp_path / "004")
    assert one(records(file), "history")


@pytest.mark.slow
def test_without_tracking_nothing_is_written_and_wandb_is_not_even_imported(tmp_path):
    program = f"""
import sys
from pathlib import Path
from configs.schema import load
from finetune.log import tracked
with tracked(load("demo"), 3, {{}}, Path({str(tmp_path / "003")!r})) as log:
    log({POINT!r})
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert not (tmp_path / "003").exists()
