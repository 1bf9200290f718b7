"""Fitting a linear probe beside scikit-learn:  python -m benchmarks.probe [--examples 20000] [--classes 1000]

Features of unit length around a centre of each class; one value of C. Ours stops by its own criterion, checked in
float64. scikit-learn's L-BFGS works in float64 on the same threads, once with its default tolerance, with which it
ends far from the optimum, and once with one that brings it there. `above` is how far each ends above the lowest of
the objectives, as a share of it. They take turns in every round; medians are compared.

Writes results/measured/bench_probe.csv, or the file named by --out.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.run import Options, benchmark, in_turns, timed
from models.probe import linear_probe
from store.workers import use_threads

TOLERANCES = (1e-4, 1e-6)  # of scikit-learn, on the largest slope: its default, and what ends within 1e-4 of the loss
ITERATIONS = 10_000  # scikit-learn's at most


def _features(examples: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(examples) % classes
    scale = torch.arange(1, width + 1) ** -0.5
    centres = torch.randn(classes, width, generator=generator) * scale
    noise = torch.randn(examples, width, generator=generator) * scale
    return normalize(centres[labels] + noise + 2 * scale, dim=1), labels


def _objective(weight: Tensor, bias: Tensor, data: tuple[Tensor, Tensor], c: float) -> float:
    """Mean cross-entropy and penalty of a head of more than two classes."""
    features, labels = data[0].double(), data[1]
    penalty = weight.double().square().sum() / (2 * c * len(labels) * features.shape[1])
    return (cross_entropy(features @ weight.double().T + bias.double(), labels) + penalty).item()


def _ours(data: tuple[Tensor, Tensor], classes: int, c: float) -> tuple[Tensor, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        probe = linear_probe(data, (data[0][:1], data[1][:1]), classes, [c], Path(folder))
    return probe.weight, probe.bias


def _theirs(data: tuple[Tensor, Tensor], c: float, tolerance: float) -> tuple[Tensor, Tensor]:
    scale = data[0].shape[1] ** 0.5
    fit = LogisticRegression(C=c, tol=tolerance, max_iter=ITERATIONS)
    fit.fit(scale * data[0].double().numpy(), data[1].numpy())
    return scale * torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)


def measured(options: Options) -> list[dict[str, Any]]:
    """A row for each contender: median seconds, the ratio to ours, and how far it ends above the best."""
    use_threads(options.threads)
    data = _features(options.examples, options.width, options.classes)
    contenders = {"ours": partial(_ours, data, options.classes, options.c)}
    contenders |= {f"scikit-learn, tol={each:g}": partial(_theirs, data, options.c, each) for each in TOLERANCES}
    calls = in_turns({name: partial(timed, fit) for name, fit in contenders.items()}, options.rounds)
    seconds = {name: statistics.median(call.seconds for call in made) for name, made in calls.items()}
    ends = {name: _objective(*made[-1].answer, data, options.c) for name, made in calls.items()}
    return [
        {
            "contender": name,
            "seconds": round(took, 2),
            "times_ours": round(took / seconds["ours"], 2),
            "above": f"{ends[name] / min(ends.values()) - 1:.1e}",
        }
        for name, took in seconds.items()
    ]


if __name__ == "__main__":
    options: dict[str, Any] = {"examples": 20_000, "width": 512, "classes": 1000, "c": 1.0, "threads": 2, "rounds": 1}
    shown = ["contender", *options, "seconds", "times_ours", "above"]
    benchmark(measured, shown=shown, packages=["torch", "scikit-learn"], **options)
