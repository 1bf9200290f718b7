"""Figures 2 and J.1: loss and error in the plane through the initialisation and two fine-tuned models.

The weights at every point of a grid are evaluated on examples of the training split, on test and on the shifts. A chunk
of examples is read and decoded once and shown to the weights of all points, one after the other; its answers are one
file in runs/<name>/landscape/<split>/, so that a killed run goes on with the next chunk, and workers share the chunks.

Coordinates are distances over all parameters, which batch-norm statistics are none of. In the project's models these
are frozen (model.frozen_batch_norm) and so the same in the whole plane, and nothing needs to be measured anew.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich import get_console
from torch import Tensor

from analysis.measure.methods import SHIFT_MEAN
from analysis.measure.mixtures import do_missing
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator, forward
from soups.average import rounded
from soups.chance import uniform
from soups.conformance import common_layout
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of
from soups.files.opening import opened
from soups.files.weights import Weights
from soups.geometry import geometry
from soups.scorers.metrics import score
from store.arrays import cached_array
from store.runs import Ingredient

Shares = tuple[float, float, float]  # coefficients of theta_0, theta_1 and theta_2 at a point; they sum to 1
FLAT = 1e-6  # share of theta_2's way out of the line below which three models make no plane
TIMED = 64  # images of the forward pass by which the whole is estimated


@dataclass(frozen=True)
class Plane:
    """x and y are distances from theta_0 along u1 and u2: u1 points to theta_1, and u2 is what is left of the way to
    theta_2, of unit length.
    """

    first: float  # theta_1 is at (first, 0)
    second: tuple[float, float]  # theta_2, with y > 0

    @property
    def models(self) -> tuple[tuple[float, float], ...]:
        """(x, y) of theta_0, theta_1 and theta_2."""
        return (0.0, 0.0), (self.first, 0.0), self.second

    def shares(self, x: float, y: float) -> Shares:
        """The weights at a point as a sum of the three models; exactly one of them at its own place.

        >>> Plane(2.0, (1.0, 4.0)).shares(1.0, 4.0), Plane(2.0, (1.0, 4.0)).shares(1.0, 0.0)
        ((0.0, 0.0, 1.0), (0.5, 0.5, 0.0))
        """
        of_second = y / self.second[1]
        of_first = (x - of_second * self.second[0]) / self.first
        return 1 - of_first - of_second, of_first, of_second


def plane_through(products: NDArray[np.float64]) -> Plane:
    """The plane of two models and what they started from, by Gram-Schmidt.

    Args:
        products: (2, 2) inner products of theta_1 - theta_0 and theta_2 - theta_0, from `soups.geometry`.

    Raises:
        ValueError: the three are on one line.

    Source: Garipov et al. 2018, Appendix A.2; Figure 2.

    >>> plane_through(np.array([[4.0, 2.0], [2.0, 17.0]]))
    Plane(first=2.0, second=(1.0, 4.0))
    """
    first = sqrt(products[0, 0])
    along = products[0, 1] / first if first > 0 else 0.0
    rest = products[1, 1] - along**2
    if first == 0 or rest <= FLAT**2 * products[1, 1]:
        raise ValueError("the three models are on one line, which spans no plane")
    return Plane(float(first), (float(along), sqrt(rest)))


def axes_of(plane: Plane, size: int, longest: int, margin: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y of a grid that reaches `margin` times the models' own extent beyond them on each side.

    The axis along which the models reach less far has `size` points. The other has as many as give it the same spacing,
    but no more than `longest` and no fewer than `size`: a model far away would else stretch the grid over a basin.
    """
    ends = [(min(places), max(places)) for places in zip(*plane.models, strict=True)]
    extents = [high - low for low, high in ends]
    both = []
    for (low, high), extent in zip(ends, extents, strict=True):
        wanted = round((size - 1) * extent / min(extents)) + 1
        both.append(np.linspace(low - margin * extent, high + margin * extent, max(size, min(wanted, longest))))
    return both[0], both[1]


def moving(models: Sequence[Weights]) -> list[str]:
    """The floating-point tensors that are not the same in all models; the others are the same in the whole plane."""
    first, *others = models
    return [
        name
        for name, tensor in first.items()
        if tensor.is_floating_point() and not all(torch.equal(tensor, other[name]) for other in others)
    ]


@torch.no_grad()
def set_between(state: Mapping[str, Tensor], models: Sequence[Weights], shares: Sequence[float]) -> None:
    """Overwrite a network's tensors by a weighted sum of models, in float64 and rounded once.

    Args:
        state: of the network, whose memory is written to; names that the models lack are left as they are.
        models: K models with the same names, on the network's device.
        shares: K numbers that sum to 1, of any sign.
    """
    for name in models[0]:
        total = torch.zeros_like(models[0][name], dtype=torch.float64)
        for share, model in zip(shares, models, strict=True):
            if share:
                total += share * model[name].double()
        state[name].copy_(rounded(total, models[0][name].dtype))


@dataclass(frozen=True)
class Slice:
    """A plane of one experiment, and the points of it that are evaluated."""

    models: tuple[Ingredient, Ingredient, Ingredient]  # theta_0, theta_1, theta_2
    plane: Plane
    points: tuple[tuple[float, float], ...]  # (x, y): the three models, then the grid, x fastest
    grid: tuple[int, int, float]  # points along x and y, and the margin: from these all points follow

    @property
    def shares(self) -> list[Shares]:
        """Each point's shares of the three models."""
        return [self.plane.shares(x, y) for x, y in self.points]

    @property
    def name(self) -> str:
        """Names all weights that are evaluated, by what they follow from.

        Not by the coordinates, whose last digits depend on the machine that summed them.
        """
        return digest_of({"models": [each.digest for each in self.models], "grid": self.grid})


@dataclass(frozen=True)
class Chunk:
    """Examples of a split that are evaluated together."""

    split: str
    rows: Tensor  # (n,)

    def path(self, evaluator: Evaluator, piece: Slice) -> Path:
        """Where the answers of all points are."""
        return evaluator.place("landscape", self.split, digest_of([piece.name, digest_of(self.rows.tolist())]))


def slices(config: Experiment) -> list[Slice]:
    """The planes of `analysis.plane.rows` and their points.

    Raises:
        UserError: the sweep is not finished; a row is not in it, or diverged; three models are on one line.
    """
    pool = {each.row: each for each in usable_pool(config)}
    return [_slice(config, pool, pair) for pair in config.analysis.plane.rows]


def _slice(config: Experiment, pool: dict[int, Ingredient], pair: tuple[int, int]) -> Slice:
    absent = [row for row in (0, *pair) if row not in pool]
    if absent:
        raise UserError(
            f"analysis.plane.rows: {config.name} has no row {absent[0]} that did not diverge; take two of "
            f"{sorted(pool.keys() - {0})}"
        )
    zero, one, two = pool[0], pool[pair[0]], pool[pair[1]]
    with opened([each.folder / "weights.safetensors" for each in (zero, one, two)]) as (start, *tuned):
        products = geometry(tuned, common_layout([start, *tuned]), start).products
    try:
        plane = plane_through(products)
    except ValueError as error:
        raise UserError(f"analysis.plane.rows={list(pair)}: {error}; take two other rows") from None
    settings = config.analysis.plane
    xs, ys = axes_of(plane, settings.size, settings.longest, settings.margin)
    grid = [(float(x), float(y)) for y in ys for x in xs]
    return Slice((zero, one, two), plane, (*plane.models, *grid), (len(xs), len(ys), settings.margin))


@lru_cache(maxsize=4)
def training_rows(n: int, count: int, seed: int) -> Tensor:
    """(min(n, count),) which of n training examples the loss is measured on; a larger count keeps those there were."""
    if count >= n:
        return torch.arange(n)
    chances = np.array([uniform("plane", seed, row) for row in range(n)])
    return torch.from_numpy(np.sort(np.argpartition(chances, count)[:count]))


def evaluated_rows(evaluator: Evaluator, split: str) -> Tensor:
    """(n,) the examples of a split that are evaluated, in the order in which they are."""
    order, config = evaluator.order(split), evaluator.config
    if split != config.task.train:
        return order
    settings = config.analysis
    return order[torch.isin(order, training_rows(len(order), settings.plane.train_examples, settings.seed))]


def chunks(evaluator: Evaluator) -> list[Chunk]:
    """All examples that are evaluated, split by split."""
    task, size = evaluator.config.task, evaluator.config.analysis.plane.chunk
    return [
        Chunk(split, rows)
        for split in (task.train, *task.reported)
        for rows in evaluated_rows(evaluator, split).split(size)
    ]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) cross-entropies in nats, NaN where a point far out has logits that are no numbers."""
    return -logits.double().log_softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)


def _answers(
    evaluator: Evaluator, piece: Slice, weights: Callable[[], list[dict[str, Tensor]]], chunk: Chunk
) -> Tensor:
    """(P, n) float32: of training examples their losses, of others the class ids that are predicted, at P points."""
    device, is_train = evaluator.processes.device, chunk.split == evaluator.config.task.train
    models = weights()
    batches = [batch.to(device) for batch in evaluator.batches(chunk.split, chunk.rows)]
    labels, state = evaluator.split(chunk.split).labels[chunk.rows], evaluator.model.state_dict()
    found = []
    for shares in piece.shares:
        set_between(state, models, shares)
        logits = forward(evaluator.model, batches, evaluator.config.compute.evaluates_in)
        found.append(_losses(logits, labels) if is_train else evaluator.predicted(logits, chunk.split))
    return torch.stack(found).float()


def _measure(config: Experiment, piece: Slice, mine: Sequence[Chunk]) -> str:
    """Answer some chunks at all points."""
    evaluator = Evaluator(config)

    @cache
    def weights() -> list[dict[str, Tensor]]:
        models = [each.load() for each in piece.models]
        evaluator.model.load_state_dict(models[0], strict=True)
        names, device = moving(models), evaluator.processes.device
        return [{name: model[name].to(device) for name in names} for model in models]

    for chunk in mine:
        shape = (len(piece.points), len(chunk.rows))
        cached_array(chunk.path(evaluator, piece), shape, partial(_answers, evaluator, piece, weights, chunk))
    return f"rows {piece.models[1].row} and {piece.models[2].row}: {len(mine)} chunks of examples at all points"


def estimate(config: Experiment, evaluator: Evaluator, pieces: Sequence[Slice]) -> str:
    """What is left to measure and about how long it takes, from a forward pass that is timed on a few images."""
    every = [(piece, chunk) for piece in pieces for chunk in chunks(evaluator)]
    left = [(len(piece.points), chunk) for piece, chunk in every if not chunk.path(evaluator, piece).exists()]
    if not left:
        return "all points of the planes are measured: they are drawn from disk"
    number = sum(points * len(chunk.rows) for points, chunk in left)
    split, rows = left[0][1].split, left[0][1].rows[:TIMED]
    batches = [batch.to(evaluator.processes.device) for batch in evaluator.batches(split, rows)]
    forward(evaluator.model, batches, config.compute.evaluates_in)  # the first pass is slower than the others
    started = time.perf_counter()
    forward(evaluator.model, batches, config.compute.evaluates_in)
    seconds = (time.perf_counter() - started) / len(rows) * number / config.cluster.workers
    planes = f"{len(pieces)} plane{'s' if len(pieces) > 1 else ''} of {len(pieces[0].points)} points"
    return (
        f"{planes}: {number:,} forward passes, about {seconds:.0f} s by the time of {len(rows)} "
        "(analysis.plane.size=5 measures fewer points); what is measured is kept"
    )


def _on_split(evaluator: Evaluator, piece: Slice, split: str) -> Iterator[Tensor]:
    """(n,) answers on all examples that are evaluated, point by point."""
    parts = [
        cached_array(chunk.path(evaluator, piece), (len(piece.points), len(chunk.rows)), lambda: torch.empty(0))
        for chunk in chunks(evaluator)
        if chunk.split == split
    ]
    for point in range(len(piece.points)):
        yield torch.cat([part[point] for part in parts])


def slice_table(evaluator: Evaluator, piece: Slice) -> pd.DataFrame:
    """One row per point of a plane whose chunks are all on disk.

    Columns: first, second (rows of theta_1 and theta_2), point (initialisation, first, second or grid), x, y, share_0,
    share_1, share_2 (of the three models), train_loss (nats), train_n, one of error_<split> for each split that
    reports, and error_shift_mean (fractions).
    """
    task, (_, first, second) = evaluator.config.task, piece.models
    table = pd.DataFrame(piece.points, columns=["x", "y"])
    table.insert(0, "point", ["initialisation", "first", "second"] + ["grid"] * (len(piece.points) - 3))
    table.insert(0, "second", second.row)
    table.insert(0, "first", first.row)
    table[["share_0", "share_1", "share_2"]] = piece.shares
    table["train_loss"] = [losses.double().mean().item() for losses in _on_split(evaluator, piece, task.train)]
    table["train_n"] = len(evaluated_rows(evaluator, task.train))
    for split in task.reported:
        images, rows, metric = evaluator.split(split), evaluated_rows(evaluator, split), task.metrics.get(split, "top1")
        groups = None if images.groups is None else images.groups[rows]
        table[f"error_{split}"] = [
            1 - score(metric, predicted.long(), images.labels[rows], groups)
            for predicted in _on_split(evaluator, piece, split)
        ]
    if task.shifts:
        table[f"error_{SHIFT_MEAN}"] = table[[f"error_{split}" for split in task.shifts]].mean(axis=1)
    return table


def measure_landscape(config: Experiment) -> pd.DataFrame:
    """The numbers of Figures 2 and J.1: `slice_table` of each plane; says first about how long they take.

    Raises:
        UserError: the sweep is not finished, or `analysis.plane.rows` are not three models of a plane.
    """
    evaluator, pieces = Evaluator(config), slices(config)
    get_console().print(estimate(config, evaluator, pieces), highlight=False)
    for piece in pieces:

        def is_done(chunk: Chunk, piece: Slice = piece) -> bool:
            return chunk.path(evaluator, piece).exists()

        title = f"{len(piece.points)} points of the plane, {{}} chunks of examples"
        do_missing(config, title, chunks(evaluator), partial(_measure, config, piece), is_done)
    return pd.concat([slice_table(evaluator, piece) for piece in pieces], ignore_index=True)
