"""The drawing of Figures 2 and J.1: contours over planes of models."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from analysis.figures.style import panels, styled
from analysis.measure.mixtures import axis_labels, drawn_settings
from configs.schema import Experiment

ERRORS = {"top-1 accuracy": "top-1 error"}
STRIP = 3.0  # how much higher than wide a plane has to be
ASINH_TICKS = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 200, 500)  # distances
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


def _extents(plane: pd.DataFrame) -> tuple[float, float, bool]:
    """How far the plane reaches along u1 and u2, and whether it is a strip.

    In a strip one model is so far away that, on one scale, the basin of the others is a line.
    """
    along, across = (float(plane[axis].max() - plane[axis].min()) for axis in ("x", "y"))
    return along, across, across > STRIP * along


@styled
def draw_landscape(config: Experiment, numbers: pd.DataFrame, *, log: bool) -> Figure:
    """A line of panels for each plane: training loss, test error, and mean error on the shifts where there are some.

    With `log`, contours are in equal factors of the excess over the least value, as in Figure 2; else in equal steps
    (J.1).
    """
    columns = {"train_loss": (1.0, "Training loss (nats)")}
    for column, label in axis_labels(config).items():
        name, _, metric = label.removesuffix(" (%)").partition(", ")
        columns[f"error_{column}"] = (100.0, f"{name},\n{ERRORS.get(metric, f'1 − {metric}')} (%)")
    planes = [plane for _, plane in numbers.groupby(["first", "second"], sort=False)]
    figure, grid = panels(len(planes), len(columns), 0.5 + 1.75 * len(planes))
    for line, plane in zip(grid, planes, strict=True):
        rows = [int(plane[name].iloc[0]) for name in ("first", "second")]
        for axes, (column, (scale, title)) in zip(line, columns.items(), strict=True):
            _panel(axes, plane, column, scale, log=log)
            axes.set(title=title, xlabel="Distance along $u_1$")
        made = "\n".join(f"$\\theta_{i}$: {drawn_settings(config, row)}" for i, row in enumerate(rows, 1))
        line[0].set_ylabel(f"{made}\nDistance along $u_2${' (asinh)' if _extents(plane)[2] else ''}")
    figure.supxlabel(r"$\theta_0$ is the initialisation; the orange cross is the best point of a panel", fontsize=8)
    return figure
