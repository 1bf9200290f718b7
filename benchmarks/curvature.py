"""d^2/da^2 of the loss between two models, ours beside others:  python -m benchmarks.curvature [--rounds 5]

A ViT-S/32 of timm with random weights (23 M parameters), a direction of all of them, a batch of noise. Contenders:

forward           the loss alone, a floor
differences       the losses a tenth of the way before and after, and a central difference: not exact
ours              exact, by forward mode within forward mode (`analysis.theory.equation`)
double_backward   a Hessian-vector product as PyHessian takes it, and its inner product with the direction
curvlinops        the product of its HessianLinearOperator, and the same inner product

They take turns in every round, in one process and on the same data; seconds are medians, of the clock and of the
processor (all threads), which other work beside it disturbs less. Peak extra memory is that of a process of its own:
the most of RssAnon during the contender's second call, looked at every 2 ms, above what there was before it (network,
direction and, from its first call, the library's code). Every contender's answer stands beside its time. That of
curvlinops is a jvp of a gradient, which torch 2.14 gets wrong in the native layer norm; with these weights, little so.

Writes results/measured/bench_curvature.csv, or the file named by --out.
"""

import os
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from curvlinops import HessianLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.theory.equation import along, central_difference, curvature
from benchmarks.run import Options, anonymous_mib, benchmark, in_turns, middle, process_of, run, timed
from store.workers import little_memory

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
    return curvature(along(p.network, p.network.state_dict(), p.direction, p.inputs), p.labels, 1.0)


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


def extra_memory(contender: str, network: str, batch: int, threads: int) -> None:
    """Print how many MiB there are at the peak of a second call above what there was before it."""
    torch.set_num_threads(threads)
    p = problem(network, batch)
    with little_memory():
        CONTENDERS[contender](p)
        before, seen, done = anonymous_mib(os.getpid()), [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                seen.append(anonymous_mib(os.getpid()) - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        CONTENDERS[contender](p)
        done.set()
        watcher.join()
    print(max(seen))


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each contender: medians over rounds, of which the first, that asks for memory, does not count."""
    torch.set_num_threads(options.threads)
    p, load = problem(options.network, options.batch), os.getloadavg()[0]
    contenders = {name: partial(timed, partial(contender, p)) for name, contender in CONTENDERS.items()}
    calls = {name: made[1:] for name, made in in_turns(contenders, options.rounds + 1).items()}
    seconds = {name: [call.seconds for call in made] for name, made in calls.items()}
    took = {name: statistics.median(each) for name, each in seconds.items()}
    worked = {name: statistics.median(call.processor_seconds for call in made) for name, made in calls.items()}
    answers, memory = {name: made[-1].answer for name, made in calls.items()}, {}
    for name in CONTENDERS:
        call = process_of("curvature", "extra_memory", name, options.network, options.batch, options.threads)
        memory[name] = float(run(call).printed.splitlines()[-1])
    return [
        {
            "contender": name,
            "parameters": sum(parameter.numel() for parameter in p.network.parameters()),
            "load_before": round(load, 2),
            **middle("seconds", seconds[name], 3),
            "times_double_backward": round(took[name] / took[EXACT], 3),
            "processor_seconds": round(worked[name], 3),
            "processor_of_double_backward": round(worked[name] / worked[EXACT], 3),
            "peak_extra_mib": round(memory[name], 1),
            "memory_of_double_backward": round(memory[name] / memory[EXACT], 3) if memory[EXACT] else None,
            "answer": answers[name],
            "off_percent": None if name == "forward" else round(100 * (answers[name] / answers[EXACT] - 1), 4),
        }
        for name in CONTENDERS
    ]


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["contender", "seconds", "times_double_backward", "peak_extra_mib", "off_percent"],
        packages=["torch", "timm"],
        network=("vit_small_patch32_224", "of timm"),
        batch=(16, "images"),
        rounds=5,
        threads=(2, "torch threads"),
    )
