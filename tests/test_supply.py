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


def test_no_file_is_read_in_a_way_that_could_run_code():
    unsafe = ["pickle.load(file)", "pickle.loads(data)", "joblib.load(path)", "pd.read_pickle(path)"]
    unsafe += ["torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)"]
    unsafe += ["AutoModel.from_pretrained(path, trust_remote_code=True)"]
    safe = ["torch.load(path, weights_only=True)", "np.load(path)", "np.load(path, allow_pickle=False)", "json.load(x)"]
    blamed = set(unsafe_loads("\n".join([*safe, *unsafe])))
    assert blamed == set(range(len(safe) + 1, len(safe) + len(unsafe) + 1))
    found = [f"{path.relative_to(ROOT)}:{line}" for path in CODE for line in unsafe_loads(path.read_text())]
    assert not found
    assert len(CODE) > 150


class Planted:
    """Makes a file called `ran` in a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (Path.touch, (self.folder / "ran",))


def plant(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.zeros(2), "planted": Planted(path.parent)}, path)
    return path


def plant_array(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array([Planted(path.parent)], dtype=object), allow_pickle=True)
    return path


def of_hub(path):
    """A folder of transformers whose weights are a pickle."""
    clip_folder(path.parent)
    (path.parent / "model.safetensors").unlink()
    return plant(path)


def resumed(path):
    """What a restart of a training reads."""
    state = State(torch.nn.Linear(1, 1), None, None, None, single_process())
    state.load(path)


def network(kind, name, weights, **more):
    """A tower with weights from a file of one's own."""
    typed = [f"model={kind}", f"model.name={name}", f"model.weights={weights}", "model.templates=null"]
    config = load("demo", *typed, *(f"model.{field}={value}" for field, value in more.items()))
    backbone_of(config.model, torch.device("cpu"), weights=True)


def timm_network(path):
    network("timm", "test_vit", path, image_size=160)


def hub_network(path):
    network("transformers", "small", path.parent, image_size=32)


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


def averaged(path):
    """What an average reads."""
    average_files([path], path.parent / "s.safetensors")


CODE_IN_IT, NO_WEIGHTS = "executes whatever code it holds", "Weights only load failed"
LOADERS = {  # the pickle, what reads it, and how that refuses, so that no other mistake passes for it
    "ingredients": (plant, "a.pt", averaged, CODE_IN_IT),
    "ingredients under another name": (plant, "a.bin", averaged, CODE_IN_IT),
    "a soup to export": (plant, "soup.pt", exported, CODE_IN_IT),
    "a soup under the name of another": (plant, "soup.safetensors", exported, "not a safetensors file"),
    "a released model": (plant, "model_0.pt", convert, CODE_IN_IT),
    "weights of a run": (plant, "weights.safetensors", load_weights, "is damaged"),
    "the state of a training": (plant, "state.pt", resumed, NO_WEIGHTS),
    "weights for timm": (plant, "a.pth", timm_network, "weights_only=True blocked"),
    "weights for open_clip": (plant, "a.pt", named_clip, NO_WEIGHTS),
    "weights of transformers": (of_hub, "pytorch_model.bin", hub_network, "no file named model.safetensors"),
    "logits": (plant_array, "a.npy", lambda path: read_array(path, (1, 1)), "Python objects"),
    "a list of held-out images": (plant_array, "held_out.npy", index_of_held_out, "allow_pickle=False"),
    "images of CIFAR-10.1": (plant_array, "a.npy", cifar_arrays, "allow_pickle=False"),
}


@pytest.mark.parametrize("what", LOADERS)
def test_a_planted_pickle_is_refused_and_does_not_run(what, tmp_path):
    make, name, loader, said = LOADERS[what]
    path = make(tmp_path / "folder" / name)
    with pytest.raises((UserError, ValueError), match=re.escape(said)):
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


def test_the_lock_has_every_requirement_at_its_version_with_a_hash_and_names_no_registry():
    wanted, locked = pins(ROOT / "requirements.txt"), pins(ROOT / "requirements.lock")
    assert {name: locked.get(name) for name in wanted} == wanted
    assert len(locked) > 2 * len(wanted)  # and what they need
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
    text = (".py", ".sh", ".sbatch", ".md", ".txt", ".ipynb", ".yaml", ".toml", ".lock", ".cff", ".gitignore")
    text += (".gitattributes",)
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
