"""Two processes make rows together: one decides, reads and writes, and none waits for another in the wrong place."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.schema import CONFIGS, load
from eval.forward import found_by_all
from finetune.start import initialise
from finetune.train import evaluation_settings, train_row
from soups.errors import one_line_errors
from soups.files.atomic import read_json, write_json
from soups.files.weights import load_weights
from store.processes import COLLECTIVE_TIMEOUT, Processes, single_process, start_processes
from tests.commands import here, in_two
from tests.pools import small_network
from tests.rank import AGREED, ROW, StoppedError, saved_again, stopped_when_saved

ROOT = CONFIGS.parent


def settings(runs):
    return load("demo_tiny", *ROW, *read_json(runs.parent / "network.json"), f"paths.runs={runs}")


def row(runs, number=1):
    return runs / "demo_tiny/ingredients" / f"{number:03d}"


def begin_alone(runs):
    """Row 0, and row 1 until its first state is written, by this process.

    Row 0 sees as many images at once as the pair agrees on, since a product's last digits depend on that.
    """
    config = settings(runs)
    initialise(replace(config, compute=replace(config.compute, eval_batch=AGREED)))
    with stopped_when_saved(), pytest.raises(StoppedError):
        train_row(settings(runs), 1)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder of runs, and what each process saw."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("together")
    write_json(folder / "network.json", small_network(folder))
    begin_alone(folder / "one")
    shutil.copytree(folder / "one", folder / "damaged")
    shutil.copytree(folder / "one", folder / "alone")
    state = row(folder / "damaged") / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    ended = in_two(["-m", "tests.rank", str(folder)])
    assert [status for status, _, _ in ended] == [0, 0], ended
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_all_rows_are_made_from_nothing_and_weights_are_on_disk_before_they_are_scored(together):
    folder, seen = together
    for rank in seen:
        assert rank["first"] == rank["second"] == "StoppedError: "
        assert rank["third"] == ""  # where training was forbidden
        assert {"trained.json", "weights.safetensors", "ema_0.9.safetensors"} < set(rank["unscored"])
        assert not {"done.json", "state.pt"} & set(rank["unscored"])
    done = json.loads((row(folder / "two") / "done.json").read_text())
    assert not (row(folder / "two") / "trained.json").exists()
    assert done["status"] == "done"
    assert done["digest"] and done["variants"]["ema_0.9"]["digest"]
    assert (folder / "two/demo_tiny/manifest.csv").exists()
    one, two = (row(folder / runs, 0) / "weights.safetensors" for runs in ("one", "two"))
    assert two.read_bytes() == one.read_bytes()


@pytest.mark.slow
def test_the_second_process_waits_with_patience_while_the_first_works(together):
    assert together[1][0]["waited"] == dict.fromkeys(("pretrained_network", "save_trained", "_write"), "patient")


@pytest.mark.slow
def test_the_second_process_never_holds_a_whole_tensor(together):
    folder, seen = together
    weights = load_weights(row(folder / "two") / "weights.safetensors")
    whole = max(tensor.numel() for tensor in weights.values())
    assert seen[0]["largest"] >= whole  # so that whole tensors are seen where there are some
    assert whole / 2 <= seen[1]["largest"] < 0.6 * whole


def equal(one, other):
    """Of nested values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one if name != "seconds")
    return one == other


@pytest.mark.slow
def test_a_state_of_one_process_is_continued_by_two_and_the_other_way_round(together, tmp_path):
    folder, seen = together
    # To the bit: moments, averages and counters too.
    assert equal(torch.load(row(folder / "alone") / "state.pt"), torch.load(folder / "again.pt"))
    assert seen[0]["from one"] == seen[1]["from one"] == ""  # tests/test_parallel.py has the losses and weights
    state = row(folder / "begun") / "state.pt"
    written = torch.load(state)
    written["progress"]["seconds"] = 1000.0
    torch.save(written, state)
    with saved_again(tmp_path / "again.pt"):
        seconds = train_row(settings(folder / "begun"), 1)["seconds"]
    assert equal(written, torch.load(tmp_path / "again.pt"))
    assert 1000 < seconds < 2000  # of all processes that trained the row


@pytest.mark.slow
def test_a_damaged_state_ends_both_processes_with_the_same_line(together):
    for rank in together[1]:
        assert rank["damaged"].startswith("UserError: training state")
        assert "is damaged" in rank["damaged"]


def test_a_process_that_finds_no_batch_ends_all_and_the_smallest_batch_is_taken(monkeypatch):
    heard = []
    monkeypatch.setattr("eval.forward.least_of_all", lambda own, processes: heard.append(own) or min(own, 8))
    assert found_by_all(lambda: 64, single_process()) == 8

    def nothing_fits():
        raise UserError("not even 4 examples fit")

    with pytest.raises(UserError, match="not even 4"):
        found_by_all(nothing_fits, single_process())
    assert heard == [64, 0]  # it has told the others
    monkeypatch.setattr("eval.forward.least_of_all", lambda own, processes: 0)
    with pytest.raises(UserError, match="another process found no memory"):
        found_by_all(lambda: 64, single_process())


def test_torchrun_is_refused_by_commands_that_are_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        one_line_errors(lambda: pytest.fail("it began"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: this command is one process: start it with python")
    one_line_errors(lambda: print("shared"), several=True)
    assert capsys.readouterr().out == "shared\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-m soups", "without MASTER_ADDR, MASTER_PORT"),
        ("-m analysis", "this command is one process"),
        ("reproduce.py", "this command is one process"),
    ],
)
def test_several_processes_are_refused_that_cannot_meet_or_share_nothing(command, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ended = here([*command.split(), "experiment=demo_tiny", f"paths.runs={tmp_path}"])
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert message in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "examples"),
    [
        ([], 8),
        (["compute.micro_batch=3"], 3),
        (["model.eval_size=128"], 1),  # of 8, at four times the tokens
        (["compute.eval_batch=5"], 5),
        (["compute.strategy=ddp"], None),
    ],
)
def test_evaluations_of_sharded_weights_try_nothing_and_take_as_many_examples_as_training(changes, examples):
    words = ["model.image_size=64", "compute.strategy=fsdp", "compute.eval_batch=null", "optim.batch_size=16"]
    found = evaluation_settings(load("demo_tiny", *words, *changes), Processes(1, 2, torch.device("cpu")))
    assert found.compute.eval_batch == examples


def test_processes_meet_with_a_device_of_their_own_and_a_limit_that_is_said(monkeypatch):
    met = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: met.update(set=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: met.update(how, backend=backend))
    monkeypatch.setattr("store.processes._cpu_group", lambda: None)
    start_processes()
    device = torch.device("cuda", 1)
    assert met == {"set": device, "backend": "nccl", "timeout": COLLECTIVE_TIMEOUT, "device_id": device}
