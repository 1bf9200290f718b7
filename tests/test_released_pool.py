"""The authors' 72 files: download, conversion, the wrapper's logits, and import into a run."""

import io
import json

import numpy as np
import open_clip.factory
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from released_files import SMALL_NETWORK, random_state, small_shapes, thin_state
from rich.console import Console
from safetensors.torch import load_file
from servers import serving

import reproduce
from configs.errors import UserError
from configs.schema import load
from finetune.start import check_imports
from models.classifier import architecture
from models.released import LEFTOVERS, convert, released_shapes
from soups.experiment.released.files import (
    RECORD,
    SPLIT,
    TRAIN_IMAGES,
    convert_all,
    download,
    duplicates,
    looked_through,
)
from store.rows import identity
from tests.commands import here

QUIET = Console(file=io.StringIO())


def saved(state):
    """A state dict as torch.save writes it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def split(dtype=np.uint8):
    file = io.BytesIO()
    np.save(file, (np.arange(TRAIN_IMAGES) % 49 == 0).astype(dtype))
    return file.getvalue()


@pytest.fixture
def small(monkeypatch):
    """Files of a small network pass for theirs; returns its shapes."""
    shapes = small_shapes()
    monkeypatch.setattr("models.released.released_shapes", lambda: shapes)
    return shapes


@pytest.fixture
def files(small):
    """What the server has: models 4 and 5 are one model, under two names."""
    same = saved(thin_state(small, 4.0))
    return {"model_0.pt": saved(thin_state(small, 0.0)), "model_4.pt": same, "model_5.pt": same, SPLIT: split()}


# The authors' wrapper, from the description of the network and nothing of open_clip.


def norm(state, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state, name, x, heads=12):
    n, length, width = x.shape
    mixed = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    q, k, v = (part.view(n, length, heads, -1).transpose(1, 2) for part in mixed.split(width, dim=-1))
    shares = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(dim=-1)
    joined = (shares @ v).transpose(1, 2).reshape(n, length, width)
    return joined @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def wrapper(state, images):
    """Logits of (N, 3, 224, 224) images in [0, 1]."""
    v = "model.visual."
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    patches = F.unfold((images - mean) / std, kernel_size=32, stride=32).transpose(1, 2)
    x = patches @ state[v + "conv1.weight"].flatten(1).T
    x = torch.cat([state[v + "class_embedding"].expand(len(x), 1, -1), x], dim=1) + state[v + "positional_embedding"]
    x = norm(state, v + "ln_pre", x)
    for i in range(12):
        block = f"{v}transformer.resblocks.{i}"
        x = x + attention(state, f"{block}.attn", norm(state, f"{block}.ln_1", x))
        hidden = norm(state, f"{block}.ln_2", x) @ state[f"{block}.mlp.c_fc.weight"].T + state[f"{block}.mlp.c_fc.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + hidden @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    features = norm(state, v + "ln_post", x[:, 0]) @ state[v + "proj"]
    features = features / features.norm(dim=-1, keepdim=True)
    return features @ state["classification_head.weight"].T + state["classification_head.bias"]


@pytest.mark.slow
def test_the_converted_network_gives_the_logits_of_the_authors_wrapper(tmp_path):
    state, path = random_state(released_shapes()), tmp_path / "model_0.pt"
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (160, 113_961_705)
    torch.save(state, path)
    network = architecture(load("released").model, 1000)
    weights, dropped = convert(path)
    network.load_state_dict(weights, strict=True)
    images = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = network.eval()(images), wrapper(state, images.float() / 255)
    assert theirs.std() > 0.01  # so that 1e-5 says something
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert len(weights) == 154
    assert sum(dropped.values()) == 25_599_489
    assert dropped.keys() == LEFTOVERS.keys()


def test_half_precision_becomes_float32_exactly_and_the_file_is_said_to_lose_its_text(small, tmp_path):
    half = {"model.visual.proj": torch.full((64, 32), 0.1).half()}
    (tmp_path / "model_3.pt").write_bytes(saved(thin_state(small, 0.1, **half)))
    console = Console(file=io.StringIO(), width=1000)
    convert_all(tmp_path, [3], tmp_path / "out", console)
    written = load_file(tmp_path / "out/model_3.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert written["tower.proj"][0, 0].item() == torch.tensor(0.1).half().item()
    printed = console.file.getvalue()
    assert "dropped 4,225 numbers of the text tower" in printed
    assert "token_embedding.weight" in printed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model.visual.proj": None}, "tensor 'model.visual.proj' is missing"),
        ({"model.visual.other": torch.zeros(1)}, "tensor 'model.visual.other' is not one of theirs"),
        ({"classification_head.bias": torch.zeros(10)}, r"is F32 \(10,\), but floats of \(1000,\) in theirs"),
        ({"classification_head.bias": torch.zeros(1000).long()}, r"is I64 \(1000,\)"),
    ],
)
def test_another_state_dict_is_refused_by_its_tensor(tmp_path, changed, words):
    (tmp_path / "model_0.pt").write_bytes(saved(thin_state(released_shapes(), **changed)))
    with pytest.raises(UserError, match=rf"model_0\.pt is not one of the released models: tensor .*{words}|{words}"):
        convert(tmp_path / "model_0.pt")


def test_a_download_is_looked_through_recorded_and_names_the_model_that_is_there_twice(tmp_path, files):
    console = Console(file=io.StringIO(), width=1000)
    with serving(files) as served:
        download(tmp_path, [0, 4, 5], console, models_url=served.url, split_url=served.url)
        asked = len(served.asked)
        download(tmp_path, [0, 4, 5], QUIET, models_url=served.url, split_url=served.url)
        assert len(served.asked) == asked == 4
    assert "model_4.pt and model_5.pt are the same model, which counts 2 times" in console.file.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {*files, RECORD, "lock"}
    record = json.loads((tmp_path / RECORD).read_text())
    assert {name: known["bytes"] for name, known in record.items()} == {name: len(files[name]) for name in files}
    assert len(duplicates(record)) == 1


def test_a_file_of_another_length_than_it_had_is_downloaded_again(tmp_path, files):
    with serving(files) as served:
        download(tmp_path, [0], QUIET, models_url=served.url, split_url=served.url)
        (tmp_path / "model_0.pt").write_bytes(files["model_0.pt"][:-10])
        download(tmp_path, [0], QUIET, models_url=served.url, split_url=served.url)
    assert (tmp_path / "model_0.pt").read_bytes() == files["model_0.pt"]


def test_a_file_put_there_by_hand_is_looked_through_without_a_network(tmp_path, files):
    for name in ("model_0.pt", SPLIT):
        (tmp_path / name).write_bytes(files[name])
    download(tmp_path, [0], QUIET, models_url="http://127.0.0.1:9", split_url="http://127.0.0.1:9")
    assert set(json.loads((tmp_path / RECORD).read_text())) == {"model_0.pt", SPLIT}


def test_damage_is_seen_by_its_checksum(tmp_path, files):
    content = bytearray(files["model_4.pt"])
    place = content.index(np.float32(4.0).tobytes())
    content[place] ^= 1
    (tmp_path / "model_4.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"model_4\.pt is damaged"):
        looked_through(tmp_path / "model_4.pt")
    (tmp_path / SPLIT).write_bytes(split()[:-1])
    with pytest.raises(UserError, match=SPLIT):
        looked_through(tmp_path / SPLIT)


@pytest.mark.slow
def test_offline_it_is_one_line(tmp_path):
    words = ["--folder", str(tmp_path), "--models-url", "http://127.0.0.1:9", "--split-url", "http://127.0.0.1:9"]
    answer = here(["-m", "soups.experiment.released", "download", *words])
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
    assert "cannot be downloaded" in answer.stderr


def test_missing_files_are_said_before_anything_is_done(tmp_path):
    config = load("released", f"sweep.imported={tmp_path}")
    with pytest.raises(
        UserError, match=r"model_0\.pt is missing: python -m soups\.experiment\.released download --folder"
    ):
        check_imports(config)
    for row in range(72):
        (tmp_path / f"model_{row}.pt").touch()
    with pytest.raises(
        UserError, match=rf"held_out_index=.*{SPLIT} is missing: python -m soups\.experiment\.released download"
    ):
        check_imports(config)
    (tmp_path / SPLIT).touch()
    check_imports(config)


def test_an_imported_row_is_not_the_row_that_would_be_trained():
    index = "task.held_out_index=index.npy"
    imported, trained = load("released", index), load("released", index, "sweep.imported=null")
    assert imported.task == trained.task
    assert identity(imported, 3) != identity(trained, 3)
    assert identity(imported, 0) != identity(trained, 0)
    assert identity(imported, 3) != identity(imported, 4)


@pytest.mark.slow
def test_without_imagenet_the_published_numbers_make_the_table_and_the_figure(tmp_path, capsys):
    reproduce.run(load("released", f"task.folder={tmp_path}/none", f"paths.runs={tmp_path}/runs"))
    assert "from the accuracies that the authors published" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "runs/released/analysis").iterdir()}
    assert written == {f"table3_released.{end}" for end in ("md", "tex", "csv")} | {
        f"figure1_released.{end}" for end in ("pdf", "png", "csv")
    }


def imagenet_in_small(root):
    """1,000 classes of two tiny pictures to train on, two pictures of each of five to test, six held out."""
    for i in range(1000):
        for split_name, count in (("train", 2), ("val", 2 if i < 5 else 0)):
            for j in range(count):
                path = root / split_name / f"n{i:08d}" / f"{j}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), ((i * 7) % 256, (i * 31) % 256, 50 * j)).save(path)
    held_out = np.zeros(2000)
    held_out[:12:2] = 1
    np.save(root / SPLIT, held_out)


@pytest.mark.slow
def test_imported_rows_go_through_every_stage_without_training(tmp_path, small, in_process, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-quickgelu", SMALL_NETWORK)
    imagenet_in_small(tmp_path / "data")
    models, state = tmp_path / "models", random_state(small)
    models.mkdir()
    moved = {name: tensor + 0.001 * torch.randn_like(tensor) for name, tensor in state.items()}
    for row, weights in enumerate((state, state, moved)):
        torch.save(weights, models / f"model_{row}.pt")
    (tmp_path / "rows.csv").write_text("model,optim.lr\nmodel_1,1e-5\nmodel_2,3e-5\n")
    words = [
        f"paths.runs={tmp_path}/runs", f"task.folder={tmp_path}/data", "task.counts=null",
        f"task.held_out_index={tmp_path}/data/{SPLIT}", "task.shifts=[v2]", "task.folders.v2=val",
        "task.overlap_allowed=1",  # colours come again
        "+task.subsets.test=5", "+task.subsets.v2=5", "task.numbered=[]", "task.objectnet=null",
        f"sweep.imported={models}", f"sweep.file={tmp_path}/rows.csv", "sweep.rows=2", "compute=cpu",
        "cluster=local", "cluster.workers=1",
        "recipes=[best,uniform,greedy,ensemble]", "analysis.resamples=100",
    ]  # fmt: skip
    reproduce.run(load("released", *words))
    run = tmp_path / "runs/released"
    done = [json.loads((run / f"ingredients/{row:03d}/done.json").read_text()) for row in range(3)]
    assert done[0]["digest"] == done[1]["digest"] != done[2]["digest"]
    assert [each["imported"]["file"] for each in done] == ["model_0.pt", "model_1.pt", "model_2.pt"]
    assert [each["drawn"] for each in done] == [{}, {"optim.lr": 1e-5}, {"optim.lr": 3e-5}]
    assert all(each["held_out"]["n"] == 6 for each in done)
    soup = load_file(run / "soups/uniform/weights.safetensors")
    for ours, theirs in (("head.weight", "classification_head.weight"), ("tower.proj", "model.visual.proj")):
        torch.testing.assert_close(soup[ours], ((2 * state[theirs].double() + moved[theirs].double()) / 3).float())
    assert (run / "analysis/table3.md").exists()
    assert not list(run.rglob("metrics.jsonl"))
