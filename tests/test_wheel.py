"""What `pip install .` installs: one package and one command, beside a user's own eval.py, models/ and configs/."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.commands import python

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# The user's own modules, with names of this project's folders: imported by us they would end the command.
USERS = ("models", "configs", "store", "tasks", "finetune", "analysis")
EVAL = """
import sys
import torch
from transformers import LlamaForCausalLM

model = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(16)[None] % 7
with torch.no_grad():
    print("perplexity")
    print(model(input_ids=ids, labels=ids).loss.exp().item())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds, installed by pip without a network, and nothing else of the project."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("place")
    for name in ("pyproject.toml", "LICENSE", "docs/soup-your-own.md"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "soups", source / "soups", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('wheels'))"
    (source / "wheels").mkdir()
    made = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    wheel = source / "wheels" / made.stdout.splitlines()[-1]
    words = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *words], check=True)
    return place, wheel


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A user's folder: three Llamas, an eval.py, and packages named as this project's folders."""
    folder = tmp_path_factory.mktemp("user")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        moved = {name: t + 0.004 * torch.randn(t.shape, generator=generator) for name, t in start.items()}
        model.load_state_dict(moved)
        model.save_pretrained(folder / f"run/m{i}")
    (folder / "eval.py").write_text(EVAL)
    for name in USERS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('the user\\'s {name} was imported')")
    return folder


def soups(installed, pool, *words):
    """The command of the wheel in the user's folder."""
    code = f"import sys; sys.path[0] = {str(installed[0])!r}; sys.argv = ['soups', *{[*map(str, words)]!r}]\n"
    code += "from soups.cli import main\nmain()"
    answer = subprocess.run([python(), "-c", code], cwd=pool, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_wheel_holds_one_package_and_needs_little(installed):
    place, wheel = installed
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        needed = [line for line in archive.read(metadata).decode().splitlines() if line.startswith("Requires-Dist")]
        inside = [name for name in archive.namelist() if name.startswith("soups/experiment")]
    assert {top for top in tops if not top.endswith("dist-info")} == {"soups"}
    assert inside == []
    needed = {line.split(": ")[1].split(">")[0] for line in needed if "extra" not in line}
    assert needed == {"numpy", "pyyaml", "rich", "safetensors", "torch", "xxhash"}
    assert (place / "bin/soups").exists()


def test_the_installed_command_averages_in_a_users_folder(installed, pool):
    place, _ = installed
    words = ["uniform", "run/m0", "run/m1", "run/m2", "--out", "by_command.safetensors"]
    environment = os.environ | {"PYTHONPATH": str(place)}
    command = [sys.executable, str(place / "bin/soups"), *words]
    answer = subprocess.run(command, cwd=pool, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    soup = load_file(pool / "by_command.safetensors")
    models = [load_file(pool / f"run/m{i}/model.safetensors") for i in range(3)]
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, torch.stack([model[name] for model in models]).mean(dim=0))


@pytest.mark.slow
def test_greedy_by_the_users_perplexity_then_doctor_verify_and_export(installed, pool):
    score = f"{python()} eval.py {{soup}}"
    printed = soups(
        installed, pool, "greedy", *sorted(pool.glob("run/*")), "--score", score, "--goal", "min", "--out", "soup"
    )
    assert "m0" in printed
    config = json.loads((pool / "soup/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "recipe `greedy`" in (pool / "soup/README.md").read_text()
    LlamaForCausalLM.from_pretrained(pool / "soup")
    names = sorted(path.name for path in pool.glob("run/*"))
    (pool / "scores.json").write_text(json.dumps(dict.fromkeys(names, 0.5)))
    words = ["--scores", "scores.json", "--held-out", "100"]
    printed = soups(installed, pool, "doctor", *sorted(pool.glob("run/*")), *words)
    assert "m1" in printed and "not calibrated for pools like yours: no tensor is a convolution of images" in printed
    assert "equal to the byte" in soups(installed, pool, "verify", "soup", "--folder", "run")
    soups(installed, pool, "export", "soup", "--to", "transformers", "--out", "exported")
    assert LlamaForCausalLM.from_pretrained(pool / "exported").config.vocab_size == SMALL["vocab_size"]
