"""Numbers of `soups make` beside mergekit's:  python -m benchmarks.mergekit --python PYTHON

Makes a small Llama and two that were "fine-tuned" from it, in float32 and in bfloat16, and gives the same yaml of each
method to mergekit, in an environment of its own whose PYTHON is named, and to `soups make`. Prints and keeps in
results/measured/bench_mergekit.csv how far their numbers lie apart: the largest difference, in units of epsilon times
the largest number of the tensor, and the shares of numbers that are equal and that differ by more than two units. Of
dare_linear chance drops other elements in each, so it is compared where nothing is dropped.
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.run import Options, benchmark
from soups.cli import main as soups
from soups.files.atomic import write_text
from soups.made_up import SMALL, moved

BASE, ONE, OTHER = "./base", "./one", "./other"
WEIGHED = [
    {"model": ONE, "parameters": {"weight": 0.7, "density": 0.4}},
    {"model": OTHER, "parameters": {"weight": -0.2, "density": 0.8}},
]
MERGED = {"base_model": BASE, "models": WEIGHED}
SUM = {"models": [{"model": each["model"], "parameters": {"weight": each["parameters"]["weight"]}} for each in WEIGHED]}
BASED_SUM = {"base_model": BASE, **SUM}
WHOLE = [each | {"parameters": each["parameters"] | {"density": 1.0}} for each in WEIGHED]
SLERP = {"merge_method": "slerp", "models": [{"model": ONE}, {"model": OTHER}], "parameters": {"t": 0.3}}
MERGEKIT = """
import sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

for number in range(int(sys.argv[1])):
    with open(f"{number}.yaml") as file:
        values = MergeConfiguration.model_validate(yaml.safe_load(file))
    run_merge(values, f"theirs{number}", MergeOptions(copy_tokenizer=False, quiet=True))
"""
CASES: dict[str, dict[str, object]] = {
    "linear": {"merge_method": "linear", **SUM},
    "linear, not normalized": {"merge_method": "linear", **SUM, "parameters": {"normalize": False}},
    "task_arithmetic": {"merge_method": "task_arithmetic", **BASED_SUM, "parameters": {"lambda": 0.9}},
    "task_arithmetic, normalized": {"merge_method": "task_arithmetic", **BASED_SUM, "parameters": {"normalize": True}},
    "ties": {"merge_method": "ties", **MERGED, "parameters": {"int8_mask": True, "lambda": 1.5}},
    "ties, in float32": {"merge_method": "ties", **MERGED, "dtype": "float32", "out_dtype": "bfloat16"},
    "ties, not normalized": {"merge_method": "ties", **MERGED, "parameters": {"normalize": False}},
    "dare_linear, density 1": {"merge_method": "dare_linear", **MERGED, "models": WHOLE},
    "slerp": {"base_model": ONE, **SLERP},
    "slerp, another dtype": {"base_model": OTHER, **SLERP, "dtype": "float32", "out_dtype": "float16"},
}


def _make_models(folder: Path, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SMALL)).to(kind)
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for i, name in enumerate((BASE, ONE, OTHER)):
        network.load_state_dict(moved(start, i) if i else start)
        network.save_pretrained(folder / name)


def _distances(one: Path, other: Path) -> dict[str, float | str]:
    """Of two folders the kind of numbers, and how far they lie apart."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(next(other.glob("*.safetensors")))
    worst, equal, beyond, count = 0.0, 0, 0, 0
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        assert a.dtype == b.dtype, (name, a.dtype, b.dtype)
        step = torch.finfo(a.dtype).eps * b.double().abs().max().item()
        apart = (a.double() - b.double()).abs() / step
        worst, count = max(worst, apart.max().item()), count + a.numel()
        equal, beyond = equal + int((a == b).sum()), beyond + int((apart > 2).sum())
    kind = str(a.dtype).removeprefix("torch.")
    numbers = {"largest": worst, "equal": equal / count, "beyond_2": beyond / count}
    return {"merged": kind} | {name: float(f"{number:.4g}") for name, number in numbers.items()}


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each case and kind of the models."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in (torch.float32, torch.bfloat16):
            place = Path(folder) / str(kind)
            _make_models(place, kind)
            for number, values in enumerate(CASES.values()):
                write_text(place / f"{number}.yaml", yaml.safe_dump(values))
            call = [str(options.python), "-c", MERGEKIT, str(len(CASES))]
            answer = subprocess.run(call, cwd=place, capture_output=True, text=True, check=False)
            if answer.returncode:
                raise RuntimeError(f"mergekit failed: {answer.stderr[-1000:]}")
            for number, case in enumerate(CASES):
                soups(["make", str(place / f"{number}.yaml"), "--out", str(place / f"ours{number}")])
                found = _distances(place / f"ours{number}", place / f"theirs{number}")
                rows.append({"method": case, "models": str(kind).removeprefix("torch."), **found})
    return rows


if __name__ == "__main__":
    python = {"type": Path, "required": True, "help": "of an environment that has mergekit 0.1.5"}
    benchmark(measured, python=python)
