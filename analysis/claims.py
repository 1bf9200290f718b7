"""The six claims of docs/claims.md, answered from tables of predictions alone (analysis/predictions.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.figures.style import COLUMN, STYLE, panels, save_with_numbers, styled
from analysis.predictions import read_pools
from analysis.tables.cells import NAMES, write_cells
from configs.errors import UserError

POOLS = ("demo72", "demo72_fold1", "demo72_fold2", "demo72_fold3", "demo72_fold4")
SHIFTS = ("v2", "r", "sketch", "objectnet", "a")
UNSEEN = ("held_out", "test")  # either selects and the other reports
RESAMPLES, SEED = 10_000, 0
POWER = 2.8  # standard errors between 0 and a difference that is seen with 80 % power: 1.96 + 0.84
LEVEL = 0.05


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

    Args:
        pool: a table of predictions.
        method, baseline: columns of it.
        on: "test", which is the unseen split that has not selected, or "shifts".
    """
    splits = {selects: (reports,) if on == "test" else SHIFTS for selects, reports in (UNSEEN, UNSEEN[::-1])}
    groups = int(pool["class"].max()) + 1
    found = []
    for selects, reported in splits.items():
        for split in reported:
            rows = pool[(pool["selects"] == selects) & (pool["split"] == split)]
            gain, classes = (rows[method] - rows[baseline]).to_numpy(float), rows["class"].to_numpy()
            found.append([np.bincount(classes, gain, groups), np.bincount(classes, minlength=groups)])
    return np.asarray(found).reshape(len(splits), -1, 2, groups)


def resampled(pools: Sequence[NDArray[np.float64]], resamples: int, seed: int) -> tuple[float, NDArray[np.float64]]:
    """The mean over pools of a difference, and its draws by a hierarchical bootstrap: pools, then classes within each.

    Args:
        pools: the `gains` of each. A pool's difference is the unweighted mean over directions and splits.
        resamples: how many draws.
        seed: of the draws.

    Returns:
        The difference, and (resamples,) draws of it.

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
    above, below = (np.count_nonzero(draws >= 0) + 1, np.count_nonzero(draws <= 0) + 1)
    p = min(1.0, 2 * min(above, below) / (resamples + 1))
    if claim.margin is not None:
        beyond = (np.count_nonzero(draws >= claim.margin), np.count_nonzero(draws <= -claim.margin))
        p = (max(beyond) + 1) / (resamples + 1)
    low, high = np.quantile(draws, [0.025, 0.975])
    each = [(one[:, :, 0].sum(axis=-1) / one[:, :, 1].sum(axis=-1)).mean() for one in found]
    return Estimate(mean, float(low), float(high), float(draws.std(ddof=1)), float(p), tuple(map(float, each)))


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
        if p < LEVEL:
            return "yes"
        beyond = found.low > claim.margin or found.high < -claim.margin
        return "no" if beyond else f"cannot tell (smallest visible {100 * found.smallest_visible:.1f})"
    if p < LEVEL:
        return "yes" if found.mean > 0 else "no"
    return f"cannot tell (smallest visible {100 * found.smallest_visible:.1f})"


def answers(pools: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a claim: the difference with its interval, the corrected p, the answer; fractions throughout."""
    found = [estimated(claim, pools) for claim in CLAIMS]
    rows = []
    for claim, one, p in zip(CLAIMS, found, holm([each.p for each in found]), strict=True):
        row = {"claim": claim.number, "method": claim.method, "baseline": claim.baseline, "on": claim.on}
        row |= {"margin": claim.margin, "pools": len(pools), "difference": one.mean, "low": one.low, "high": one.high}
        row |= {"error": one.error, "smallest_visible": one.smallest_visible, "p": one.p, "p_holm": p}
        row |= {"answer": answer(claim, one, p)}
        rows.append(row | dict(zip(pools, one.per_pool, strict=True)))
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The same as text cells, in percentage points; answers of fewer pools than there will be are called interim."""
    answered = "Answer" if rows["pools"].eq(len(POOLS)).all() else "Answer (interim)"
    names, cells = NAMES | {"learned_by_tensor": "Soup learned by tensor"}, []
    for claim, (_, row) in zip(CLAIMS, rows.iterrows(), strict=True):
        method, baseline = (names[name] for name in (claim.method, claim.baseline))
        on = "test" if claim.on == "test" else "mean of the five shifts"
        holds = "above 0" if claim.margin is None else f"within {100 * claim.margin:.0f} of 0"
        cells.append(
            {
                "": str(claim.number),
                "Difference": f"{method} − {baseline[:1].lower()}{baseline[1:]}, {on}",
                "Claimed": holds,
                "Points": f"{100 * row['difference']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]",
                "p (Holm)": f"{row['p_holm']:.4f}",
                answered: row["answer"],
                "Paper": claim.paper,
            }
        )
    return pd.DataFrame(cells)


def caption(pools: Sequence[str]) -> str:
    """How many pools, and what the numbers are."""
    number = f"{len(pools)} pool{'' if len(pools) == 1 else 's'} of 72 models"
    state = "" if len(pools) == len(POOLS) else f" Interim: {len(pools)} of {len(POOLS)} pools so far."
    return (
        f"{number} on the embedded benchmark, a proxy for ImageNet with a proxy for CLIP ViT-B/32; percentage points "
        "with 95 % intervals of a bootstrap over pools and classes; held-out and test change places once; p corrected "
        f"by Holm over the six.{state} Beside them the paper's Table 3."
    )


def gain_by_pool(pools: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Claims 1 and 2 in each pool, over its classes, and in all if several: on, pool, difference, low, high."""
    parts = {name: {name: pool} for name, pool in pools.items()} | (
        {"all pools": dict(pools)} if len(pools) > 1 else {}
    )
    rows = []
    for claim in CLAIMS[:2]:
        for name, chosen in parts.items():
            found = estimated(claim, chosen)
            rows.append((claim.on, name, found.mean, found.low, found.high))
    return pd.DataFrame(rows, columns=["on", "pool", "difference", "low", "high"])


@styled
def gain_figure(rows: pd.DataFrame) -> Figure:
    """What the greedy soup gains over the best single model in each pool, with 95 % intervals, beside the paper's.

    Args:
        rows: from `gain_by_pool`.
    """
    titles = {"test": "Test", "shifts": "Mean of 5 shifts"}
    paper = {claim.on: float(claim.paper) for claim in CLAIMS[:2]}
    figure, (line,) = panels(1, 2, 1.1 + 0.2 * (len(rows) // 2), width=COLUMN, sharey=True)
    for axes, (on, drawn) in zip(line, rows.groupby("on", sort=False), strict=True):
        for place, (_, row) in enumerate(drawn.iterrows()):
            whole = row["pool"] == "all pools"
            colour = STYLE["greedy"][1] if whole else "#555555"
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color=colour, lw=2.4 if whole else 1.2)
            axes.plot(100 * row["difference"], place, "*" if whole else "o", color=colour, ms=9 if whole else 4)
        axes.plot(paper[on], len(drawn), "D", color="#0072B2", ms=5)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(titles[on])
        names = [f"fold {POOLS.index(name)}" if name in POOLS else name for name in drawn["pool"]]
        axes.set_yticks(range(len(drawn) + 1), [*names, "paper"])
        axes.set_ylim(len(drawn) + 0.6, -0.6)  # the first on top
    figure.supxlabel("Greedy soup − best individual (points);\nbars are 95 % intervals", fontsize=8)
    return figure


def write_claims(folder: Path) -> list[Path]:
    """Write claims.{md,tex,csv} and claims_gain.{pdf,png,csv} into the folder with the pools' tables of predictions.

    Raises:
        UserError: no pool's table is there.
    """
    pools = read_pools(folder, POOLS)
    if not pools:
        raise UserError(
            f"{folder} has no <pool>_predictions.csv of {', '.join(POOLS)}: run python reproduce.py experiment=demo72, "
            f"then python -m analysis predictions experiment=demo72 paths.results={folder}"
        )
    rows = answers(pools)
    files = write_cells(table(rows), rows, folder / "claims", caption(list(pools)))
    by_pool = gain_by_pool(pools)
    return files + save_with_numbers(gain_figure(by_pool), by_pool, folder / "claims_gain")
