"""Which models a greedy recipe took, and why: held-out accuracy along its decisions."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import COLUMN, STYLE, legend, panels, styled


def decisions(record: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model that was tried, in order.

    Args:
        record: soup.json of a greedy recipe.

    Returns:
        model (row of the sweep), held_out (score with it), before (of the soup without it, which it must not lower),
        change, accepted; fractions.
    """
    trials = [(f"row {trial['row']}", trial["score"], trial["accepted"]) for trial in record["trials"]]
    return against_before(pd.DataFrame(trials, columns=["model", "held_out", "accepted"]))


def against_before(tried: pd.DataFrame) -> pd.DataFrame:
    """Trials in order, model, held_out and accepted, with what each was compared with: before, and the change to it."""
    soup = tried["held_out"].where(tried["accepted"]).ffill()
    before = soup.shift()
    columns = {"before": before, "change": tried["held_out"] - before}
    return tried.assign(**columns)[["model", "held_out", "before", "change", "accepted"]]


@styled
def draw_decisions(tried: pd.DataFrame) -> Figure:
    """Held-out score with each model that was tried, and of the soup so far.

    Args:
        tried: from `decisions`.
    """
    figure, ((axes,),) = panels(1, 1, 2.6, width=COLUMN)
    step, score, is_in = tried.index + 1, 100 * tried["held_out"], tried["accepted"]
    _, colour, marker, size = STYLE["greedy"]
    axes.step(step, score.where(is_in).ffill(), where="post", color=colour, lw=1.2, label="Soup so far")
    axes.scatter(step[is_in], score[is_in], s=0.4 * size, c=colour, marker=marker, label="kept", zorder=3)
    axes.scatter(step[~is_in], score[~is_in], s=18, c="#777777", marker="x", lw=1, label="left out", zorder=3)
    axes.set(xlabel="Model tried", ylabel="Held-out with it (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, axes, 3)
    return figure
