"""From finished pools to tables of predictions, and from these alone to answers to the six claims of docs/claims.md.

Held-out and test are both unseen drawings of the same designs, so either selects once and the other reports.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import get_console

from analysis.figures.style import COLUMN, STYLE, panels, save_with_numbers, styled, write_csv
from analysis.tables.cells import NAMES, write_cells
from analysis.tables.table3 import published, write_provenance
from configs.errors import UserError
from configs.schema import Experiment, Recipe
from eval.forward import Evaluator
from eval.metrics import nll
from soups.experiment.pool import usable_pool
from soups.experiment.soups import logits_of, make_soup, make_soups
from store.runs import RunFolder

METHODS: tuple[Recipe, ...] = ("best", "uniform", "greedy", "learned_by_tensor", "ensemble", "greedy_ensemble")
POOLS = ("demo72", "demo72_fold1", "demo72_fold2", "demo72_fold3", "demo72_fold4")
SHIFTS = ("v2", "r", "sketch", "objectnet", "a")
UNSEEN = ("held_out", "test")  # either selects and the other reports
RESAMPLES, SEED = 10_000, 0
POWER = 2.8  # standard errors between 0 and a difference that is seen with 80 % power: 1.96 + 0.84
LEVEL = 0.05


def predictions(config: Experiment) -> pd.DataFrame:
    """Which images each method gets right, whichever of held-out and test selects; what is not made yet is made.

    Returns one row for each direction and image of the splits that report: selects, split, image (its number in the
    split), class (of the task), and a column of 0 and 1 for each of `METHODS`.
    """
    if len(config.model.probe_c) > 1 or config.optim.keep == "best":
        raise UserError(
            "held-out has chosen before the pool was made, so it cannot change places with test: the pool needs "
            "model.probe_c=[1] and optim.keep=last"
        )
    evaluator, task, frames = Evaluator(config), config.task, []
    for selects, reports in ((task.held_out, task.test), (task.test, task.held_out)):
        make_soups(config, METHODS, get_console(), selects)
        soups = {method: make_soup(method, evaluator, selects) for method in METHODS}
        for split in (reports, *task.shifts):
            labels = evaluator.split(split).labels.tolist()
            frame = pd.DataFrame({"selects": selects, "split": split, "image": range(len(labels)), "class": labels})
            for method, made in soups.items():
                frame[method] = evaluator.hits(logits_of(made, split, evaluator), split).int().numpy()
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def models(config: Experiment) -> pd.DataFrame:
    """One row for each usable model: row, digest, what was drawn, and accuracy and NLL on every split."""
    evaluator, rows = Evaluator(config), []
    for member in usable_pool(config):
        row = {"row": member.row, "digest": member.digest, **member.drawn}
        for split in (config.task.held_out, *config.task.reported):
            logits = evaluator.logits(member.digest, member.load, split)
            row[split] = evaluator.hits(logits, split).double().mean().item()
            row[f"{split} nll"] = nll(evaluator.projected(logits, split), evaluator.split(split).labels)
        rows.append(row)
    return pd.DataFrame(rows)


def write_pool(config: Experiment) -> list[Path]:
    """Write predictions.csv and models.csv of a pool, with where they come from; returns the files."""
    folder = RunFolder.of(config).analysis
    frames = {"predictions": predictions(config), "models": models(config)}
    files = [write_csv(frame, folder / f"{name}.csv", "%.6g") for name, frame in frames.items()]
    files.append(write_provenance(config, folder / "predictions_provenance.json"))
    return published(files, config) or files


def read_pools(folder: Path, names: Sequence[str] = POOLS) -> dict[str, pd.DataFrame]:
    """The tables of predictions that are in a folder, by experiment; pools that are not measured yet are left out."""
    files = {name: folder / f"{name}_predictions.csv" for name in names}
    return {name: pd.read_csv(file) for name, file in files.items() if file.exists()}


@dataclass(frozen=True)
class Claim:
    """One line of the table in docs/claims.md."""

    number: int
    method: str
    baseline: str
    on: str  # test or shifts
    paper: str
    margin: float | None = None  # a claim of equivalence has one, in [0, 1]


CLAIMS = (
    Claim(1, "greedy", "best", "test", "+0.65"),
    Claim(2, "greedy", "best", "shifts", "+2.92"),
    Claim(3, "greedy", "uniform", "test", "+1.06"),
    Claim(4, "ensemble", "greedy", "test", "+0.16"),
    Claim(5, "greedy", "ensemble", "shifts", "−0.02"),
    Claim(6, "learned_by_tensor", "greedy", "test", "+0.34", margin=0.01),
)


@dataclass(frozen=True)
class Estimate:
    """A difference of accuracies over pools, all in [-1, 1]."""

    mean: float
    low: float  # 95 % interval
    high: float
    error: float  # bootstrap standard error
    p: float
    per_pool: tuple[float, ...]

    @property
    def smallest_visible(self) -> float:
        """The smallest difference that would have been seen with 80 % power."""
        return POWER * self.error


def gains(pool: pd.DataFrame, method: str, baseline: str, on: str) -> NDArray[np.float64]:
    """(D, S, 2, G) by direction, split and class: the sum of what the method gains on its pictures, and their number.

    Method and baseline are columns of a table of predictions; "test" is the unseen split that has not selected.
    """
    groups, found = int(pool["class"].max()) + 1, []
    for selects, reports in (UNSEEN, UNSEEN[::-1]):
        for split in (reports,) if on == "test" else SHIFTS:
            rows = pool[(pool["selects"] == selects) & (pool["split"] == split)]
            gain, classes = (rows[method] - rows[baseline]).to_numpy(float), rows["class"].to_numpy()
            found.append([np.bincount(classes, gain, groups), np.bincount(classes, minlength=groups)])
    return np.asarray(found).reshape(2, -1, 2, groups)


def resampled(pools: Sequence[NDArray[np.float64]], resamples: int, seed: int) -> tuple[float, NDArray[np.float64]]:
    """The mean over pools of a difference, and its draws by a hierarchical bootstrap: pools, then classes within each.

    Of `gains` of each pool, whose difference is the unweighted mean over directions and splits.

    Source: Davison and Hinkley 1997, section 3.8.
    """
    generator = np.random.Generator(np.random.PCG64(seed))

    def differences(found: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        summed = found.reshape(-1, *found.shape[2:]) @ weights.T  # (D S, 2, R)
        return (summed[:, 0] / np.maximum(summed[:, 1], 1)).mean(axis=0)

    mean = float(np.mean([differences(found, np.ones((1, found.shape[-1]))) for found in pools]))
    draws = np.zeros(resamples)
    for _ in pools:
        drawn = generator.integers(len(pools), size=resamples)
        for number, found in enumerate(pools):
            rows = np.flatnonzero(drawn == number)
            present = np.flatnonzero(found[:, :, 1].sum(axis=(0, 1)))
            weights = generator.multinomial(len(present), np.full(len(present), 1 / len(present)), len(rows))
            draws[rows] += differences(found[..., present], weights.astype(float)) / len(pools)
    return mean, draws


def estimated(
    claim: Claim, pools: Mapping[str, pd.DataFrame], resamples: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """A claim's difference with its interval and p-value, over the pools that are there."""
    found = [gains(pool, claim.method, claim.baseline, claim.on) for pool in pools.values()]
    mean, draws = resampled(found, resamples, seed)
    if claim.margin is None:
        p = 2 * (1 + min(np.count_nonzero(draws >= 0), np.count_nonzero(draws <= 0))) / (resamples + 1)
    else:
        beyond = np.count_nonzero(draws >= claim.margin), np.count_nonzero(draws <= -claim.margin)
        p = (1 + max(beyond)) / (resamples + 1)
    low, high = np.quantile(draws, [0.025, 0.975])
    each = [float((one[:, :, 0].sum(axis=-1) / one[:, :, 1].sum(axis=-1)).mean()) for one in found]
    return Estimate(mean, float(low), float(high), float(draws.std(ddof=1)), float(min(1.0, p)), tuple(each))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Source: Holm 1979.
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def answer(claim: Claim, found: Estimate, p: float) -> str:
    """Yes, no or cannot tell, as docs/claims.md says."""
    if claim.margin is not None:
        is_no = found.low > claim.margin or found.high < -claim.margin
        is_yes = p < LEVEL
    else:
        is_yes, is_no = p < LEVEL and found.mean > 0, p < LEVEL
    return "yes" if is_yes else "no" if is_no else f"cannot tell (smallest visible {100 * found.smallest_visible:.1f})"


def answers(pools: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a claim: the difference with its interval, the corrected p, the answer; fractions throughout."""
    found = [estimated(claim, pools) for claim in CLAIMS]
    rows = []
    for claim, one, p in zip(CLAIMS, found, holm([each.p for each in found]), strict=True):
        row = {"claim": claim.number, "method": claim.method, "baseline": claim.baseline, "on": claim.on}
        row |= {"margin": claim.margin, "pools": len(pools), "difference": one.mean, "low": one.low, "high": one.high}
        row |= {"error": one.error, "smallest_visible": one.smallest_visible, "p": one.p, "p_holm": p}
        rows.append(row | {"answer": answer(claim, one, p)} | dict(zip(pools, one.per_pool, strict=True)))
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The same as text cells, in percentage points; answers of fewer pools than there will be are called interim."""
    names, cells = NAMES | {"learned_by_tensor": "Soup learned by tensor"}, []
    for claim, row in zip(CLAIMS, rows.to_dict("records"), strict=True):
        method, baseline = (names[name] for name in (claim.method, claim.baseline))
        on = "test" if claim.on == "test" else "mean of the five shifts"
        cells.append(
            {
                "": str(claim.number),
                "Difference": f"{method} − {baseline[:1].lower()}{baseline[1:]}, {on}",
                "Claimed": "above 0" if claim.margin is None else f"within {100 * claim.margin:.0f} of 0",
                "Points": f"{100 * row['difference']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]",
                "p (Holm)": f"{row['p_holm']:.4f}",
                "Answer" if row["pools"] == len(POOLS) else "Answer (interim)": row["answer"],
                "Paper": claim.paper,
            }
        )
    return pd.DataFrame(cells)


def _caption(pools: int) -> str:
    state = "" if pools == len(POOLS) else f" Interim: {pools} of {len(POOLS)} pools so far."
    return (
        f"{pools} pool{'' if pools == 1 else 's'} of 72 models on the embedded benchmark, a proxy for ImageNet with a "
        "proxy for CLIP ViT-B/32; percentage points with 95 % intervals of a bootstrap over pools and classes; "
        "held-out and test change places once; p corrected by Holm over the six."
        f"{state} Beside them the paper's Table 3."
    )


def gain_by_pool(pools: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Claims 1 and 2 in each pool, over its classes, and in all if several: on, pool, difference, low, high."""
    parts = {name: {name: pool} for name, pool in pools.items()}
    parts |= {"all pools": dict(pools)} if len(pools) > 1 else {}
    rows = []
    for claim in CLAIMS[:2]:
        for name, chosen in parts.items():
            found = estimated(claim, chosen)
            rows.append((claim.on, name, found.mean, found.low, found.high))
    return pd.DataFrame(rows, columns=["on", "pool", "difference", "low", "high"])


@styled
def gain_figure(rows: pd.DataFrame) -> Figure:
    """What the greedy soup gains over the best single model, from `gain_by_pool`, beside the paper's."""
    titles = {"test": "Test", "shifts": "Mean of 5 shifts"}
    paper = {claim.on: float(claim.paper) for claim in CLAIMS[:2]}
    figure, (line,) = panels(1, 2, 1.1 + 0.2 * (len(rows) // 2), width=COLUMN, sharey=True)
    for axes, (on, drawn) in zip(line, rows.groupby("on", sort=False), strict=True):
        for place, row in enumerate(drawn.to_dict("records")):
            is_whole = row["pool"] == "all pools"
            colour, marker, size, width = (STYLE["greedy"][1], "*", 9, 2.4) if is_whole else ("#555555", "o", 4, 1.2)
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=colour, lw=width)
            axes.plot(100 * row["difference"], place, marker, color=colour, ms=size)
        axes.plot(paper[on], len(drawn), "D", color="#0072B2", ms=5)
        axes.axvline(0, color="black", lw=0.8)
        names = [f"fold {POOLS.index(name)}" if name in POOLS else name for name in drawn["pool"]]
        axes.set_yticks(range(len(drawn) + 1), [*names, "paper"])
        axes.set(title=titles[on], ylim=(len(drawn) + 0.6, -0.6))  # the first on top
    figure.supxlabel("Greedy soup − best individual (points);\nbars are 95 % intervals", fontsize=8)
    return figure


def write_claims(folder: Path) -> list[Path]:
    """Write claims.{md,tex,csv} and claims_gain.{pdf,png,csv} into the folder with the pools' tables of predictions."""
    pools = read_pools(folder)
    if not pools:
        raise UserError(
            f"{folder} has no <pool>_predictions.csv of {', '.join(POOLS)}: run python reproduce.py experiment=demo72, "
            f"then python -m analysis predictions experiment=demo72 paths.results={folder}"
        )
    rows, by_pool = answers(pools), gain_by_pool(pools)
    files = write_cells(table(rows), rows, folder / "claims", _caption(len(pools)))
    return files + save_with_numbers(gain_figure(by_pool), by_pool, folder / "claims_gain")
