"""Averages while a Trainer or Lightning trains: exact, the same to the bit after a kill, and loaded by the library."""

import os
import signal
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

import soups
from soups.along import in_time_order, shares
from soups.callbacks import TrainerAverage
from soups.errors import UserError
from soups.files.checkpoints import BLOCK
from soups.running import RunningMean, Schedule
from tests.apart import exits

SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
GENERATOR = torch.Generator().manual_seed(0)
TEXTS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(40, (16, 4), generator=GENERATOR)]


class Dies(TrainerCallback):
    """The process is gone, in the middle of a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


class Seen(TrainerCallback):
    """Copies of the weights after every step: the slow obvious way."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


class DiesSaving(TrainerCallback):
    """The process is gone when the Trainer has saved a checkpoint, before callbacks that stand behind this one."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, *callbacks, resume=None, dropout=0.1, **settings):
    """Nine steps with dropout, a checkpoint after each third."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: make examples-setup")
    torch.manual_seed(0)
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = BertForMaskedLM(BertConfig(**SMALL, **dropouts, max_position_embeddings=8))
    known = {"max_steps": 9, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    known |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    args = TrainingArguments(str(folder), **(known | settings))
    trainer = Trainer(model, args, train_dataset=TEXTS, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def killed(work, *words, **settings):
    """The work in a process that is killed at it; all that it leaves is on the disk."""
    assert exits(work, *words, **settings) == [-signal.SIGKILL]


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # which is one order of sums
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_thread):
    """A run with its average over every second step, and its weights after every step."""
    folder, seen = tmp_path_factory.mktemp("undisturbed"), Seen()
    train(folder, TrainerAverage("ema:0.5", every=2, start=2), seen)
    return folder, seen.states


def expected(states, weights):
    """The slow obvious way, in float64, of a tensor under each of its names."""
    return {
        name: (sum(w * state[name].double() for w, state in zip(weights, states, strict=True)) / sum(weights)).float()
        for name in states[0]
    }


def test_the_average_is_that_of_the_steps_it_says_and_from_pretrained_loads_it(undisturbed):
    folder, states = undisturbed
    model, found = BertForMaskedLM.from_pretrained(folder / "average", output_loading_info=True)
    assert not any(found.values())
    for name, tensor in expected(states[1::2], shares("ema:0.5", 4)).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=2e-7, atol=0)
    early = BertForMaskedLM.from_pretrained(folder / "checkpoint-3/average").state_dict()
    assert all(torch.equal(early[name], tensor) for name, tensor in states[1].items())  # step 2 is all it has


@pytest.mark.slow
def test_a_killed_run_that_resumes_has_the_bits_of_an_undisturbed_one(undisturbed, tmp_path):
    whole, _ = undisturbed
    killed(train, tmp_path, TrainerAverage("ema:0.5", every=2, start=2), Dies())
    assert not (tmp_path / "average").exists()
    train(tmp_path, TrainerAverage("ema:0.5", every=2, start=2), resume=True)
    for file in ("average/model.safetensors", "checkpoint-9/average/running_sums.safetensors"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def watched(folder, callback, **settings):
    """A run of several processes, of which the first leaves its weights after every step, and others no average."""
    seen = Seen()
    trainer = train(folder, callback, seen, **settings)
    assert trainer.args.world_size == 2 and trainer.model_wrapped is not trainer.model
    if trainer.is_world_process_zero():
        torch.save(seen.states, folder / "states.pt")
    else:
        assert callback.mean.taken == 0


@pytest.mark.slow
def test_two_processes_keep_one_average_which_is_that_of_one_process_and_resumes_to_the_bit(one_thread, tmp_path):
    whole, cut, alone = (tmp_path / name for name in ("whole", "cut", "alone"))
    plain = {"dropout": 0, "optim": "sgd", "learning_rate": 0.1}  # Adam makes much of a rounding where gradients are 0
    pair = {**plain, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}

    def average():
        return TrainerAverage("ema:0.5", every=2, start=2)

    assert exits(watched, whole, average(), **pair, processes=2) == [0, 0]
    found = BertForMaskedLM.from_pretrained(whole / "average").state_dict()
    states = torch.load(whole / "states.pt")
    for name, tensor in expected(states[1::2], shares("ema:0.5", 4)).items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-7, atol=0)
    train(alone, average(), **plain)
    for name, tensor in load_file(alone / "average/model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        assert not torch.equal(found[name], states[-1][name])
    assert exits(train, cut, average(), Dies(), **pair, processes=2) == [-signal.SIGKILL] * 2
    assert exits(train, cut, average(), resume=True, **pair, processes=2) == [0, 0]
    for file in ("average/model.safetensors", "checkpoint-9/average/running_sums.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()
    other = TrainerAverage("ema:0.5", every=3, start=2)  # refused by both, so that neither waits for the other
    assert exits(train, cut, other, resume=True, **pair, processes=2) == [1, 1]


@pytest.mark.slow
def test_an_average_beside_a_checkpoint_that_was_saved_over_is_not_taken_for_its_own(one_thread, tmp_path):
    def average():
        return TrainerAverage(every=2)

    train(tmp_path, average())
    killed(train, tmp_path, DiesSaving(), average(), learning_rate=3e-2)
    with pytest.raises(UserError, match=r"checkpoint-6/average/running_sums.* was saved beside other weights"):
        train(tmp_path, average(), resume=str(tmp_path / "checkpoint-6"))
    train(tmp_path, average(), resume=str(tmp_path / "checkpoint-3"))


@pytest.mark.slow
def test_the_mean_of_all_or_of_the_last_checkpoints_is_that_of_their_files_to_the_bit(tmp_path):
    train(tmp_path, TrainerAverage(every="checkpoint", start=4))
    files = [tmp_path / f"checkpoint-{step}" for step in (6, 9)]
    mean = dict(soups.uniform(files, allow_unrelated=True).weights)
    average = load_file(tmp_path / "average/model.safetensors")
    assert average.keys() <= mean.keys()
    assert all(torch.equal(mean[name], tensor) for name, tensor in average.items())
    callback = TrainerAverage("1-sqrt", every="checkpoint", last=2)
    train(tmp_path, callback, resume=str(tmp_path / "checkpoint-6"))
    assert not callback.mean.sums  # it keeps nothing
    wanted = dict(soups.weighted(files, "1-sqrt", allow_unrelated=True).weights)
    last = BertForMaskedLM.from_pretrained(tmp_path / "average").state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in wanted.items())
    with pytest.warns(UserWarning, match="of 3 checkpoints, which are all there are"):
        train(tmp_path, TrainerAverage(every="checkpoint", last=4))


@pytest.mark.slow
def test_a_run_resumes_with_the_average_that_it_began_or_says_what_to_do(undisturbed, tmp_path):
    folder, _ = undisturbed
    for callback, message in (
        (TrainerAverage("ema:0.5", every=3, start=2), "was begun with kind='ema:0.5', every=2, start=2, last=None"),
        (TrainerAverage("uniform", every=2, start=2), "resume with the same settings"),
    ):
        with pytest.raises(UserError, match=message):
            train(folder, callback, resume=str(folder / "checkpoint-6"))
    train(tmp_path, max_steps=3)
    with pytest.raises(UserError, match=r"checkpoint-3 has no running average, .* or begin here, with start=4"):
        train(tmp_path, TrainerAverage(every=2), resume=True)
    train(tmp_path, TrainerAverage(every=1, start=4), resume=True, max_steps=4)  # which begins later
    assert (tmp_path / "average/model.safetensors").exists()
    (tmp_path / "checkpoint-4/average/running_sums.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"running_sums.safetensors is damaged .*: resume from another checkpoint"):
        train(tmp_path, TrainerAverage(every=1, start=4), resume=True, max_steps=5)


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ({"every": 10}, {}, "none of 9 steps is averaged: start=0, every=10"),
        ({"every": "checkpoint", "last": 2}, {"save_total_limit": 2}, "last=2 and save_total_limit=2: keep 3"),
    ],
)
def test_what_averages_nothing_is_refused_before_the_first_step(words, settings, message, tmp_path):
    seen = Seen()
    with pytest.raises(UserError, match=message):
        train(tmp_path, TrainerAverage(**words), seen, **settings)
    assert not seen.states


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "ema"}, "weights 'ema': write uniform, 1-sqrt, or ema:DECAY"),
        ({"kind": "ema:1.5"}, "write uniform, 1-sqrt, or ema:DECAY"),
        ({"every": 0}, 'every=0: write a number of steps, or "checkpoint"'),
        ({"every": "epoch"}, "every='epoch': write a number of steps"),
        ({"last": 3}, 'write every="checkpoint", and no start'),
        ({"every": "checkpoint", "last": 0}, "last at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        TrainerAverage(**words)


def test_adapters_are_referred_to_their_own_recipe(tmp_path):
    model = nn.Linear(2, 2)
    model.peft_config = {}
    with pytest.raises(UserError, match="soups lora"):
        TrainerAverage().on_train_begin(SimpleNamespace(fsdp=None, deepspeed=None), None, None, model=model)


def states(count, dtype=torch.float32):
    """States of one model with a tied tensor, a counter, and a mask of infinities."""
    for i in range(count):
        weight = torch.randn(3, BLOCK // 2 + 5, generator=torch.Generator().manual_seed(i)).to(dtype)
        mask = torch.tensor([0.0, float("-inf")]).to(dtype)
        yield {"a": weight, "tied": weight, "turned": weight.t() + 1, "mask": mask, "n": torch.tensor(i)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_running_mean_is_rounded_once_and_keeps_ties_and_counters(dtype):
    mean = RunningMean(Schedule())
    for state in states(7, dtype):
        mean.update(state)
    models = [{key: each[key] for key in ("a", "turned")} for each in states(7, dtype)]
    found, wanted = mean.weights(state), soups.uniform(models, allow_unrelated=True)
    assert found["a"] is found["tied"] and found["n"] == 6
    assert {tensor.dtype for name, tensor in found.items() if name != "n"} == {dtype}
    for name, tensor in wanted.weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=0 if dtype != torch.float64 else 1e-15, atol=0)
    assert found["mask"].tolist() == [0, float("-inf")]
    state["a"].fill_(float("nan"))
    mean.update(state)
    with pytest.raises(UserError, match="tensor 'a' holds NaN or infinity"):
        mean.weights(state)
    with pytest.raises(UserError, match="other tensors than the one"):
        mean.update({"b": torch.zeros(2)})


def test_updates_count_in_an_average_by_1_sqrt_as_a_learning_rate_that_decays_so():
    """Models that are sums of updates, each the only one along its axis."""
    n, mean = 5, RunningMean(Schedule("1-sqrt"))
    for j in range(n):
        mean.update({"w": torch.tensor([float(i <= j) for i in range(n)], dtype=torch.float64)})
    wanted = [1 - (i / n) ** 0.5 for i in range(n)]
    assert mean.weights({"w": torch.zeros(n, dtype=torch.float64)})["w"].tolist() == pytest.approx(wanted, abs=1e-15)


needs_lightning = pytest.mark.skipif(
    find_spec("lightning") is None, reason="lightning is not installed: make examples-setup"
)


def fit(folder, *callbacks, resume=None, dies=False, **settings):
    """Ten steps of a small network with dropout and a batch norm, a checkpoint after each second."""
    import lightning.pytorch as pl

    class Network(pl.LightningModule):
        def __init__(self, width=4):
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 1))

        def training_step(self, batch, _):
            if dies and self.global_step == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            torch.manual_seed(self.global_step)  # Lightning does not restore the state of random generators
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    module = Network(width=6)
    saves = pl.callbacks.ModelCheckpoint(folder / "saved", every_n_train_steps=2, save_top_k=-1, save_last=True)
    known = {"max_steps": 10, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    known |= {"enable_model_summary": False, "default_root_dir": folder, "callbacks": [*callbacks, saves]}
    trainer = pl.Trainer(**(known | settings))
    data = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)).split(4)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=resume)
    return module


@pytest.mark.slow
@needs_lightning
@pytest.mark.filterwarnings("ignore")
def test_lightning_averages_resumes_to_the_bit_and_loads_the_average(one_thread, tmp_path):
    from soups.callbacks import LightningAverage

    def averages():
        return [
            LightningAverage("1-sqrt", every=3, start=1),
            LightningAverage(every="checkpoint", start=3, out=tmp_path / "checkpoints.ckpt"),
            LightningAverage(every="checkpoint", last=3, out=tmp_path / "last.ckpt"),
        ]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    module = fit(whole, *averages())
    kind = type(module)
    average = kind.load_from_checkpoint(whole / "average.ckpt")
    assert average.hparams.width == 6
    assert not torch.equal(average.model[0].weight, module.model[0].weight)
    assert average.model[1].num_batches_tracked == 10
    files = in_time_order([path for path in (whole / "saved").iterdir() if path.name != "last.ckpt"])[1:]
    for out, averaged in (("checkpoints.ckpt", files), ("last.ckpt", files[-3:])):
        loaded = kind.load_from_checkpoint(tmp_path / out).model.state_dict()
        mean = soups.uniform(averaged, allow_unrelated=True).weights
        assert all(torch.equal(loaded[name], mean[name]) for name in mean)
    killed(fit, cut, *averages(), dies=True)
    first = torch.load(whole / "average.ckpt")["state_dict"]
    second_module = fit(cut, *averages(), resume=cut / "saved/last.ckpt")
    second = torch.load(cut / "average.ckpt")["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(second_module.model[0].weight, module.model[0].weight)  # trained on, not averaged
    with pytest.raises(UserError, match="has no running average"):
        fit(cut, LightningAverage(every=5), resume=cut / "saved/last.ckpt", max_steps=12)
    with pytest.raises(UserError, match="none of 10 steps is averaged"):
        fit(cut, LightningAverage(every=100))


@needs_lightning
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_of_lightning_keep_one_average_that_is_of_their_checkpoints_resumed_or_not(one_thread, tmp_path):
    from soups.callbacks import LightningAverage

    pair = {"devices": 2, "strategy": "ddp", "processes": 2}
    averaged, plain = tmp_path / "averaged", tmp_path / "plain"
    for folder, callbacks in ((averaged, [LightningAverage(every="checkpoint")]), (plain, [])):
        assert exits(fit, folder, *callbacks, dies=True, **pair) == [-signal.SIGKILL] * 2
        assert exits(fit, folder, *callbacks, resume=folder / "saved/last.ckpt", **pair) == [0, 0]
    files = in_time_order([path for path in (averaged / "saved").iterdir() if path.name != "last.ckpt"])
    assert len(files) == 5
    mean, found = soups.uniform(files, allow_unrelated=True).weights, torch.load(averaged / "average.ckpt")
    assert all(torch.equal(found["state_dict"][f"model.{name}"], tensor) for name, tensor in mean.items())
    # Whatever a resumed run of Lightning trains, it trains the same without an average.
    with_it, without = (torch.load(folder / "saved/last.ckpt")["state_dict"] for folder in (averaged, plain))
    assert all(torch.equal(with_it[name], tensor) for name, tensor in without.items())
