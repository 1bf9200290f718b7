"""Does souping pay at a person's pool size? Soups of smaller pools that are drawn from a pool of 72.

Exploratory, beside the six claims of docs/claims.md. Sub-pools differ in how many models they have, how long these were
trained, how far their learning rates are apart, and how many held-out images choose.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich import get_console

from analysis.claims import read_pools
from analysis.figures.style import STYLE, save_with_numbers, styled, write_csv
from analysis.measure.methods import logits_of_model
from analysis.tables.table3 import published
from analysis.will_it_help import NOISE, OUTCOMES, noise
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.metrics import correct
from soups.chance import uniform
from soups.conformance import common_layout
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of, read_json, write_json
from soups.files.opening import opened
from soups.files.weights import Weights
from soups.geometry import Geometry, geometry
from soups.recipes import greedy
from soups.recipes import uniform as mean_of_all
from store.rows import row_config
from store.runs import Ingredient, RunFolder
from store.workers import spread

KINDS = {  # (kind, models, share of the held-out images that choose) -> how many are drawn, and the kind in words
    ("any", 12, 1.0): (20, "12 models"),
    ("any", 24, 1.0): (20, "24 models"),
    ("short trainings", 12, 1.0): (10, "12 of the third trained shortest"),
    ("long trainings", 12, 1.0): (10, "12 of the third trained longest"),
    ("near learning rates", 12, 1.0): (10, "12 of the third with near rates"),
    ("few held-out", 12, 0.5): (10, "12 models, half of held-out"),
    ("few held-out", 12, 0.25): (10, "12 models, a quarter of held-out"),
    ("few held-out", 12, 0.125): (10, "12 models, an eighth of held-out"),
}


SOUPS = {"greedy": -0.17, "uniform": 0.17}  # where in its row of the figure a soup is drawn


@dataclass(frozen=True)
class Subpool:
    """Some models of a pool, by their places in it, and the held-out images that choose among them."""

    kind: str
    number: int
    share: float  # the share of the held-out images that choose
    members: tuple[int, ...]
    held_out: tuple[int, ...]  # rows of the split

    @property
    def key(self) -> str:
        """Names it."""
        return digest_of([self.members, self.held_out])


def candidates(kind: str, lengths: Sequence[int], rates: Sequence[float]) -> list[int]:
    """The places of models that a kind of sub-pool draws from: all, or a third of them.

    >>> candidates("short trainings", [9, 4, 16], [1e-4] * 3), candidates("long trainings", [9, 4, 16], [1e-4] * 3)
    ([1], [2])
    """
    middle = sorted(rates)[len(rates) // 2]
    keys: dict[str, list[float]] = {
        "short trainings": [*lengths],
        "long trainings": [-length for length in lengths],
        "near learning rates": [abs(math.log(rate / middle)) for rate in rates],
    }
    if kind not in keys:
        return list(range(len(lengths)))
    return sorted(range(len(lengths)), key=keys[kind].__getitem__)[: max(1, len(lengths) // 3)]


def _first_by_chance(places: Sequence[int], size: int, *key: object) -> tuple[int, ...]:
    """`size` of some numbers, in order; a pure function of the key."""
    return tuple(sorted(sorted(places, key=lambda i: uniform(*key, i))[:size]))


def subpools(config: Experiment, pool: Sequence[Ingredient], num_held_out: int) -> list[Subpool]:
    """All sub-pools that are drawn from a pool; the initialisation is in none. Sizes that it has not are left out."""
    tuned = [place for place, member in enumerate(pool) if member.row]
    settings = [row_config(config, pool[place].row).optim for place in tuned]
    lengths, rates = zip(*((each.epochs, each.lr) for each in settings), strict=True)
    seed, found = config.sweep.seed, []
    for (kind, size, share), (draws, _) in KINDS.items():
        among = [tuned[i] for i in candidates(kind, lengths, rates)]
        for number in range(draws if size <= len(among) else 0):
            # The same models where only the held-out images differ.
            members = _first_by_chance(among, size, seed, "any" if share < 1 else kind, size, number)
            chosen = round(share * num_held_out)
            held_out = _first_by_chance(range(num_held_out), chosen, seed, "held-out", number)
            found.append(Subpool(kind, number, share, members, held_out))
    return found


def measured(config: Experiment, subpool: Subpool) -> dict[str, Any]:
    """What the greedy soup, the uniform soup and the best model of a sub-pool reach; kept, and found again.

    Accuracies are fractions: on the held-out images that chose, on test, and the mean over the shifts. The midpoint is
    that of the two best models, which greedy tries first; the barrier is how far it is below their mean.
    """
    path = RunFolder.of(config).root / "subpools" / f"{subpool.key}.json"
    if path.exists():
        kept: dict[str, Any] = read_json(path)
        return kept
    evaluator, task = Evaluator(config), config.task
    pool = usable_pool(config)
    members, rows = [pool[place] for place in subpool.members], torch.tensor(subpool.held_out)
    labels = evaluator.split(task.held_out).labels[rows]

    def accuracy(weights: Weights) -> float:
        return correct(evaluator.fresh_logits(weights, task.held_out, rows), labels).double().mean().item()

    known = [logits_of_model(each, evaluator)(task.held_out)[rows] for each in members]
    scores = [correct(logits, labels).double().mean().item() for logits in known]
    soup = greedy([each.load for each in members], scores, accuracy)
    whole = mean_of_all([each.load for each in members], scores)
    found: dict[str, Any] = {"ingredients": len(soup.ingredients), "best held_out": max(scores)}
    second = soup.trials[1]
    found["barrier held_out"] = (max(scores) + scores[second.candidate]) / 2 - second.score
    for name, logits in (
        ("best", logits_of_model(members[soup.ingredients[0]], evaluator)),  # the best on the held-out images
        ("greedy", partial(evaluator.fresh_logits, soup.weights)),
        ("uniform", partial(evaluator.fresh_logits, whole.weights)),
    ):
        hits = {split: evaluator.hits(logits(split), split).double().mean().item() for split in task.reported}
        found[f"{name} test"] = hits[task.test]
        found[f"{name} shifts"] = sum(hits[split] for split in task.shifts) / max(1, len(task.shifts))
    found["greedy held_out"], found["uniform held_out"] = (accuracy(each.weights) for each in (soup, whole))
    write_json(path, found)
    return found


def _geometry_of(pool: Sequence[Ingredient]) -> Geometry:
    """Distances and angles of all models of a pool at its initialisation, which stands first."""
    with opened([member.folder / member.file for member in pool]) as (start, *tuned):
        return geometry(tuned, common_layout([start, *tuned]), start)


def _described(config: Experiment, pool: Sequence[Ingredient], subpool: Subpool, where: Geometry) -> dict[str, Any]:
    """What is known of a sub-pool before it is souped; `where` is the geometry of the pool."""
    settings = [row_config(config, pool[place].row).optim for place in subpool.members]
    places = [place - 1 for place in subpool.members]  # the initialisation is no task vector
    cosines = where.task_cosines[np.ix_(places, places)][np.triu_indices(len(places), 1)]
    return {
        "kind": subpool.kind,
        "number": subpool.number,
        "models": len(subpool.members),
        "share": subpool.share,
        "held_out": len(subpool.held_out),
        "epochs": sum(each.epochs for each in settings) / len(settings),
        "lr spread": pd.Series([math.log10(each.lr) for each in settings]).std(),
        "cosine": np.median(cosines),  # of task vectors, over pairs
        "distance": np.median(where.relative[places]),  # to the initialisation, in lengths of it
        "rows": " ".join(str(pool[place].row) for place in subpool.members),
    }


def _by_kind(lines: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The title of each kind of sub-pool, and its lines."""
    for (kind, models, share), (_, title) in KINDS.items():
        yield title, lines[(lines["kind"] == kind) & (lines["models"] == models) & (lines["share"] == share)]


def pays(lines: pd.DataFrame) -> pd.DataFrame:
    """What soups of sub-pools gain over their best model: a line for each kind of sub-pool, split and soup.

    Of lines of subpools.csv with the columns `noise test` and `noise shifts`, standard errors of a single difference.
    Beside the means of the settings it has the mean gain (a fraction) and its quartiles, and the shares of sub-pools
    whose soup is better, equal and worse at all, and better and worse by more than noise.
    """
    rows = []
    for title, group in _by_kind(lines):
        settings = {name: group[name].mean() for name in ("epochs", "lr spread", "held_out")}
        for soup, on in sorted(OUTCOMES, key=lambda outcome: outcome[1] != "test"):
            gain, error = group[f"{soup} {on}"] - group[f"best {on}"], NOISE * group[f"noise {on}"]
            row = {"kind": title, "on": on, "soup": soup, "n": len(group), **settings, "mean": gain.mean()}
            row |= {f"quartile {q}": gain.quantile(q / 4) for q in (1, 2, 3)}
            row |= {"better": (gain > 0).mean(), "same": (gain == 0).mean(), "worse": (gain < 0).mean()}
            rows.append(row | {"beyond noise": (gain > error).mean(), "below noise": (gain < -error).mean()})
    return pd.DataFrame(rows)


@styled
def _figure_of(lines: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Every sub-pool's gain as a point, by kind and soup, over the band of noise; `table` is from `pays`."""
    figure, rows = Figure(figsize=(6.6, 4.6)), table.set_index(["kind", "on", "soup"])
    panels = figure.subplots(1, 2, sharey=True)
    for axes, on in zip(panels, ("test", "shifts"), strict=True):
        band = 100 * NOISE * lines[f"noise {on}"].mean()
        axes.axvspan(-band, band, color="#DDDDDD", lw=0, label="within noise")
        for place, (title, group) in enumerate(_by_kind(lines)):
            for soup, aside in SOUPS.items():
                (name, colour, marker, _), row, at = STYLE[soup], rows.loc[(title, on, soup)], place + aside
                gain = 100 * (group[f"{soup} {on}"] - group[f"best {on}"])
                beside = [at + 0.2 * (uniform("beside", i) - 0.5) for i in range(len(gain))]
                axes.scatter(gain, beside, s=5, color=colour, alpha=0.45, linewidths=0)
                axes.plot([100 * row["quartile 1"], 100 * row["quartile 3"]], [at, at], color=colour, lw=1.6)
                look = {"color": colour, "ms": 9 if marker == "*" else 5, "mec": "black", "mew": 0.4, "ls": ""}
                axes.plot(100 * row["mean"], at, marker, label=name if place == 0 else None, **look)
                better = f"{round(row['beyond noise'] * row['n'])} of {row['n']:.0f}"
                words = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 6, "color": colour}
                axes.text(1.01, at, better, **words)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title("Test" if on == "test" else "Mean of the five shifts", fontsize=8)
        axes.set_yticks(range(len(KINDS)), [title for _, title in KINDS.values()])
    panels[0].set(ylim=(len(KINDS) - 0.5, -0.5), ylabel="sub-pools, by kind")
    figure.supxlabel("soup − best model of its sub-pool (percentage points)", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 1.05), ncols=3, frameon=False)
    note = (
        f"Points: sub-pools; markers: means; bars: the middle half. Grey: ±{NOISE} standard errors, over classes, "
        "of a single difference.\nNumbers: sub-pools whose soup is better by more than noise. Sub-pools share "
        "models and images, so no interval of a mean is drawn."
    )
    figure.text(0.5, -0.02, note, ha="center", va="top", fontsize=6)
    figure.tight_layout()
    return figure


def write_pays(folder: Path, names: Sequence[str]) -> list[Path]:
    """Write subpools_gain.{pdf,png,csv} from the sub-pools of the pools that are in a folder of results."""
    files = {name: file for name in names if (file := folder / f"{name}_subpools.csv").exists()}
    pools = read_pools(folder, list(files))
    if not files or pools.keys() != files.keys():
        raise UserError(
            f"{folder} has no <pool>_subpools.csv with <pool>_predictions.csv beside it: "
            "python -m analysis predictions writes both"
        )
    lines = pd.concat(
        pd.read_csv(file).assign(**{f"noise {on}": noise(pools[name], on) for on in ("test", "shifts")})
        for name, file in files.items()
    )
    table = pays(lines)
    return save_with_numbers(_figure_of(lines, table), table, folder / "subpools_gain")


def write_subpools(config: Experiment) -> list[Path]:
    """Write subpools.csv: a line for each sub-pool of a finished pool, with what its soups reach; returns the file."""
    pool = usable_pool(config)
    drawn = subpools(config, pool, len(Evaluator(config).split(config.task.held_out)))
    kept = RunFolder.of(config).root / "subpools"
    found = spread(
        f"soups of {len(drawn)} sub-pools",
        [partial(measured, config, each) for each in drawn],
        workers=config.cluster.workers,
        threads=config.cluster.threads,
        units=len({each.key for each in drawn}),
        done_units=lambda: len(list(kept.glob("*.json"))),
        report=lambda each: f"greedy {each['greedy test']:.3f}, best {each['best test']:.3f}",
        console=get_console(),
    )
    where = _geometry_of(pool)
    lines = [_described(config, pool, each, where) | result for each, result in zip(drawn, found, strict=True)]
    files = [write_csv(pd.DataFrame(lines), RunFolder.of(config).analysis / "subpools.csv", "%.6g")]
    return published(files, config) or files
