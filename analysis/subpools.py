"""Does souping pay at a person's pool size? Soups of smaller pools that are drawn from a pool of 72.

Exploratory, beside the six claims of docs/claims.md. Sub-pools differ in how many models they have, how long these were
trained, how far their learning rates are apart, and how many held-out images choose.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console

from analysis.figures.style import SETTINGS, STYLE, save_with_numbers
from analysis.tables.table3 import publish
from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.metrics import correct
from soups.chance import uniform
from soups.experiment.pool import usable_pool
from soups.files.atomic import digest_of, read_json, replacing, write_json
from soups.files.weights import Weights
from soups.recipes import greedy
from soups.recipes import uniform as mean_of_all
from store.rows import row_config
from store.runs import Ingredient, RunFolder
from store.workers import spread

DRAWN = {  # kind of sub-pool -> its sizes, how many of each, and the share of held-out images that choose
    "any": ((12, 20, 1.0), (24, 20, 1.0)),
    "short trainings": ((12, 10, 1.0),),
    "long trainings": ((12, 10, 1.0),),
    "near learning rates": ((12, 10, 1.0),),
    "few held-out": ((12, 10, 0.5), (12, 10, 0.25), (12, 10, 0.125)),
}


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

    Args:
        kind: of `DRAWN`.
        lengths: epochs of each model.
        rates: learning rate of each.

    >>> candidates("short trainings", [9, 4, 16], [1e-4] * 3), candidates("long trainings", [9, 4, 16], [1e-4] * 3)
    ([1], [2])
    """
    places = range(len(lengths))
    third = max(1, len(lengths) // 3)
    match kind:
        case "short trainings":
            return sorted(places, key=lambda i: (lengths[i], i))[:third]
        case "long trainings":
            return sorted(places, key=lambda i: (-lengths[i], i))[:third]
        case "near learning rates":
            middle = sorted(rates)[len(rates) // 2]
            return sorted(places, key=lambda i: (abs(math.log(rates[i] / middle)), i))[:third]
    return list(places)


def first_by_chance(places: Sequence[int], size: int, *key: object) -> tuple[int, ...]:
    """`size` of some numbers, in order; a pure function of the key."""
    return tuple(sorted(sorted(places, key=lambda i: uniform(*key, i))[:size]))


def subpools(config: Experiment, pool: Sequence[Ingredient], num_held_out: int) -> list[Subpool]:
    """All sub-pools that are drawn from a pool; the initialisation is in none. Sizes that it has not are left out."""
    tuned = [place for place, member in enumerate(pool) if member.row]
    settings = [row_config(config, pool[place].row).optim for place in tuned]
    lengths, rates = [each.epochs for each in settings], [each.lr for each in settings]
    found = []
    for kind, sizes in DRAWN.items():
        among = [tuned[i] for i in candidates(kind, lengths, rates)]
        for size, draws, share in sizes:
            for number in range(draws if size <= len(among) else 0):
                # The same models where only the held-out images differ.
                drawn_as = "any" if share < 1 else kind
                members = first_by_chance(among, size, config.sweep.seed, drawn_as, size, number)
                chosen = round(share * num_held_out)
                held_out = first_by_chance(range(num_held_out), chosen, config.sweep.seed, "held-out", number)
                found.append(Subpool(kind, number, share, members, held_out))
    return found


def measured(config: Experiment, subpool: Subpool) -> dict[str, Any]:
    """What the greedy soup, the uniform soup and the best model of a sub-pool reach; kept, and found again.

    Accuracies are fractions: on the held-out images that chose, on test, and the mean over the shifts.
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

    def reached(logits: Callable[[str], torch.Tensor]) -> dict[str, float]:
        hits = {split: evaluator.hits(logits(split), split).double().mean().item() for split in task.reported}
        return {"test": hits[task.test], "shifts": sum(hits[s] for s in task.shifts) / max(1, len(task.shifts))}

    known = [evaluator.logits(each.digest, each.load, task.held_out)[rows] for each in members]
    scores = [correct(logits, labels).double().mean().item() for logits in known]
    soup = greedy([each.load for each in members], scores, accuracy)
    whole = mean_of_all([each.load for each in members], scores)
    first = members[soup.ingredients[0]]  # the best on the held-out images
    found: dict[str, Any] = {"ingredients": len(soup.ingredients), "best held_out": max(scores)}
    for name, logits in (
        ("best", lambda split: evaluator.logits(first.digest, first.load, split)),
        ("greedy", partial(evaluator.fresh_logits, soup.weights)),
        ("uniform", partial(evaluator.fresh_logits, whole.weights)),
    ):
        found |= {f"{name} {column}": value for column, value in reached(logits).items()}
    found["greedy held_out"], found["uniform held_out"] = (accuracy(each.weights) for each in (soup, whole))
    write_json(path, found)
    return found


def described(config: Experiment, pool: Sequence[Ingredient], subpool: Subpool) -> dict[str, Any]:
    """What is known of a sub-pool before it is souped."""
    settings = [row_config(config, pool[place].row).optim for place in subpool.members]
    rates = pd.Series([math.log10(each.lr) for each in settings])
    return {
        "kind": subpool.kind,
        "number": subpool.number,
        "models": len(subpool.members),
        "share": subpool.share,
        "held_out": len(subpool.held_out),
        "epochs": sum(each.epochs for each in settings) / len(settings),
        "lr spread": rates.std(),  # standard deviation of log10
        "rows": " ".join(str(pool[place].row) for place in subpool.members),
    }


TITLES = {  # (kind, models, share of held-out), in the order of the figure
    ("any", 12, 1.0): "12 models",
    ("any", 24, 1.0): "24 models",
    ("short trainings", 12, 1.0): "12 of the third trained shortest",
    ("long trainings", 12, 1.0): "12 of the third trained longest",
    ("near learning rates", 12, 1.0): "12 of the third with near rates",
    ("few held-out", 12, 0.5): "12 models, half of held-out",
    ("few held-out", 12, 0.25): "12 models, a quarter of held-out",
    ("few held-out", 12, 0.125): "12 models, an eighth of held-out",
}


def pays(lines: pd.DataFrame) -> pd.DataFrame:
    """What greedy soups of sub-pools gain over their best model: a line for each kind of sub-pool and column.

    Args:
        lines: of subpools.csv, of one or more pools.

    Returns kind (in words), on (test or shifts), n, the mean gain and its quartiles, the shares of sub-pools that gain,
    stay as they are (mostly since the soup is the best model) and lose, and the uniform soup's mean gain; fractions.
    """
    rows = []
    for (kind, models, share), title in TITLES.items():
        some = lines[(lines["kind"] == kind) & (lines["models"] == models) & (lines["share"] == share)]
        for on in ("test", "shifts"):
            gain = some[f"greedy {on}"] - some[f"best {on}"]
            row = {"kind": title, "on": on, "n": len(some), "mean": gain.mean()}
            row |= {f"quartile {q}": gain.quantile(q / 4) for q in (1, 2, 3)}
            row |= {"gain": (gain > 0).mean(), "same": (gain == 0).mean(), "lose": (gain < 0).mean()}
            rows.append(row | {"uniform": (some[f"uniform {on}"] - some[f"best {on}"]).mean()})
    return pd.DataFrame(rows)


def figure_of(lines: pd.DataFrame) -> Figure:
    """Every sub-pool's gain as a point, by kind, with their mean; test and the mean of the shifts side by side."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 3.0))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, on in zip(panels, ("test", "shifts"), strict=True):
            for place, (kind, models, share) in enumerate(TITLES):
                some = lines[(lines["kind"] == kind) & (lines["models"] == models) & (lines["share"] == share)]
                gain = 100 * (some[f"greedy {on}"] - some[f"best {on}"])
                beside = [place + 0.5 * (uniform("beside", i) - 0.5) for i in range(len(gain))]
                axes.scatter(gain, beside, s=6, color="#999999", linewidths=0)
                axes.plot(gain.mean(), place, "*", color=STYLE["greedy"][1], ms=9)
            axes.axvline(0, color="black", lw=0.8)
            axes.set_title("Test" if on == "test" else "Mean of the five shifts", fontsize=8)
            axes.set_yticks(range(len(TITLES)), list(TITLES.values()))
        panels[0].invert_yaxis()
        figure.supxlabel("greedy soup − best model of the sub-pool (points); stars: means", fontsize=8)
        figure.tight_layout()
        return figure


def write_pays(folder: Path, names: Sequence[str]) -> list[Path]:
    """Write subpools_gain.{pdf,png,csv} from the sub-pools of the pools that are in a folder of results.

    Raises:
        UserError: there are none.
    """
    files = [file for name in names if (file := folder / f"{name}_subpools.csv").exists()]
    if not files:
        raise UserError(f"{folder} has no <pool>_subpools.csv: python -m analysis predictions writes them")
    lines = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    return save_with_numbers(figure_of(lines), pays(lines), folder / "subpools_gain")


def write_subpools(config: Experiment, console: Console | None = None) -> list[Path]:
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
        console=console or Console(),
    )
    file = RunFolder.of(config).analysis / "subpools.csv"
    lines = [described(config, pool, each) | result for each, result in zip(drawn, found, strict=True)]
    with replacing(file) as temporary:
        pd.DataFrame(lines).to_csv(temporary, index=False, float_format="%.6g")
    return [file] if config.paths.results is None else [publish(file, config.paths.results, config.name)]
