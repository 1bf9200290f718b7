"""d^2/da^2 of the loss between two models, ours beside others:  python -m benchmarks.curvature [--rounds 5]

A ViT-S/32 of timm with random weights (23 M parameters), a direction of all of them, a batch of noise. Contenders:

forward           the loss alone, a floor
differences       the losses a tenth of the way before and after, and a central difference: not exact
ours              exact, by forward mode within forward mode (`analysis.theory.derivatives`)
double_backward   a Hessian-vector product as PyHessian takes it, and its inner product with the direction
curvlinops        the product of its HessianLinearOperator, and the same inner product

They take turns in every round, in one process and on the same data; seconds are medians, of the clock and of the
processor (all threads), which other work beside it disturbs less. Peak extra memory is that of a process of its own:
the most of RssAnon during the contender's second call, looked at every 2 ms, above what there was before it (network,
direction and, from its first call, the library's code). Every contender's answer stands beside its time. That of
curvlinops is a jvp of a gradient, which torch 2.14 gets wrong in the native layer norm; with these weights, little so.

Writes results/measured/bench_curvature.csv, or the file named by --out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import timm
import torch
import torch.nn.functional as F
from curvlinops import HessianLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.theory.derivatives import along
from analysis.theory.equation import Line, central_difference, curvature
from soups.errors import one_line_errors
from soups.files.atomic import replacing
from store.provenance import provenance_columns
from store.workers import little_memory

ROOT = Path(__file__).resolve().parents[1]
STEP = 0.1  # of the differences, the grid of Appendix K
EXACT = "double_backward"  # whose answer the others' are compared with


@dataclass(frozen=True)
class Problem:
    """The loss of one batch along a line through all parameters."""

    network: nn.Module
    direction: dict[str, Tensor]  # delta, by parameter
    inputs: Tensor
    labels: Tensor

    def loss(self) -> Tensor:
        """At the middle."""
        return F.cross_entropy(self.network(self.inputs), self.labels)

    @torch.no_grad()
    def loss_at(self, step: float) -> float:
        """A step along the line from there."""
        moved = {name: p + step * self.direction[name] for name, p in self.network.named_parameters()}
        return F.cross_entropy(torch.func.functional_call(self.network, moved, (self.inputs,)), self.labels).item()


def problem(name: str, batch: int) -> Problem:
    """The same for the same arguments."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=1000).eval()
    size = network.pretrained_cfg["input_size"]
    direction = {n: 0.3 * p.std().nan_to_num(0.0) * torch.randn_like(p) for n, p in network.named_parameters()}
    return Problem(
        network,
        {name: step.detach() for name, step in direction.items()},
        torch.randn(batch, *size),
        torch.randint(0, 1000, (batch,)),
    )


def forward(p: Problem) -> float:
    """No derivative."""
    with torch.no_grad():
        return p.loss().item()


def differences(p: Problem) -> float:
    """Three forward passes."""
    return central_difference([p.loss_at(step) for step in (-STEP, 0.0, STEP)], 1, STEP)[0]


def ours(p: Problem) -> float:
    """One pass with both derivatives."""
    return curvature(Line(*along(p.network, p.network.state_dict(), p.direction, p.inputs)), p.labels, 1.0).total


def _inner(p: Problem, product: tuple[Tensor, ...]) -> float:
    return sum((step * part).sum().item() for step, part in zip(p.direction.values(), product, strict=True))


def double_backward(p: Problem) -> float:
    """The gradient with its graph, and the gradient of its inner product with the direction."""
    parameters = tuple(p.network.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        gradient = torch.autograd.grad(p.loss(), parameters, create_graph=True)
        return _inner(p, torch.autograd.grad(gradient, parameters, tuple(p.direction.values())))


def curvlinops(p: Problem) -> float:
    """Its operator is made each time, which costs nothing."""
    parameters, data = list(p.network.parameters()), [(p.inputs, p.labels)]
    with sdpa_kernel(SDPBackend.MATH):
        hessian = HessianLinearOperator(
            p.network, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False, num_data=len(p.labels)
        )
        return _inner(p, tuple(hessian @ list(p.direction.values())))


CONTENDERS: dict[str, Callable[[Problem], float]] = {
    "forward": forward,
    "differences": differences,
    "ours": ours,
    "double_backward": double_backward,
    "curvlinops": curvlinops,
}


def anonymous() -> float:
    """MiB that this process has for itself."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def extra_memory(p: Problem, contender: str) -> float:
    """MiB at the peak of a call above what there was before it."""
    with little_memory():
        CONTENDERS[contender](p)
        before, seen, done = anonymous(), [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                seen.append(anonymous() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        CONTENDERS[contender](p)
        done.set()
        watcher.join()
    return max(seen)


def table(arguments: argparse.Namespace) -> pd.DataFrame:
    """A row for each contender."""
    p = problem(arguments.network, arguments.batch)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    processor: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    load = os.getloadavg()[0]
    answers: dict[str, float] = {}
    for _ in range(arguments.rounds + 1):
        for name, contender in CONTENDERS.items():
            started, used = time.perf_counter(), time.process_time()
            answers[name] = contender(p)
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - used)
    took, worked = (  # the first call asks for memory
        {name: statistics.median(times[1:]) for name, times in kind.items()} for kind in (seconds, processor)
    )
    memory = {name: _extra_of_a_process(arguments, name) for name in CONTENDERS}
    rows = [
        {
            "contender": name,
            "network": arguments.network,
            "parameters": sum(parameter.numel() for parameter in p.network.parameters()),
            "batch_size": arguments.batch,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "load_before": round(load, 2),
            "seconds": round(took[name], 3),
            "fastest_seconds": round(min(seconds[name][1:]), 3),
            "slowest_seconds": round(max(seconds[name][1:]), 3),
            "times_double_backward": round(took[name] / took[EXACT], 3),
            "processor_seconds": round(worked[name], 3),
            "processor_of_double_backward": round(worked[name] / worked[EXACT], 3),
            "peak_extra_mib": round(memory[name], 1),
            "memory_of_double_backward": round(memory[name] / memory[EXACT], 3) if memory[EXACT] else None,
            "answer": answers[name],
            "off_percent": None if name == "forward" else round(100 * (answers[name] / answers[EXACT] - 1), 4),
            **provenance_columns("torch", "timm"),
        }
        for name in CONTENDERS
    ]
    return pd.DataFrame(rows)


def _extra_of_a_process(arguments: argparse.Namespace, contender: str) -> float:
    options = {"network": arguments.network, "batch": arguments.batch, "threads": arguments.threads, "child": contender}
    command = [sys.executable, "-m", "benchmarks.curvature"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_small_patch32_224", help="of timm")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_curvature.csv")
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(extra_memory(problem(arguments.network, arguments.batch), arguments.child)))
        return
    found = table(arguments)
    with replacing(arguments.out) as temporary:
        found.to_csv(temporary, index=False)
    print(found.loc[:, "seconds":"off_percent"].set_index(found.contender).T)
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
