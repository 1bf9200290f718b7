"""Fitting a linear probe beside scikit-learn:  python -m benchmarks.probe [--examples 20000] [--classes 1000]

Features of unit length around a centre of each class; one value of C. Ours stops by its own criterion, checked in
float64. scikit-learn's L-BFGS works in float64 on the same threads, once with its default tolerance, with which it
ends far from the optimum, and once with one that brings it there. `above` is how far each ends above the lowest of
the objectives, as a share of it. They take turns in every round; medians are compared.

Writes results/measured/bench_probe.csv, or the file named by --out.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from models.probe import linear_probe
from soups.errors import one_line_errors
from soups.files.atomic import replacing
from store.provenance import provenance_columns
from store.workers import use_threads

ROOT = Path(__file__).resolve().parents[1]
TOLERANCES = (1e-4, 1e-6)  # of scikit-learn, on the largest slope: its default, and what ends within 1e-4 of the loss
ITERATIONS = 10_000  # scikit-learn's at most


def features_of(examples: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """(N, width) features and (N,) labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(examples) % classes
    scale = torch.arange(1, width + 1) ** -0.5
    centres = torch.randn(classes, width, generator=generator) * scale
    noise = torch.randn(examples, width, generator=generator) * scale
    return normalize(centres[labels] + noise + 2 * scale, dim=1), labels


def objective(weight: Tensor, bias: Tensor, data: tuple[Tensor, Tensor], c: float) -> float:
    """Mean cross-entropy and penalty of a head of more than two classes."""
    features, labels = data[0].double(), data[1]
    penalty = weight.double().square().sum() / (2 * c * len(labels) * features.shape[1])
    return (cross_entropy(features @ weight.double().T + bias.double(), labels) + penalty).item()


def ours(data: tuple[Tensor, Tensor], classes: int, c: float) -> tuple[Tensor, Tensor]:
    """The head of our fit, files of it included."""
    with tempfile.TemporaryDirectory() as folder:
        probe = linear_probe(data, (data[0][:1], data[1][:1]), classes, [c], Path(folder))
    return probe.weight, probe.bias


def theirs(data: tuple[Tensor, Tensor], c: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """The head of scikit-learn's fit."""
    scale = data[0].shape[1] ** 0.5
    fit = LogisticRegression(C=c, tol=tolerance, max_iter=ITERATIONS)
    fit.fit(scale * data[0].double().numpy(), data[1].numpy())
    return scale * torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)


def measure(shape: tuple[int, int, int], c: float, rounds: int) -> pd.DataFrame:
    """One row a contender: median seconds, the ratio to ours, and how far above the best of the ends its own is.

    Args:
        shape: examples, width, classes.
        c: inverse regularisation.
        rounds: of all.
    """
    data = features_of(*shape)
    contenders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"ours": lambda: ours(data, shape[2], c)}
    contenders |= {f"scikit-learn, tol={each:g}": partial(theirs, data, c, each) for each in TOLERANCES}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    ends: dict[str, float] = {}
    for _ in range(rounds):
        for name, fit in contenders.items():
            started = time.perf_counter()
            head = fit()
            seconds[name].append(time.perf_counter() - started)
            ends[name] = objective(*head, data, c)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return pd.DataFrame(
        {
            "contender": name,
            "examples": shape[0],
            "width": shape[1],
            "classes": shape[2],
            "c": c,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "seconds": round(median, 2),
            "times_ours": round(median / medians["ours"], 2),
            "above": f"{ends[name] / min(ends.values()) - 1:.1e}",
            **provenance_columns("torch", "scikit-learn"),
        }
        for name, median in medians.items()
    )


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--c", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results/measured/bench_probe.csv")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    shape = (arguments.examples, arguments.width, arguments.classes)
    table = measure(shape, arguments.c, arguments.rounds)
    with replacing(arguments.out) as temporary:
        table.to_csv(temporary, index=False)
    print(table.loc[:, :"above"].to_string(index=False))
    print(arguments.out)


if __name__ == "__main__":
    one_line_errors(main)
