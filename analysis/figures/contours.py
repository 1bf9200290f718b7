"""The drawing of Figures 2 and J.1: contours over planes of models."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from analysis.figures.style import SETTINGS
from analysis.measure.methods import SHIFT_MEAN

LEVELS = 12
NEAREST = 1 / 128  # log scales: distance of the first contour to the least value, as a share of the range
MARKERS = (("*", 70), ("o", 26), ("o", 26))  # theta_0, theta_1, theta_2


def levels(values: NDArray[np.float64], *, log: bool) -> NDArray[np.float64]:
    """Increasing values at which contours are drawn, from the least to the greatest.

    Args:
        values: of any shape; those that are not finite are left out.
        log: in equal factors of the excess over the least value, so that the bottom of a basin shows; else in equal
            steps. Source: the excess on a log scale is Garipov et al.'s, the paper says "log-scaled" alone.

    >>> levels(np.array([1.0, 3.0]), log=False)[:3].round(3).tolist()
    [1.0, 1.182, 1.364]
    """
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    if high == low:
        high = low + max(abs(low), 1.0) * 1e-6  # a flat landscape has one colour
    if not log:
        return np.asarray(np.linspace(low, high, LEVELS), np.float64)
    return np.concatenate([[low], low + (high - low) * np.geomspace(NEAREST, 1, LEVELS - 1)]).astype(np.float64)


def _panel(axes: Axes, plane: pd.DataFrame, column: str, scale: float, *, log: bool, label: str) -> None:
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
    bar.ax.set_yticklabels([f"{value:.3g}" for value in at[::2]], fontsize=6)
    bar.set_label(label, fontsize=7)
    places = models[["x", "y"]].to_numpy()
    for end in places[1:]:
        axes.annotate("", end, places[0], arrowprops={"arrowstyle": "->", "color": "#BBBBBB", "lw": 1.0})
    for i, (place, (marker, size)) in enumerate(zip(places, MARKERS, strict=True)):
        axes.scatter(place[0], place[1], marker=marker, s=size, c="white", edgecolors="black", linewidths=0.7, zorder=4)
        axes.annotate(
            f"$\\theta_{i}$",
            place,
            xytext=(4, 4),
            textcoords="offset points",
            color="white",
            fontsize=8,
            zorder=5,
            path_effects=[withStroke(linewidth=1.5, foreground="black")],
        )
    best = grid.loc[grid[column].idxmin()]
    axes.scatter(best["x"], best["y"], marker="X", s=34, c="#D55E00", edgecolors="white", linewidths=0.5, zorder=4)
    axes.set_aspect(_height_to_width(plane) / _extent_ratio(plane))
    axes.grid(visible=False)


def _extent_ratio(plane: pd.DataFrame) -> float:
    """How far the plane reaches along u2, over how far along u1."""
    along = [plane[axis].max() - plane[axis].min() for axis in ("y", "x")]
    return float(along[0] / along[1])


def _height_to_width(plane: pd.DataFrame) -> float:
    """Of a panel. Both axes have one scale, unless a model is so near that its plane would be a strip."""
    return min(max(_extent_ratio(plane), 0.7), 2.5)


def landscape_figure(tidy: pd.DataFrame, captions: Sequence[str], *, test: str, shifts: int, log: bool) -> Figure:
    """A row of panels for each plane: training loss, test error, mean error on the shifts where there are some.

    The three models are marked, and by a cross the grid's best point of each panel.

    Args:
        tidy: of one or more planes, from `analysis.figures.landscape.slice_table`.
        captions: for each plane, what its two fine-tuned models are.
        test: name of the test split.
        shifts: how many there are.
        log: contours in equal factors of the excess over the least value, as in Figure 2, or in equal steps.
    """
    columns = [("train_loss", 1.0, "training loss (nats)"), (f"error_{test}", 100.0, "test error (%)")]
    if shifts:
        mean = "error on the shift (%)" if shifts == 1 else f"mean error on {shifts} shifts (%)"
        columns.append((f"error_{SHIFT_MEAN}", 100.0, mean))
    planes = [plane for _, plane in tidy.groupby(["first", "second"], sort=False)]
    with mpl.rc_context(SETTINGS):
        heights = [0.85 + 1.5 * _height_to_width(plane) for plane in planes]
        figure = Figure(figsize=(2.35 * len(columns), sum(heights)), layout="constrained")
        panels = figure.subplots(len(planes), len(columns), squeeze=False, height_ratios=heights)
        for row, plane, caption in zip(panels, planes, captions, strict=True):
            for axes, (column, scale, label) in zip(row, columns, strict=True):
                _panel(axes, plane, column, scale, log=log, label=label)
                axes.set_xlabel("distance along $u_1$")
            row[0].set_ylabel("distance along $u_2$")
            row[0].set_title(caption, fontsize=7, loc="left")
        return figure
