"""What the project is made of and reads: pinned packages, licences, files that run no code, and no network."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import clip_folder, open_clip_file

from configs.errors import UserError
from configs.schema import load
from finetune.state import State
from models.backbones import backbone_of
from models.released import convert
from soups.export.files import export_soup
from soups.files.weights import load_weights
from soups.mean import average_files
from store.arrays import read_array
from store.processes import single_process
from tasks.load import load_split
from tests.miniatures import save_cifar10

ROOT = Path(__file__).resolve().parents[1]
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
CODE = [
    path for path in ROOT.rglob("*.py") if not {".venv", "venv", "runs", "tests"} & set(path.relative_to(ROOT).parts)
]
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def unsafe_loads(source):
    """Lines that read a file in a way that can run what is in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        module, _, name = called.rpartition(".")
        if module in UNSAFE and name in ("load", "loads", "Unpickler", "open"):
            found.append(node.lineno)
        if called in ("torch.load", "torch.hub.load", "torch.jit.load") and words.get("weights_only") != "True":
            found.append(node.lineno)
        if name == "load" and module in ("np", "numpy") and words.get("allow_pickle", "False") != "False":
            found.append(node.lineno)
        if called in ("pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "eval", "exec"):
            found.append(node.lineno)
        if words.get("trust_remote_code", "False") != "False" or words.get("weights_only", "True") != "True":
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "pickle.loads(data)",
        "joblib.load(path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_a_load_that_could_run_code_is_seen(line):
    assert unsafe_loads(line)


def test_loads_that_run_no_code_are_not_blamed():
    safe = ["torch.load(path, weights_only=True)", "np.load(path)", "np.load(path, allow_pickle=False)", "json.load(x)"]
    assert not unsafe_loads("\n".join(safe))


def test_no_file_is_read_in_a_way_that_could_run_code():
    found = [f"{path.relative_to(ROOT)}:{line}" for path in CODE for line in unsafe_loads(path.read_text())]
    assert not found
    assert len(CODE) > 150


def plant(path):
    """A pickle that makes a file called `ran` beside it when it is loaded."""

    class Planted:
        def __reduce__(self):
            return (Path.touch, (path.parent / "ran",))

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.zeros(2), "planted": Planted()}, path)
    return path


def plant_array(path):
    """The same as an array of objects."""

    class Planted:
        def __reduce__(self):
            return (Path.touch, (path.parent / "ran",))

    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array([Planted()], dtype=object), allow_pickle=True)
    return path


def of_hub(folder):
    """A folder of transformers whose weights are a pickle."""
    clip_folder(folder)
    (folder / "model.safetensors").unlink()
    return plant(folder / "pytorch_model.bin")


def resumed(path):
    """What a restart of a training reads."""
    state = State(torch.nn.Linear(1, 1), None, None, None, single_process())
    state.load(path)


def network(kind, name, weights, **more):
    """A tower with weights from a file of one's own."""
    typed = [f"model={kind}", f"model.name={name}", f"model.weights={weights}", "model.templates=null"]
    config = load("demo", *typed, *(f"model.{field}={value}" for field, value in more.items()))
    backbone_of(config.model, torch.device("cpu"), weights=True)


def named_clip(path):
    """An open_clip network from a pickle."""
    open_clip_file(path.parent / "known")
    network("open_clip", "a-small-clip", path, image_size=32)


def exported(path):
    """What soups export reads."""
    export_soup(path, "timm", path.parent / "out", network="timm:test_resnet")


def index_of_held_out(path):
    """The authors' list of held-out images."""
    for image in range(4):
        folder = path.parent / "images/train" / str(image % 2)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docs/emoji/a.png", folder / f"{image}.png")
    typed = [f"task.folder={path.parent / 'images'}", "task.num_classes=2", f"task.held_out_index={path}"]
    typed.append(f"paths.runs={path.parent / 'runs'}")
    load_split(load("own_images", *typed, "task.shifts=[]").task, "held_out")


def cifar_arrays(path):
    """CIFAR-10.1, whose files are arrays."""
    task = save_cifar10(path.parent / "cifar")
    shutil.copy(path, path.parent / "cifar/cifar10.1_v6_data.npy")
    load_split(task, "new")


LOADERS = {
    "ingredients": (plant, "a.pt", lambda path: average_files([path, path], path.parent / "soup.safetensors")),
    "ingredients under another name": (
        plant,
        "a.bin",
        lambda path: average_files([path], path.parent / "s.safetensors"),
    ),
    "a soup to export": (plant, "soup.pt", exported),
    "a soup under the name of another": (plant, "soup.safetensors", exported),
    "a released model": (plant, "model_0.pt", convert),
    "weights of a run": (plant, "weights.safetensors", load_weights),
    "the state of a training": (plant, "state.pt", resumed),
    "weights for timm": (plant, "a.pth", lambda path: network("timm", "test_vit", path, image_size=160)),
    "weights for open_clip": (plant, "a.pt", named_clip),
    "weights of transformers": (
        lambda path: of_hub(path.parent),
        "pytorch_model.bin",
        lambda path: network("transformers", "small", path.parent, image_size=32),
    ),
    "logits": (plant_array, "a.npy", lambda path: read_array(path, (1, 1), np.float32)),
    "a list of held-out images": (plant_array, "held_out.npy", index_of_held_out),
    "images of CIFAR-10.1": (plant_array, "a.npy", cifar_arrays),
}

SAID = {  # how each of them refuses, so that no other mistake passes for it
    "ingredients": "executes whatever code it holds",
    "ingredients under another name": "executes whatever code it holds",
    "a soup to export": "executes whatever code it holds",
    "a soup under the name of another": "not a safetensors file",
    "a released model": "executes whatever code it holds",
    "weights of a run": "is damaged",
    "the state of a training": "Weights only load failed",
    "weights for timm": "weights_only=True blocked",
    "weights for open_clip": "Weights only load failed",
    "weights of transformers": "no file named model.safetensors",
    "logits": "Python objects",
    "a list of held-out images": "allow_pickle=False",
    "images of CIFAR-10.1": "allow_pickle=False",
}


@pytest.mark.parametrize("what", LOADERS)
def test_a_planted_pickle_is_refused_and_does_not_run(what, tmp_path):
    make, name, loader = LOADERS[what]
    path = make(tmp_path / "folder" / name)
    with pytest.raises((UserError, ValueError), match=re.escape(SAID[what])):
        loader(path)
    assert not list(tmp_path.rglob("ran"))


def test_a_planted_pickle_runs_where_it_is_not_refused(tmp_path):
    torch.load(plant(tmp_path / "a.pt"), weights_only=False)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    np.load(plant_array(tmp_path / "a.npy"), allow_pickle=True)
    assert (tmp_path / "ran").exists()


def pins(path):
    """Package -> versions that a requirements file or the lock names."""
    found = {}
    for name, version in re.findall(r"^([A-Za-z0-9_.\-]+)==([^ ;\\\n]+)", path.read_text(), re.MULTILINE):
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    return found


def test_the_lock_has_every_requirement_at_its_version():
    wanted, locked = pins(ROOT / "requirements.txt"), pins(ROOT / "requirements.lock")
    assert {name: locked.get(name) for name in wanted} == wanted
    assert len(locked) > 2 * len(wanted)  # and what they need


def test_the_lock_has_a_hash_for_every_package_and_names_no_registry():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=\S)", text.strip())
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"https?://|--index|--find-links|file:", text)


def test_every_requirement_is_pinned():
    for path in ROOT.glob("requirements*.txt"):
        lines = [
            line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith(("#", "--"))
        ]
        assert lines and all(re.match(r"^[\w.\-]+==\S+", line) for line in lines), path


def licensed():
    """Patterns of files in the first table of DATA_LICENSES.md."""
    rows = [line for line in (ROOT / "DATA_LICENSES.md").read_text().splitlines() if line.startswith("| `")]
    return [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.mark.skipif(not LISTED, reason="needs a git checkout, which knows what is bundled")
def test_every_bundled_data_file_has_its_licence_in_one_file():
    text = (
        ".py",
        ".md",
        ".yaml",
        ".toml",
        ".txt",
        ".lock",
        ".sbatch",
        ".sh",
        ".cff",
        ".gitignore",
        ".gitattributes",
        ".ipynb",
    )
    data = [name for name in LISTED if not name.endswith(text) and "." in Path(name).name]
    patterns = licensed()
    assert [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
    unused = [pattern for pattern in patterns if not fnmatch.filter(LISTED, pattern)]
    assert unused == []


def isolated():
    """What starts a command without a network; empty where the system does not allow it."""
    start = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    allowed = (
        shutil.which("unshare") and subprocess.run([*start, "true"], capture_output=True, check=False).returncode == 0
    )
    return start if allowed else []


@pytest.mark.slow
def test_soups_and_a_whole_experiment_need_no_network_and_weights_that_are_not_here_are_one_line(tmp_path):
    start = isolated()
    if not start:
        pytest.skip("a network cannot be taken away here: unshare is not allowed")
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    call = [*start, sys.executable, "-c", OFFLINE, str(tmp_path)]
    answer = subprocess.run(call, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    assert (tmp_path / "s.safetensors").exists(), answer.stderr
    assert (tmp_path / "demo_tiny/analysis/table3.md").exists(), answer.stderr
    assert answer.returncode == 2
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert "is not on this machine and cannot be downloaded" in line and "model.weights=" in line


OFFLINE = """
import os, sys, tempfile, time
os.environ["HF_HOME"] = tempfile.mkdtemp()
import torch
import reproduce, store.workers
from configs.schema import load
from models.backbones import backbone_of
from soups.cli import main
from soups.errors import one_line_errors
from tests.pools import Here
folder = sys.argv[1]
main(["uniform", f"{folder}/a.pt", "--out", f"{folder}/s.safetensors"])
store.workers._pool = lambda workers, threads: Here()  # workers would load all libraries again
few = ["task.classes=10", "task.shifts=[v2]", "sweep.rows=1", "cluster.workers=1", "recipes=[best,uniform,greedy]"]
reproduce.run(load("demo_tiny", *few, f"paths.runs={folder}"))
time.sleep = lambda seconds: None  # the hub's client tries again for most of a minute
config = load("demo", "model=timm", "model.name=test_vit.r160_in1k", "model.image_size=160")
one_line_errors(lambda: backbone_of(config.model, torch.device("cpu"), weights=True))
"""
