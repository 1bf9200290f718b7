"""Where everything in the page's drawings is, in the units of their view boxes; the template draws it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

from analysis.figures.scatter import DRAWN_WITH_BARS, styles
from analysis.figures.style import STYLE
from analysis.measure.methods import SHIFT_MEAN
from analysis.measure.mixtures import axis_labels
from analysis.page.files import Results, Texts
from analysis.page.tables import by_method, method_name, row_name

LETTERS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
# Figure 1's methods lie above the others, which may be at the same place.
ABOVE = {kind: (kind in STYLE and kind != "individual", kind == "greedy") for kind in styles()}
MOST_STEPS = 200  # of a chart of decisions; beyond them the table alone tells


@dataclass(frozen=True)
class Axis:
    """One axis: ticks at their places, and what it says."""

    label: str
    ticks: tuple[tuple[float, str], ...]
    at: Callable[[float], float]  # of a value in the axis' units


@dataclass(frozen=True)
class Frame:
    """A drawing's size and the corners of its plot."""

    width: float
    height: float
    left: float
    top: float
    right: float
    bottom: float
    x: Axis
    y: Axis


@dataclass(frozen=True)
class Mark:
    """A point with everything that is said of it."""

    key: str
    name: str
    kind: str
    x: float
    y: float
    outline: str  # of an svg path around 0
    colour: str
    says: str  # for those who do not see it
    members: tuple[str, ...] = ()  # keys of the models it is made of
    bars: tuple[float, float, float, float] | None = None  # ends on x and on y
    barred: bool = False  # whether its bars are always drawn


@dataclass(frozen=True)
class Scatter:
    """Figure 1 as a drawing that answers."""

    frame: Frame
    marks: tuple[Mark, ...]
    legend: tuple[tuple[str, str, str, str], ...]  # kind, label, colour, outline
    outside: tuple[str, ...]  # what is too far away to be drawn, in words


def _round(value: float) -> str:
    return f"{round(float(value), 2) + 0.0:g}"


@cache
def outline(marker: str, size: float) -> str:
    """The path of one of matplotlib's markers, as figures of the analysis draw it.

    >>> outline("s", 4.0)
    'M-1 1L1 1L1 -1L-1 -1Z'
    """
    style = MarkerStyle(marker)
    scale = size**0.5
    words = []
    for points, code in style.get_path().transformed(style.get_transform()).iter_segments(curves=True):
        if code == Outline.CLOSEPOLY:
            words.append("Z")
            continue
        ends = zip(points[::2], points[1::2], strict=True)
        words.append(LETTERS[code] + " ".join(f"{_round(scale * x)} {_round(-scale * y)}" for x, y in ends))
    return "".join(words)


def axis(label: str, values: Sequence[float], start: float, end: float, *, room: float = 0.06) -> Axis:
    """An axis around some values, with round numbers as ticks.

    Args:
        label: what it says.
        values: that must be on it.
        start: where it begins, in the view box.
        end: where it ends.
        room: at both ends, as a share of the values' range.
    """
    low, high = min(values), max(values)
    margin = room * (high - low) or (1.0 if room else 0.0)
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return round(start + (value - low) / ((high - low) or 1.0) * (end - start), 2)

    ticks = [tick for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high]
    return Axis(label, tuple((at(tick), f"{tick:g}") for tick in ticks), at)


def _key(name: str) -> str:
    return name.replace("row ", "row-")


def _members(results: Results, name: str) -> tuple[str, ...]:
    """Keys of the models in a soup, or in any of its random orders."""
    rows: dict[int, None] = {}
    for dish, soup in results.soups.items():
        if dish.partition("/")[0] == name:
            rows |= dict.fromkeys(member["row"] for member in soup["ingredients"])
    return tuple(f"row-{row}" if row else "initialisation" for row in rows)


def _reported(results: Results) -> tuple[tuple[str, str], tuple[str, str]]:
    """Column and label of both axes: test, and the mean of shifts or else held-out."""
    labels = axis_labels(results.config)
    test = ("test", labels[results.config.task.test])
    return test, (SHIFT_MEAN, labels[SHIFT_MEAN]) if SHIFT_MEAN in labels else ("held_out", "Held-out (%)")


def _intervals(
    results: Results, drawn: pd.DataFrame, x_name: str, y_name: str
) -> dict[str, tuple[float, float, float, float]]:
    """Method -> ends of its interval across and up in per cent, around the best individual model."""
    if y_name != SHIFT_MEAN:
        return {}  # held-out has no interval
    found, best = {}, drawn[drawn["kind"] == "best"].iloc[0]
    columns = {results.config.task.test: 100 * best[x_name], SHIFT_MEAN: 100 * best[y_name]}
    for method, cells in by_method(results.scores):
        ends = [base + 100 * cells[column][1][end] for column, base in columns.items() for end in ("low", "high")]
        found[method] = (ends[0], ends[1], ends[2], ends[3])
    del found["best"]
    return found


def scatter(results: Results) -> Scatter:
    """Models, soups and ensembles at their scores in per cent, with their intervals around the best individual model.

    Zero-shot is named beside the drawing, as its place would press all others together.
    """
    config, looks = results.config, styles()
    (x_name, x_label), (y_name, y_label) = _reported(results)
    numbers = results.points.numbers
    is_drawn = numbers["kind"].isin(looks) & numbers[[x_name, y_name]].notna().all(axis=1)
    drawn = numbers[is_drawn]
    intervals = _intervals(results, drawn, x_name, y_name)
    always = [ends for name, ends in intervals.items() if name in DRAWN_WITH_BARS]
    left, top, right, bottom = 66.0, 12.0, 628.0, 400.0
    x = axis(x_label, [*(100 * drawn[x_name]), *(end for ends in always for end in ends[:2])], left, right)
    y = axis(y_label, [*(100 * drawn[y_name]), *(end for ends in always for end in ends[2:])], bottom, top)
    frame = Frame(640.0, 449.0, left, top, right, bottom, x, y)
    marks, rows = [], {f"row {row}": row for row in results.done}
    for _, point in drawn.sort_values("kind", key=lambda kinds: kinds.map(ABOVE), kind="stable").iterrows():
        name, kind = str(point["name"]), str(point["kind"])
        _, colour, marker, size = looks[kind]
        shown = row_name(config, rows[name]) if name in rows else method_name(config, name)
        says = f"{shown}: {x_label} {100 * point[x_name]:.1f}, {y_label} {100 * point[y_name]:.1f}"
        ends = intervals.get(name)
        bars = ends and (x.at(ends[0]), x.at(ends[1]), y.at(ends[2]), y.at(ends[3]))
        place = x.at(100 * point[x_name]), y.at(100 * point[y_name])
        members = () if kind == "individual" else _members(results, name)
        look = (outline(marker, 1.5 * size), "currentColor" if colour == "#000000" else colour)
        marks.append(Mark(_key(name), shown, kind, *place, *look, says, members, bars, kind in DRAWN_WITH_BARS))
    legend = tuple(
        (kind, label, "currentColor" if colour == "#000000" else colour, outline(marker, 1.2 * size))
        for kind, (label, colour, marker, size) in looks.items()
        if kind in set(drawn["kind"])
    )
    outside = tuple(
        f"{method_name(config, point['name'])} ({100 * point[x_name]:.1f}, {100 * point[y_name]:.1f})"
        for _, point in numbers[~is_drawn].iterrows()
        if pd.notna(point[y_name])
    )
    return Scatter(frame, tuple(marks), legend, outside)


@dataclass(frozen=True)
class Steps:
    """Held-out scores along the decisions of a greedy recipe."""

    frame: Frame
    line: str  # the soup so far, as an svg path
    marks: tuple[tuple[float, float, bool, str], ...]  # x, y, accepted, what it says


def steps(results: Results, soup: Mapping[str, Any]) -> Steps | None:
    """A chart of decisions, unless there are none or more than can be told apart."""
    trials = soup["trials"]
    if not 1 < len(trials) <= MOST_STEPS:
        return None
    scores = [100 * trial["score"] for trial in trials]
    left, top, right, bottom = 58.0, 10.0, 628.0, 190.0
    x = axis("Step", [1, len(trials)], left, right, room=0.04)
    y = axis("Held-out (%)", scores, bottom, top, room=0.1)
    whole = tuple((at, name) for at, name in x.ticks if float(name).is_integer())
    frame = Frame(640.0, 240.0, left, top, right, bottom, Axis(x.label, whole, x.at), y)
    line, marks = "", []
    for place, (trial, score) in enumerate(zip(trials, scores, strict=True), 1):
        at = x.at(place), y.at(score)
        said = "kept" if trial["accepted"] else "left out"
        marks.append(
            (*at, trial["accepted"], f"Step {place}, {row_name(results.config, trial['row'])}: {score:.1f} %, {said}")
        )
        if trial["accepted"]:
            line += f"H{at[0]}V{at[1]}" if line else f"M{at[0]} {at[1]}"
    return Steps(frame, line + f"H{right}", tuple(marks))


@dataclass(frozen=True)
class Diagram:
    """Accuracy against confidence of one model."""

    name: str
    says: str
    frame: Frame
    lines: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]  # before and after: stage, the bins' places


def diagrams(reliability: Texts) -> tuple[Diagram, ...]:
    """A reliability diagram for each model, with both stages in one frame."""
    found = []
    left, top, right, bottom = 44.0, 8.0, 232.0, 196.0
    frame = Frame(
        240.0,
        240.0,
        left,
        top,
        right,
        bottom,
        axis("Confidence (%)", [0, 100], left, right, room=0.0),
        axis("Accuracy (%)", [0, 100], bottom, top, room=0.0),
    )
    for model, rows in reliability.numbers.groupby("model", sort=False):
        lines, errors = [], []
        for stage, bins in rows.groupby("stage", sort=False):
            full = bins[bins["count"] > 0]
            places = [
                (frame.x.at(100 * confidence), frame.y.at(100 * accuracy))
                for confidence, accuracy in zip(full["confidence"], full["accuracy"], strict=True)
            ]
            lines.append((str(stage), tuple(places)))
            errors.append(f"{100 * bins['ece'].iloc[0]:.1f} % {stage}")
        says = f"{model}: expected calibration error {' and '.join(errors)} temperature scaling"
        found.append(Diagram(str(model), says, frame, tuple(lines)))
    return tuple(found)
