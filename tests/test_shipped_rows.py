"""Every shipped row trains: each combination of settings that the experiment files have, on a miniature of its network.

Two processes take two steps, evaluate on held-out and keep their state; one process goes on from there, ends the row
and scores it, and has the losses and weights of a row that one process trained. New experiments enter by themselves.

On a machine with GPUs the same rows train there, by nccl and on as many processes as there are GPUs, and the speed and
memory of the published networks are measured:  make gpu-check
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from configs.data import ImageFolder, Sentences
from configs.schema import Experiment, Model, Sweep, load
from configs.training import Augment, Swa
from eval.forward import largest_input
from finetune.dist import DTYPES, wrap
from finetune.length import largest_world
from finetune.optim import Objective, build
from finetune.start import initialise
from finetune.train import train_row
from models.classifier import architecture
from soups.files.atomic import read_jsonl
from soups.files.weights import load_weights
from store.processes import single_process
from store.rows import draw, row_config
from store.runs import RunFolder
from tests.experiments import EXPERIMENTS, hub_folders, loaded
from tests.pair import start_pair
from tests.pictures import rgb
from tests.readers import bert_folder, encoder_folder, t5_folder
from tests.test_backbones import hub_align

pytestmark = pytest.mark.slow
CLUSTERS = ("slurm_1gpu", "slurm_8gpu")
WORLD = torch.cuda.device_count() or 2
STEPS, STOP = 3, 2
SIZE = 64  # pixels
NAMES = ("negative", "positive")
# Of what differs between the rows of a sweep, that which decides the code that a row runs; the rest are numbers in it.
DECIDING = ("regularizer", "compute", "optim.kind", "optim.loss", "optim.clip_norm", "optim.keep")
DECIDING += ("optim.batch_size", "model.train_head")
# How far several processes may be from one: of each loss, and of the weights' way from the start, as a share of its
# length. bfloat16 has 8 bits. tests/test_parallel.py has both equal to 1e-9 in float64.
TOLERANCE = {"fp32": (1e-4, 0.01), "bf16": (1e-2, 0.2), "fp16": (1e-2, 0.2)}
TABLE = "GPU_CHECK_TABLE"  # a variable: the file that measurements are added to


@dataclass(frozen=True)
class Combination:
    """What decides the code that a row runs."""

    family: str
    train_head: bool
    strategy: str
    precision: str
    optimiser: str  # whose schedule is a number of each step
    loss: str
    clipped: bool
    sam: str
    averages: tuple  # how many, whether one is in float64, and of which kinds
    keep: str
    distilled: bool
    micro_batched: bool
    checkpointed: bool
    compiled: bool
    pairs: int  # of mixup, of each process in the plan: 1, or 2 for more


def family(model: Model) -> str:
    """Whose miniature stands for a network."""
    if model.kind == "open_clip":
        return "hybrid" if "timm_model_name" in open_clip.get_model_config(model.name)["vision_cfg"] else "clip"
    if model.kind == "timm":
        return "vit" if "vit" in str(model.name) else "efficientnet"
    same = {"emoji_clip": "efficientnet", "imagenet_lite0": "efficientnet", "minilm": "text_encoder"}
    return same.get(model.kind, model.kind)


def combination(row: Experiment, world: int) -> Combination:
    """Of a row that so many processes train."""
    optim, regularizer, compute = row.optim, row.regularizer, row.compute
    sam = {None: "", True: "sam", False: "own sam"}[regularizer.sam and regularizer.sam.synchronised]
    averages = (len(regularizer.ema), max(regularizer.ema, default=0) > 0.9999, regularizer.ema_ramp)
    averages += (regularizer.swa is not None,)
    return Combination(
        family(row.model), row.model.train_head, compute.strategy, compute.precision, optim.kind,
        optim.loss, optim.clip_norm is not None, sam, averages, optim.keep, regularizer.distill is not None,
        compute.micro_batch is not None, compute.gradient_checkpointing, compute.compile,
        min(2, optim.batch_size // 2 // world),
    )  # fmt: skip


def shipped() -> dict[str, dict[Combination, Experiment]]:
    """Experiment -> its combinations, each with the settings of a row, under the shipped cluster files."""
    found: dict[str, dict[Combination, Experiment]] = {}
    gpus = [load("demo", f"cluster={name}").cluster.slurm.gpus for name in CLUSTERS]
    for name in EXPERIMENTS:
        config = loaded(name)
        alike: dict[str, int] = {}  # composing a row takes long
        for number in range(1, config.sweep.size + 1) if not config.parts else ():
            drawn = {field: value for field, value in draw(config, number).items() if field.startswith(DECIDING)}
            alike.setdefault(repr(drawn), number)
        rows = [row_config(config, number) for number in alike.values()]
        worlds = [[largest_world(row.optim, number) for number in gpus] for row in rows]
        found[name] = {combination(row, n): row for row, several in zip(rows, worlds, strict=True) for n in several}
    return found


def saved_open_clip(folder, name, vision):
    """A dual encoder of open_clip that it knows by a name of ours, and a file of its weights."""
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    settings = {"embed_dim": 32, "vision_cfg": vision | {"image_size": SIZE}, "text_cfg": text}
    (folder / "open_clip" / f"{name}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder / "open_clip")
    network = open_clip.create_model(name, force_image_size=SIZE, pretrained_image=False, pretrained_text=False)
    save_file(network.state_dict(), folder / f"{name}.safetensors")
    return {"kind": "open_clip", "name": name, "weights": folder / f"{name}.safetensors"}


def saved_timm(folder, name, **settings):
    save_file(timm.create_model(name, **settings).state_dict(), folder / f"{name}.safetensors")
    return {"kind": "timm", "name": name, "weights": folder / f"{name}.safetensors"}


def miniatures(folder):
    """Family -> what a model's settings change to."""
    torch.manual_seed(0)
    trunk = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
    found = {
        "clip": saved_open_clip(folder, "mini-clip", {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16}),
        "hybrid": saved_open_clip(folder, "mini-hybrid", trunk),
        "vit": saved_timm(folder, "test_vit.r160_in1k", img_size=SIZE),
        "efficientnet": saved_timm(folder, "test_efficientnet.r160_in1k"),
        "transformers": {"kind": "transformers", "name": "mini", "weights": hub_align(folder / "align")[1]},
    }
    # Without dropout, which is each process's own.
    of_bert = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folders = {
        "text_encoder": encoder_folder(folder / "encoder", **of_bert),
        "masked_lm": bert_folder(folder / "bert", **of_bert),
        "seq2seq_lm": t5_folder(folder / "t5", dropout_rate=0.0),
    }
    return found | {kind: {"kind": kind, "name": "mini", "weights": path} for kind, path in folders.items()}


def tasks(folder):
    """Whether its examples are texts -> a task of two classes, each with 8 training examples for every process."""
    counts = {"train": 8 * WORLD, "held_out": 12, "test": 4}
    for i, (split, count) in enumerate(counts.items()):
        lines = ["sentence\tlabel"]
        for label, name in enumerate(NAMES):
            (folder / "images" / split / name).mkdir(parents=True)
            for k in range(count):
                rgb(80, 80, 1000 * i + 100 * label + k).save(folder / "images" / split / name / f"{k}.png")
                lines.append(f"{['bad', 'good'][label]} film {'the is a b c'[: 2 + 2 * (k % 5)]} {split} {k}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    roles = {"train": "train", "held_out": "held_out", "test": "test", "shifts": (), "num_classes": 2}
    words = {"template": "sentence: {sentence}", "options": NAMES}
    images = ImageFolder(kind="image_folder", folder=folder / "images", **roles)
    return {False: images, True: Sentences(kind="sentences", folder=folder, **roles, **words)}


def miniature(row: Experiment, one: Combination, base: Experiment, *, network, task, runs, loaders) -> Experiment:
    """The settings of a row with another network, other data and a few steps; all that decides its code stays."""
    head = {"head": "prompt" if row.model.head == "prompt" else "random", "templates": None}
    sizes = {"image_size": SIZE, "eval_size": None, "eval_resize": None, "frozen_stages": 0}
    sizes |= {"max_length": 40} if row.model.is_reader else {}
    regularizer, listed = row.regularizer, ()
    if regularizer.swa is not None:
        regularizer = replace(regularizer, swa=Swa(start=0.3, every=1))
    if regularizer.distill is not None:  # row 2, from row 1
        taught = {"regularizer": {"distill": vars(regularizer.distill) | {"rows": (1,)}}}
        regularizer, listed = replace(regularizer, distill=None), ({}, taught)
    rate = 1e-2 if row.optim.kind == "sgd" else 1e-3  # far enough to see the way
    steps = {"steps": STEPS, "warmup_steps": 1, "evaluate_every": STOP, "batch_size": 2 * one.pairs * WORLD, "lr": rate}
    steps |= {} if row.optim.schedule == "cosine_restarts" else {"cycles": 1}
    augment = Augment(kind="none" if row.model.is_reader else "minimal")
    small = {"micro_batch": row.compute.micro_batch and one.pairs, "eval_batch": 6, "save_every": 1}
    return replace(
        base, name="small", task=task, augment=augment, regularizer=regularizer,
        model=replace(row.model, **network, **head, **sizes, pretrained=None, proxy_for=None),
        optim=replace(row.optim, **steps),
        compute=replace(row.compute, **small, loader_workers=loaders, decoded=None),
        tracking=replace(base.tracking, every=1),
        sweep=Sweep(seed=0, rows=None if listed else 1, listed=listed),
        paths=replace(base.paths, runs=runs),
    )  # fmt: skip


def by_one(config: Experiment, runs: Path | None = None) -> Experiment:
    """The same by one process, which has nothing to shard, and loads its examples itself."""
    paths = replace(config.paths, runs=runs or config.paths.runs)
    return replace(config, compute=replace(config.compute, strategy="ddp", loader_workers=0), paths=paths)


@dataclass(frozen=True)
class Trained:
    """The jobs of the pair."""

    pair: object
    rows: dict  # experiment -> its combinations
    configs: dict  # combination -> its settings in miniature; the last one is killed
    whole: dict  # combinations that one process cannot repeat -> settings by which the pair does, without sharding
    ended: dict  # name -> settings of rows that the pair trains to the end
    by_one: dict  # settings, as words -> the same where one process has trained them


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All combinations, trained by one pair of processes one after another, while tests look at those that are done."""
    folder = tmp_path_factory.mktemp("shipped")
    with start_pair(folder) as pair:
        networks, data, base = miniatures(folder), tasks(folder), load("demo")
        rows = shipped()
        every = {one: row for own in rows.values() for one, row in own.items()}
        order = sorted(every, key=lambda one: (one.strategy == "fsdp", one.sam == "sam", one.optimiser == "adafactor"))
        configs, whole, made = {}, {}, {}
        for i, one in enumerate(order):
            task = data[every[one].model.is_reader]
            small = {"network": networks[one.family], "task": task, "runs": folder / str(i)}
            configs[one] = miniature(every[one], one, base, loaders=int(i == 0), **small)
            if one.sam == "own sam":  # each process perturbs by its own part of a batch
                whole[one] = by_one(configs[one], folder / f"{i}-whole")
        for config in [*whole.values(), *(configs[one] for one in order[:-1])]:
            begin(config, made)
            pair.train(config, config.sweep.size, stop=STOP)
        ended = ends(configs[order[-1]], folder)
        for config, more in ended.values():
            begin(config, made)
            pair.train(config, **more)
        begin(configs[order[-1]], made)
        pair.train(configs[order[-1]], stop=STOP, kill=True)
        yield Trained(pair, rows, configs, whole, {name: config for name, (config, _) in ended.items()}, {})


def begin(config, made):
    """Make the rows that a training starts from: the initialisation, if none is `made` of the model, and teachers."""
    if config.model in made:
        shutil.copytree(made[config.model], RunFolder.of(config).ingredient(0))
    else:
        initialise(config)
        made[config.model] = RunFolder.of(config).ingredient(0)
    if config.sweep.size == 2:
        train_row(by_one(config), 1)


def ends(config, folder):
    """Rows that the pair trains to the end: one that is scored for longer than processes wait, two that diverge."""
    short = replace(config.optim, steps=1, keep="last", evaluate_every=0)
    large = replace(short, lr=1e30, warmup_steps=0)
    optims = {"slow": short, "diverged": large, "diverged at an evaluation": replace(large, evaluate_every=1)}
    compute, found = replace(config.compute, eval_batch=24), {}
    for name, optim in optims.items():
        own = replace(config, optim=optim, compute=compute, paths=replace(config.paths, runs=folder / name))
        found[name] = (own, {"timeout": 6, "slow": 3} if name == "slow" else {})
    return found


def losses(config):
    rows = read_jsonl(RunFolder.of(config).ingredient(config.sweep.size) / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row and "epoch" not in row]


def way(config, end=None):
    """How the weights went from the start to the end of the row, or to other weights, by name."""
    run = RunFolder.of(config)
    start = load_weights(run.ingredient(0) / "weights.safetensors")
    end = end or load_weights(run.ingredient(config.sweep.size) / "weights.safetensors")
    return {name: (tensor - start[name]).double() for name, tensor in end.items() if tensor.is_floating_point()}


def length(tensors):
    return sum(tensor.square().sum().item() for tensor in tensors.values()) ** 0.5


def trained_by_one(config, known):
    """The settings of the same row from the same start, after one process has trained it.

    It does so once for all that are `known` and differ in how several processes do it.
    """
    alike = repr(by_one(config, Path("one")))
    if alike in known:
        return known[alike]
    whole, row = by_one(config, config.paths.runs / "one"), config.sweep.size
    for needed in range(row):
        link = RunFolder.of(whole).ingredient(needed)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(RunFolder.of(config).ingredient(needed))
    train_row(whole, row)
    return known.setdefault(alike, whole)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_trains_on_several_processes_is_ended_and_goes_on_in_one(name, trained):
    for one in trained.rows[name]:
        config, shown = trained.configs[one], f"{name}: {one}"
        is_killed = one == list(trained.configs)[-1]
        outcomes = trained.pair.outcomes(config)
        assert outcomes == ["exit status -9" if is_killed else "stopped"] * WORLD, "\n".join([shown, *outcomes])
        if (RunFolder.of(config).ingredient(config.sweep.size) / "state.pt").exists():
            reached = state(config)  # else an experiment before this one has the same combination
            assert reached["progress"]["step"] == STOP, shown
            if one in trained.whole:
                same = trained.whole[one]
                assert trained.pair.outcomes(same) == ["stopped"] * WORLD, shown
                assert_close(way(config, model_in(reached)), way(same, model_in(state(same))), one, shown)
        done = train_row(by_one(config), config.sweep.size)
        assert (done["status"], done["held_out"]["n"]) == ("done", 24), shown
        whole = trained_by_one(config, trained.by_one)
        assert losses(config) == pytest.approx(losses(whole), rel=TOLERANCE[one.precision][0]), shown
        if one not in trained.whole:
            assert_close(way(config), way(whole), one, shown)


def state(config):
    path = RunFolder.of(config).ingredient(config.sweep.size) / "state.pt"
    return torch.load(path, weights_only=True)


def model_in(state):
    return {place[1]: tensor for place, tensor in state["tensors"].items() if place[0] == "model"}


def assert_close(found, expected, one, shown):
    apart = length({name: found[name] - tensor for name, tensor in expected.items()}) / length(expected)
    assert apart < TOLERANCE[one.precision][1], f"{shown}: {apart}"


@pytest.mark.parametrize("name", ["slow", "diverged", "diverged at an evaluation"])
def test_a_row_ends_in_all_processes_that_diverges_or_is_scored_for_longer_than_they_wait(name, trained):
    config = trained.ended[name]
    assert trained.pair.outcomes(config) == ["ended"] * WORLD
    assert train_row(by_one(config), 1)["status"] == ("done" if name == "slow" else "diverged")  # already


def measured(model: Model, options, config: Experiment, *, batch: int, steps: int = 10):
    """Examples that a process trains on in a second, without loading them, and the bytes that it takes.

    Args:
        model: which network, with random weights.
        options: of a prompted language model, what the classes are called.
        config: of the optimiser and of how it is computed.
        batch: examples a step.
        steps: that are measured, after as many that are not.
    """
    processes, compute = single_process(), config.compute
    network = architecture(model, len(options), options)
    forward = wrap(network, compute, processes)
    network.train()
    kind = None if compute.precision == "fp32" else DTYPES[compute.precision]
    scaler = torch.amp.GradScaler(processes.device.type, enabled=compute.precision == "fp16")
    optim = replace(config.optim, batch_size=batch)
    objective = Objective(forward, optim, None, kind, scaler, None, None)
    optimizer = build(optim, network)
    example = largest_input(model, training=True).repeat(batch, *[1] * (1 if model.is_reader else 3))
    inputs = example.to(processes.device) if model.is_reader else example.to(processes.device).float()
    targets = torch.full((batch, len(options)), 1 / len(options), device=processes.device)
    settle = partial(torch.cuda.synchronize, processes.device) if processes.device.type == "cuda" else lambda: None
    for step in range(2 * steps):
        if step == steps:
            settle()
            began = time.monotonic()
        objective.backward(inputs, targets, processes)
        scaler.step(optimizer)
        scaler.update()
    settle()
    seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() if processes.device.type == "cuda" else 0
    return steps * batch / seconds, peak


def test_the_speed_of_a_miniature_is_measured(tmp_path):
    network = saved_timm(tmp_path, "test_vit.r160_in1k", img_size=SIZE)
    model = Model(**network, image_size=SIZE, normalize=False, head="random", probe_c=(1,))
    speed, peak = measured(model, NAMES, load("demo"), batch=2, steps=1)
    assert speed > 0 and peak >= 0


PUBLISHED = {  # family -> experiment, images or texts a step
    "ViT-B/32 of open_clip": ("table3_clip_b32", 512),
    "ViT-B/32 of timm": ("figureg3_in22k", 512),
    "EfficientNet-B7 of transformers": ("figure5_align", 32),
    "BERT-base": ("tablej1_bert_base_rte", 32),
    "T5": ("tablej1_t5_base_rte", 32),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu-check on a machine with one")
@pytest.mark.parametrize("how", ["bf16", "fp16", "bf16 compiled"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_speed_and_memory_of_a_published_network(name, how, tmp_path):
    experiment, batch = PUBLISHED[name]
    config = load(experiment)
    folder = hub_folders(tmp_path).get(config.model.kind)
    model = config.model if folder is None else replace(config.model, weights=folder)
    compute = replace(config.compute, precision=how.split()[0], compile="compiled" in how, micro_batch=None)
    torch.cuda.reset_peak_memory_stats()
    options = config.task.options or tuple(str(i) for i in range(config.task.size))
    speed, peak = measured(model, options, replace(config, compute=compute), batch=batch)
    assert speed > 0 and peak > 0
    if TABLE in os.environ:
        with Path(os.environ[TABLE]).open("a") as file:
            file.write(json.dumps([name, how, batch, round(speed, 1), round(peak / 2**30, 2)]) + "\n")


def main() -> int:
    """All of this on a machine with GPUs, and a table of speed and memory; the exit status."""
    if not torch.cuda.is_available():
        print("no GPU here: make gpu-check trains on GPUs, make test does without", file=sys.stderr)
        return 2
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.environ[TABLE] = str(Path(folder) / "table.jsonl")
        Path(os.environ[TABLE]).touch()
        status = pytest.main([__file__, "-n", "0", "-p", "no:cacheprovider"])
        table = Table("network", "precision", "batch", "examples/s", "GiB", title=torch.cuda.get_device_name())
        for row in read_jsonl(Path(os.environ[TABLE])):
            table.add_row(*map(str, row))
    Console().print(table)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
