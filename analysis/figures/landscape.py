"""Figures 2 and J.1: loss and error in the plane through the initialisation and two fine-tuned models.

A chunk of examples of the training, test or a shift split is read once and shown to the weights of all points of a
grid; its answers are one file in runs/<name>/landscape/<split>/, so that a killed run goes on with the next chunk.

Coordinates are distances over all parameters, which batch-norm statistics are none of. In the project's models these
are frozen (model.frozen_batch_norm) and so the same in the whole plane, and nothing needs to be measured anew.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray
from rich import get_console
from torch import Tensor

from analysis.figures.style import panels, styled
from analysis.measure.methods import SHIFT_MEAN
from analysis.measure.mixtures import axis_labels, do_missing
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
from store.rows import draw
from store.runs import Ingredient

Places = tuple[tuple[float, float], ...]  # (x, y)
Shares = tuple[float, float, float]  # of theta_0, theta_1 and theta_2 at a point; they sum to 1
FLAT = 1e-6  # share of theta_2's way out of the line below which three models make no plane
TIMED = 64  # images of the forward pass by which the whole is estimated
ERRORS = {"top-1 accuracy": "top-1 error"}
STRIP = 3.0  # how much higher than wide a plane has to be
ASINH_TICKS = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 200, 500)  # distances
LEVELS = 12
NEAREST = 1 / 128  # log scales: distance of the first contour to the least value, as a share of the range
MARKERS = (("*", 70), ("o", 26), ("o", 26))  # theta_0, theta_1, theta_2


def plane_through(products: NDArray[np.float64]) -> Places:
    """Where theta_0, theta_1 and theta_2 are in their plane, from `soups.geometry`'s (2, 2) products of task vectors.

    x and y are distances from theta_0 along u1 and u2: u1 points to theta_1, and u2 is what is left of the way to
    theta_2, of unit length (Garipov et al. 2018, Appendix A.2).

    Raises:
        ValueError: the three are on one line.
    """
    first = sqrt(products[0, 0])
    along = products[0, 1] / first if first > 0 else 0.0
    rest = products[1, 1] - along**2
    if first == 0 or rest <= FLAT**2 * products[1, 1]:
        raise ValueError("the three models are on one line, which spans no plane")
    return (0.0, 0.0), (float(first), 0.0), (float(along), sqrt(rest))


def shares_at(models: Places, x: float, y: float) -> Shares:
    """The weights at a point as a sum of three models; exactly one of them at its own place."""
    _, (first, _), second = models
    of_second = y / second[1]
    of_first = (x - of_second * second[0]) / first
    return 1 - of_first - of_second, of_first, of_second


def axes_of(models: Places, size: int, longest: int, margin: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y of a grid that reaches `margin` times the models' own extent beyond them on each side.

    The axis along which the models reach less far has `size` points. The other has as many as give it the same spacing,
    from `size` to `longest`: a model far away would else stretch the grid over a basin.
    """
    ends = [(min(places), max(places)) for places in zip(*models, strict=True)]
    extents = [high - low for low, high in ends]
    both = []
    for (low, high), extent in zip(ends, extents, strict=True):
        wanted = round((size - 1) * extent / min(extents)) + 1
        both.append(np.linspace(low - margin * extent, high + margin * extent, max(size, min(wanted, longest))))
    return both[0], both[1]


@torch.no_grad()
def set_between(state: Mapping[str, Tensor], models: Sequence[Weights], shares: Sequence[float]) -> None:
    """Overwrite a network's tensors in place by a weighted sum of K models, in float64 and rounded once.

    Names that the models lack are left as they are; the K shares sum to 1, and are of any sign.
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
    points: Places  # the three models, then the grid, x fastest
    shares: tuple[Shares, ...]  # at each point
    grid: tuple[int, int, float]  # points along x and y, and the margin: from these all points follow

    @property
    def name(self) -> str:
        """Names all weights that are evaluated, by what they follow from.

        Not by the coordinates, whose last digits depend on the machine that summed them.
        """
        return digest_of({"models": [each.digest for each in self.models], "grid": self.grid})


@dataclass(frozen=True)
class Chunk:
    """Examples of a split that are evaluated together, at all points of a plane."""

    piece: Slice
    split: str
    rows: Tensor  # (n,)

    def path(self, evaluator: Evaluator) -> Path:
        """Where the answers are."""
        return evaluator.place("landscape", self.split, digest_of([self.piece.name, digest_of(self.rows.tolist())]))


def slices(config: Experiment) -> list[Slice]:
    """The planes of `analysis.plane.rows` and their points."""
    settings, pool = config.analysis.plane, {each.row: each for each in usable_pool(config)}
    found = []
    for pair in settings.rows:
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
            places = plane_through(products)
        except ValueError as error:
            raise UserError(f"analysis.plane.rows={list(pair)}: {error}; take two other rows") from None
        xs, ys = axes_of(places, settings.size, settings.longest, settings.margin)
        points = (*places, *((float(x), float(y)) for y in ys for x in xs))
        shares = tuple(shares_at(places, x, y) for x, y in points)
        found.append(Slice((zero, one, two), points, shares, (len(xs), len(ys), settings.margin)))
    return found


@lru_cache(maxsize=4)
def training_rows(n: int, count: int, seed: int) -> Tensor:
    """(min(n, count),) which of n training examples the loss is measured on; a larger count keeps those there were."""
    if count >= n:
        return torch.arange(n)
    chances = np.array([uniform("plane", seed, row) for row in range(n)])
    return torch.from_numpy(np.sort(np.argpartition(chances, count)[:count]))


def _evaluated_rows(evaluator: Evaluator, split: str) -> Tensor:
    """(n,) the examples of a split that are evaluated, in the order in which they are."""
    order, config = evaluator.order(split), evaluator.config
    if split != config.task.train:
        return order
    kept = training_rows(len(order), config.analysis.plane.train_examples, config.analysis.seed)
    return order[torch.isin(order, kept)]


def _chunks(evaluator: Evaluator, piece: Slice) -> list[Chunk]:
    """All examples that are evaluated, split by split."""
    task, size = evaluator.config.task, evaluator.config.analysis.plane.chunk
    splits = (task.train, *task.reported)
    return [Chunk(piece, split, rows) for split in splits for rows in _evaluated_rows(evaluator, split).split(size)]


def _weights_of(evaluator: Evaluator, piece: Slice) -> list[dict[str, Tensor]]:
    """The tensors of a plane's three models that move in it; the network gets the others."""
    models = [each.load() for each in piece.models]
    evaluator.model.load_state_dict(models[0], strict=True)
    names = [
        name
        for name, tensor in models[0].items()
        if tensor.is_floating_point() and not all(torch.equal(tensor, other[name]) for other in models[1:])
    ]
    return [{name: model[name].to(evaluator.processes.device) for name in names} for model in models]


def _answers(evaluator: Evaluator, weights: Callable[[], list[dict[str, Tensor]]], chunk: Chunk) -> Tensor:
    """(P, n) float32: of training examples their losses, of others the class ids that are predicted, at P points."""

    def compute() -> Tensor:
        models, found = weights(), []
        batches = [batch.to(evaluator.processes.device) for batch in evaluator.batches(chunk.split, chunk.rows)]
        labels, state = evaluator.split(chunk.split).labels[chunk.rows], evaluator.model.state_dict()
        for shares in chunk.piece.shares:
            set_between(state, models, shares)
            logits = forward(evaluator.model, batches, evaluator.config.compute.evaluates_in)
            if chunk.split == evaluator.config.task.train:  # NaN where a point far out has logits that are no numbers
                found.append(-logits.double().log_softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1))
            else:
                found.append(evaluator.predicted(logits, chunk.split))
        return torch.stack(found).float()

    return cached_array(chunk.path(evaluator), (len(chunk.piece.points), len(chunk.rows)), compute)


def _measure(config: Experiment, mine: Sequence[Chunk]) -> str:
    evaluator, piece = Evaluator(config), mine[0].piece
    weights = cache(partial(_weights_of, evaluator, piece))
    for chunk in mine:
        _answers(evaluator, weights, chunk)
    return f"rows {piece.models[1].row} and {piece.models[2].row}: {len(mine)} chunks of examples at all points"


def _estimate(evaluator: Evaluator, pieces: Sequence[Slice]) -> str:
    """What is left to measure and about how long it takes, from a forward pass that is timed on a few images."""
    config, every = evaluator.config, [chunk for piece in pieces for chunk in _chunks(evaluator, piece)]
    left = [chunk for chunk in every if not chunk.path(evaluator).exists()]
    if not left:
        return "all points of the planes are measured: they are drawn from disk"
    number = sum(len(chunk.piece.points) * len(chunk.rows) for chunk in left)
    rows = left[0].rows[:TIMED]
    batches = [batch.to(evaluator.processes.device) for batch in evaluator.batches(left[0].split, rows)]
    forward(evaluator.model, batches, config.compute.evaluates_in)  # the first pass is slower than the others
    started = time.perf_counter()
    forward(evaluator.model, batches, config.compute.evaluates_in)
    seconds = (time.perf_counter() - started) / len(rows) * number / config.cluster.workers
    planes = f"{len(pieces)} plane{'s' if len(pieces) > 1 else ''} of {len(pieces[0].points)} points"
    return (
        f"{planes}: {number:,} forward passes, about {seconds:.0f} s by the time of {len(rows)} "
        "(analysis.plane.size=5 measures fewer points); what is measured is kept"
    )


def _slice_table(evaluator: Evaluator, piece: Slice) -> pd.DataFrame:
    """One row per point of a plane whose chunks are all on disk."""
    task, (_, first, second) = evaluator.config.task, piece.models
    weights, chunks = cache(partial(_weights_of, evaluator, piece)), _chunks(evaluator, piece)

    def at_points(split: str) -> list[Tensor]:
        """(n,) answers on all examples that are evaluated, point by point."""
        parts = [_answers(evaluator, weights, chunk) for chunk in chunks if chunk.split == split]
        return [torch.cat([part[point] for part in parts]) for point in range(len(piece.points))]

    places = ["initialisation", "first", "second"] + ["grid"] * (len(piece.points) - 3)
    table = pd.DataFrame({"first": first.row, "second": second.row, "point": places})
    table[["x", "y"]] = piece.points
    table[["share_0", "share_1", "share_2"]] = piece.shares
    table["train_loss"] = [losses.double().mean().item() for losses in at_points(task.train)]
    table["train_n"] = len(_evaluated_rows(evaluator, task.train))
    for split in task.reported:
        images, rows = evaluator.split(split), _evaluated_rows(evaluator, split)
        metric, groups = task.metrics.get(split, "top1"), None if images.groups is None else images.groups[rows]
        scores = [score(metric, each.long(), images.labels[rows], groups) for each in at_points(split)]
        table[f"error_{split}"] = [1 - each for each in scores]
    if task.shifts:
        table[f"error_{SHIFT_MEAN}"] = table[[f"error_{split}" for split in task.shifts]].mean(axis=1)
    return table


def measure_landscape(config: Experiment) -> pd.DataFrame:
    """The numbers of Figures 2 and J.1, one row per plane and point; says first about how long they take.

    Columns: first, second (rows of theta_1 and theta_2), point (initialisation, first, second or grid), x, y, share_0,
    share_1, share_2 (of the three models), train_loss (nats), train_n, and an error_<split> each (fractions).
    """
    evaluator, pieces = Evaluator(config), slices(config)
    get_console().print(_estimate(evaluator, pieces), highlight=False)
    for piece in pieces:
        title = f"{len(piece.points)} points of the plane, {{}} chunks of examples"
        chunks, call = _chunks(evaluator, piece), partial(_measure, config)
        do_missing(config, title, chunks, call, lambda chunk: chunk.path(evaluator).exists())
    return pd.concat([_slice_table(evaluator, piece) for piece in pieces], ignore_index=True)


# ---- contours


def levels(values: NDArray[np.float64], *, log: bool) -> NDArray[np.float64]:
    """Increasing values at which contours are drawn, from the least finite one to the greatest.

    With `log` in equal factors of the excess over the least value, so that the bottom of a basin shows; else in equal
    steps. Source: the excess on a log scale is Garipov et al.'s, the paper says "log-scaled" alone.
    """
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    if high == low:
        high = low + max(abs(low), 1.0) * 1e-6  # a flat landscape has one colour
    if not log:
        return np.asarray(np.linspace(low, high, LEVELS), np.float64)
    return np.concatenate([[low], low + (high - low) * np.geomspace(NEAREST, 1, LEVELS - 1)]).astype(np.float64)


def _extents(plane: pd.DataFrame) -> tuple[float, float, bool]:
    """How far the plane reaches along u1 and u2, and whether on one scale the basin would be a line."""
    along, across = (float(plane[axis].max() - plane[axis].min()) for axis in ("x", "y"))
    return along, across, across > STRIP * along


def _panel(axes: Axes, plane: pd.DataFrame, column: str, scale: float, *, log: bool) -> None:
    models, grid = plane[plane["point"] != "grid"], plane[plane["point"] == "grid"]
    wide = scale * grid.pivot(index="y", columns="x", values=column)
    values = np.ma.masked_invalid(wide.to_numpy())
    at = levels(wide.to_numpy(), log=log)
    norm = BoundaryNorm(at, ncolors=256)
    xs, ys = wide.columns.to_numpy(), wide.index.to_numpy()
    filled = axes.contourf(xs, ys, values, levels=at, norm=norm, cmap="viridis")
    axes.contour(xs, ys, values, levels=at, colors="white", linewidths=0.3, alpha=0.6)
    # Each level has the same share of the bar, whatever the scale.
    beside = axes.inset_axes((1.04, 0.0, 0.06, 1.0))  # has the height of the panel, whatever its aspect
    bar = axes.figure.colorbar(filled, cax=beside, spacing="uniform", ticks=at[::2])
    bar.ax.set_yticklabels([f"{value:.3g}" for value in at[::2]], fontsize=6.5)
    places = models[["x", "y"]].to_numpy()
    for i, (place, (marker, size)) in enumerate(zip(places, MARKERS, strict=True)):
        way = np.linspace(places[0], place, 50)  # curved where the axis is
        axes.plot(*way.T, color="#DDDDDD", lw=1.0, zorder=3)
        axes.scatter(place[0], place[1], marker=marker, s=size, c="white", edgecolors="black", linewidths=0.7, zorder=4)
        inwards = [4 if at < places.max(axis=0).mean() else -13 for at in place]
        edge = [withStroke(linewidth=1.5, foreground="black")]
        outline: dict[str, Any] = {"color": "white", "zorder": 5, "path_effects": edge}
        axes.annotate(f"$\\theta_{i}$", place, xytext=(inwards[0], inwards[1]), textcoords="offset points", **outline)
    best = grid.loc[grid[column].idxmin()]
    axes.scatter(best["x"], best["y"], marker="X", s=34, c="#D55E00", edgecolors="white", linewidths=0.5, zorder=4)
    axes.set(xlim=(xs.min(), xs.max()), ylim=(ys.min(), ys.max()))
    along, across, is_strip = _extents(plane)
    if is_strip:
        axes.set_yscale("asinh", linear_width=along / 2)
        axes.yaxis.set_major_locator(FixedLocator([t for t in ASINH_TICKS if ys.min() <= t <= ys.max()]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_box_aspect(1)
    else:
        axes.set_aspect(max(1.0, 0.7 * along / across))
    axes.grid(visible=False)


def drawn_settings(config: Experiment, row: int) -> str:
    """The settings that a sweep draws for a row, for a caption."""
    return ", ".join(f"{field.partition('.')[2]} {value}" for field, value in draw(config, row).items())


@styled
def draw_landscape(config: Experiment, numbers: pd.DataFrame, *, log: bool) -> Figure:
    """A line of panels for each plane: training loss, test error, and mean error on the shifts where there are some."""
    columns = {"train_loss": (1.0, "Training loss (nats)")}
    for column, label in axis_labels(config).items():
        name, _, metric = label.removesuffix(" (%)").partition(", ")
        columns[f"error_{column}"] = (100.0, f"{name},\n{ERRORS.get(metric, f'1 − {metric}')} (%)")
    planes = [plane for _, plane in numbers.groupby(["first", "second"], sort=False)]
    figure, grid = panels(len(planes), len(columns), 0.5 + 1.75 * len(planes))
    for line, plane in zip(grid, planes, strict=True):
        for axes, (column, (scale, title)) in zip(line, columns.items(), strict=True):
            _panel(axes, plane, column, scale, log=log)
            axes.set(title=title, xlabel="Distance along $u_1$")
        rows = [int(plane[name].iloc[0]) for name in ("first", "second")]
        made = "\n".join(f"$\\theta_{i}$: {drawn_settings(config, row)}" for i, row in enumerate(rows, 1))
        line[0].set_ylabel(f"{made}\nDistance along $u_2${' (asinh)' if _extents(plane)[2] else ''}")
    figure.supxlabel(r"$\theta_0$ is the initialisation; the orange cross is the best point of a panel", fontsize=8)
    return figure
