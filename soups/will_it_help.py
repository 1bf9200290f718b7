"""How likely a soup of a pool beats its best model: the share of the calibration pools in which it did.

The shares are in will_it_help.json, which `python -m analysis will_it_help` of the repository writes from pools that
were measured.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TABLE = Path(__file__).with_suffix(".json")


def features(scores: Sequence[float], held_out: int) -> dict[str, float]:
    """What is known of a pool before anything is averaged; the calibration pools have a range of each.

    Args:
        scores: held-out accuracies in [0, 1], one a model.
        held_out: number of examples that they are measured on.

    >>> features([0.5, 0.75, 0.625], 600)
    {'models': 3, 'held-out examples': 600, 'best score': 0.75, 'best minus median score': 0.125}
    """
    best = max(scores)
    return {
        "models": len(scores),
        "held-out examples": held_out,
        "best score": best,
        "best minus median score": best - float(np.median(scores)),
    }


def outside(found: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """What of a pool lies outside the calibration pools, with their range: a phrase for each feature.

    >>> outside({"models": 3, "best score": 0.5}, {"models": (12, 72), "best score": (0.4, 0.7)})
    ['models is 3, there 12 to 72']
    """
    return [
        f"{name} is {round(found[name], 3):g}, there {round(low, 3):g} to {round(high, 3):g}"
        for name, (low, high) in ranges.items()
        if not low <= found[name] <= high
    ]


def answer(found: Mapping[str, float], unlike: Sequence[str] = (), table: Path = TABLE) -> list[str]:
    """Shares of the calibration pools in which soups were better and worse; first of all how this pool is unlike them.

    Args:
        found: of `features`.
        unlike: what else sets this pool apart from the calibration pools.
        table: the calibration.

    Returns one sentence a line.
    """
    known: dict[str, Any] = json.loads(table.read_text(encoding="utf-8"))
    apart = [*unlike, *outside(found, known["ranges"])]
    lines = [f"not calibrated for pools like yours: {'; '.join(apart)}"] if apart else []
    lines.append(
        f"shares of {len(known['pools'])} pools of {known['kind']} in which a soup differs from the best model by more "
        f"than noise ({known['noise']}), with 95 % intervals that count a pool once:"
    )
    for each in known["soups"]:
        better, worse = (
            f"{100 * p:.0f} % [{100 * low:.0f}, {100 * high:.0f}]" for p, low, high in (each["better"], each["worse"])
        )
        lines.append(f"- {each['soup']} soup, {each['on']}: better {better}, worse {worse}")
    return [*lines, known["note"]]
