"""How often soups beat the best model of their pool by more than noise, and whether that can be predicted.

From the csv files in results/measured alone. What is found here is what `soups doctor` says of a user's pool
(soups/will_it_help.json). Sub-pools of one pool share models and images, so a pool counts once, however many sub-pools
it has: shares are means over pools, intervals take each pool as one observation, and checks hold back a whole pool.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.claims import UNSEEN, gains, read_pools
from analysis.figures.style import save, styled, write_csv
from analysis.tables.cells import write_cells
from configs.errors import UserError
from soups.doctor import TABLE, features
from soups.files.atomic import write_json
from store.provenance import provenance

OUTCOMES = tuple(product(("greedy", "uniform"), ("test", "shifts")))
NOISE = 1.645  # standard errors: one-sided, 5 %
# Pools whose files are older than predictions.csv: experiment -> its table, and n of its held-out split.
TABLES = {"demo_seeds": ("table3", 596), "demo_text_seeds": ("table5", 600)}
TEXTS = "demo_text_seeds"
FIGURES = {"demo_grid_lp": "figureh1"}  # the held-out scores of its models are not in results/measured
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FEATURES = list(features([1.0], 1))


def with_error(found: NDArray[np.float64]) -> tuple[float, float]:
    """A difference of accuracies, the unweighted mean over splits, and its standard error over classes.

    Of (S, 2, G) `gains`: by split and class the sum of differences, and the number of pictures.

    Source: the linearisation of a ratio of sums over clusters; Cochran 1977, section 6.4.
    """
    sums, counts = found[:, 0], found[:, 1]
    means = sums.sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)
    influence = ((sums - means * counts) / counts.sum(axis=1, keepdims=True)).mean(axis=0)
    groups = np.count_nonzero(counts.sum(axis=0))
    return float(means.mean()), float(np.sqrt(groups / (groups - 1) * (influence**2).sum()))


def noise(predictions: pd.DataFrame, on: str) -> float:
    """The standard error of a difference between a soup and the best model of a sub-pool, as a fraction.

    Taken from the uniform soup of the whole pool: sub-pools have accuracies and no answers to single images, and the
    greedy soup of a pool may be its best model, which has no error.
    """
    return with_error(gains(predictions, "uniform", "best", on)[0])[1]


def _of_folds(folder: Path) -> Iterator[dict[str, Any]]:
    """The pools of docs/claims.md, with either split selecting, and their sub-pools."""
    for name, predictions in read_pools(folder).items():
        models = pd.read_csv(folder / f"{name}_models.csv").set_index("row")
        for direction, selects in enumerate(UNSEEN):
            count = int((predictions["split"] == selects).sum())  # it reports once, where the other one selects
            line = {"pool": name, "what": f"all models, {selects} selects", **features(list(models[selects]), count)}
            for soup, on in OUTCOMES:
                difference, error = with_error(gains(predictions, soup, "best", on)[direction])
                line[f"{soup} {on}"] = difference / error if error else 0.0
            yield line
        file = folder / f"{name}_subpools.csv"
        errors = {on: noise(predictions, on) for on in ("test", "shifts")}
        for _, row in pd.read_csv(file).iterrows() if file.exists() else ():
            members = [int(word) for word in str(row["rows"]).split()]
            line = {"pool": name, "what": f"{row['models']} models, {row['kind']}"}
            line |= features(list(models.loc[members, "held_out"]), row["held_out"])
            yield line | {f"{s} {on}": (row[f"{s} {on}"] - row[f"best {on}"]) / errors[on] for s, on in OUTCOMES}


def _in_errors(rows: pd.DataFrame) -> dict[str, float]:
    """Each soup's gain in standard errors; the 95 % intervals of a pool's rows are 3.92 standard errors wide."""
    found, columns = {}, {"test": "test", "shifts": "shift_mean"}
    for soup, on in OUTCOMES:
        row = rows[(rows["method"] == soup) & (rows["column"] == columns[on])].iloc[0]
        width = row["high"] - row["low"]
        found[f"{soup} {on}"] = 3.92 * row["difference"] / width if width else 0.0
    return found


def _of_tables(folder: Path) -> Iterator[dict[str, Any]]:
    """Older pools, with a table of all soups or a figure of soups by the number of models."""
    for name, (table, held_out) in TABLES.items():
        for file in sorted(folder.glob(f"{name}_seed*_{table}.csv")):
            pool = file.name.removesuffix(f"_{table}.csv")
            models = pd.read_csv(folder / f"{pool}_figure1.csv")
            among = ("individual",) if name == TEXTS else ("individual", "initialisation")  # those that soups are of
            scores = list(models.loc[models["kind"].isin(among), "held_out"])
            line = {"pool": pool, "what": "all models, held_out selects", **features(scores, held_out)}
            yield line | _in_errors(pd.read_csv(file))
    for name, figure in FIGURES.items():
        if (file := folder / f"{name}_{figure}.csv").exists():
            rows = pd.read_csv(file)
            size = rows["considered"].max()
            whole = rows[(rows["order"] == "mean") & (rows["considered"] == size)]
            yield {"pool": name, "what": "all models, held_out selects", "models": size} | _in_errors(whole)


def read_lines(folder: Path) -> pd.DataFrame:
    """A line for each pool or sub-pool: pool, what it is, the features, and each soup's gain in standard errors.

    Features are NaN where held-out scores are not known. Two pools of images are needed, so that one can be held back.
    """
    lines = pd.DataFrame([*_of_folds(folder), *_of_tables(folder)])
    if lines.empty or of_images(lines)["pool"].nunique() < 2:
        raise UserError(
            f"{folder} has the csv files of fewer than two pools: python -m analysis predictions writes them"
        )
    return lines


def of_images(lines: pd.DataFrame, *, images: bool = True) -> pd.DataFrame:
    """The lines of pools of images, or of texts."""
    return lines[lines["pool"].str.startswith(TEXTS) != images]


def jeffreys(successes: float, pools: int) -> tuple[float, float, float]:
    """The probability of a success and its 95 % interval by Jeffreys' prior; a pool may be a success in part.

    >>> tuple(round(x, 2) for x in jeffreys(0, 4))
    (0.1, 0.0, 0.44)

    Source: Brown, Cai and DasGupta 2001, section 4.
    """
    beta = scipy.stats.beta(successes + 0.5, pools - successes + 0.5)
    return float(beta.mean()), float(beta.ppf(0.025)), float(beta.ppf(0.975))


def share(lines: pd.DataFrame, outcome: tuple[str, str], sign: int = 1) -> tuple[float, float, float]:
    """How often a soup is better than the best model by more than noise, or with sign=-1 worse; as `jeffreys`."""
    by_pool = (sign * lines[" ".join(outcome)] > NOISE).groupby(lines["pool"]).mean()
    return jeffreys(by_pool.sum(), len(by_pool))


def by_features(known: pd.DataFrame, asked: pd.DataFrame, outcome: tuple[str, str]) -> NDArray[np.float64]:
    """Probabilities that a soup is better, by a logistic regression on all `features`; the base rate if none was.

    Counts are in logarithms, features standardised, pools weigh the same, and the penalty is scikit-learn's default.
    Where a feature is not known, NaN.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    if asked[FEATURES].isna().any(axis=None):
        return np.full(len(asked), np.nan)
    known = known.dropna(subset=FEATURES)
    better = (known[" ".join(outcome)] > NOISE).to_numpy()
    if better.all() or not better.any():
        return np.full(len(asked), share(known, outcome)[0])
    weights = 1 / known.groupby("pool")["pool"].transform("size").to_numpy()
    inputs = [np.column_stack([each[FEATURES[:2]].apply(np.log), each[FEATURES[2:]]]) for each in (known, asked)]
    middle = np.average(inputs[0], axis=0, weights=weights)
    scale = np.sqrt(np.average((inputs[0] - middle) ** 2, axis=0, weights=weights))
    fitted, given = ((each - middle) / np.where(scale > 0, scale, 1) for each in inputs)
    found: NDArray[np.float64] = LogisticRegression().fit(fitted, better, weights).predict_proba(given)[:, 1]
    return found


def held_back(lines: pd.DataFrame) -> pd.DataFrame:
    """What is predicted of each pool from the other image pools, by base rate and by features, and what came of it."""
    images, rows = of_images(lines), []
    for pool, asked in lines.groupby("pool", sort=False):
        known = images[images["pool"] != pool]
        for soup, on in OUTCOMES:
            frame = asked[["pool", "what"]].assign(soup=soup, on=on)
            frame["base rate"] = share(known, (soup, on))[0]
            frame["features"] = by_features(known, asked, (soup, on))
            frame["better"] = (asked[f"{soup} {on}"] > NOISE).astype(int)
            rows.append(frame)
    return pd.concat(rows, ignore_index=True)


def _brier(predicted: pd.DataFrame, how: str) -> "pd.Series[float]":
    """Mean squared differences between probability and outcome, by soup, split and pool."""
    squared = (predicted[how] - predicted["better"]) ** 2
    return squared.groupby([predicted[key] for key in ("soup", "on", "pool")], sort=False).mean()


def improvement(predicted: pd.DataFrame) -> tuple[float, float]:
    """By how much features lower the Brier score of the base rate, over outcomes and pools, and the standard error."""
    better = (_brier(predicted, "base rate") - _brier(predicted, "features")).groupby("pool").mean().dropna()
    return float(better.mean()), float(better.std() / np.sqrt(len(better)))


def rows_of(lines: pd.DataFrame, predicted: pd.DataFrame) -> pd.DataFrame:
    """A line for each soup and split: shares better and worse with intervals, and Brier scores with standard errors."""
    images, rows = of_images(lines), []
    for soup, on in OUTCOMES:
        row: dict[str, Any] = {"soup": soup, "on": on, "pools": images["pool"].nunique(), "lines": len(images)}
        for word, sign in (("better", 1), ("worse", -1)):
            row |= dict(zip((word, f"{word} low", f"{word} high"), share(images, (soup, on), sign), strict=True))
        asked = predicted[(predicted["soup"] == soup) & (predicted["on"] == on)]
        for how, kind in product(("base rate", "features"), ("", " texts")):
            scores = _brier(of_images(asked, images=not kind), how)
            row |= {f"brier {how}{kind}": scores.mean(), f"brier {how}{kind} error": scores.sem()}
        rows.append(row)
    return pd.DataFrame(rows)


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    found = []
    for row in rows.to_dict("records"):
        line = {"Soup": row["soup"], "On": "test" if row["on"] == "test" else "mean of the shifts"}
        for word in ("better", "worse"):
            low, high = row[f"{word} low"], row[f"{word} high"]
            line[f"{word.capitalize()} by more than noise"] = f"{row[word]:.0%} [{low:.0%}, {high:.0%}]"
        for how in ("base rate", "features"):
            line[f"Brier, {how}"] = f"{row[f'brier {how}']:.2f} ± {row[f'brier {how} error']:.2f}"
        found.append(line | {"Brier, base rate, texts": f"{row['brier base rate texts']:.2f}"})
    return pd.DataFrame(found)


def table_of(lines: pd.DataFrame, predicted: pd.DataFrame) -> dict[str, Any]:
    """What soups/will_it_help.json holds, but for the commit."""
    images = of_images(lines)
    gain, error = improvement(of_images(predicted))
    soups = [
        {"soup": soup, "on": "test images" if on == "test" else "shifted images"}
        | {word: [round(x, 4) for x in share(images, (soup, on), s)] for word, s in (("better", 1), ("worse", -1))}
        for soup, on in OUTCOMES
    ]
    predict = "predict better, which is not used here" if gain > 2 * error else "do not predict better"
    return {
        "made_by": "python -m analysis will_it_help",
        "pools": images.groupby("pool", sort=False).size().to_dict(),
        "kind": "image classifiers",
        "noise": f"{NOISE} standard errors, with 600 test images and 4,400 of five shifts",
        "ranges": {
            name: [round(float(end), 4) for end in (images[name].min(), images[name].max())] for name in FEATURES
        },
        "soups": soups,
        "note": "they are the same for every pool: number of models, held-out size and scores "
        f"{predict} in a pool that is held back (docs/will-it-help.md)",
    }


def reliability(predicted: pd.DataFrame, how: str) -> pd.DataFrame:
    """Predicted and observed shares, with `jeffreys` intervals, by bins of the prediction; a pool counts once a bin."""
    predicted, rows = predicted.dropna(subset=how), []
    for _, group in predicted.groupby(np.digitize(predicted[how], BINS[1:-1])):
        by_pool = group.groupby("pool")[[how, "better"]].mean()
        _, low, high = jeffreys(by_pool["better"].sum(), len(by_pool))
        rows.append((by_pool[how].mean(), by_pool["better"].mean(), low, high, len(by_pool)))
    return pd.DataFrame(rows, columns=["predicted", "observed", "low", "high", "pools"])


@styled
def _figure_of(predicted: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """The reliability diagram of both predictions, and their Brier scores by soup and split."""
    looks = ("base rate", -0.006, "#0072B2", "o"), ("features", 0.006, "#E69F00", "s")
    figure = Figure(figsize=(6.6, 3.1))
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="black", lw=0.8)
    for how, aside, colour, marker in looks:
        for found in reliability(of_images(predicted), how).itertuples():
            place = found.predicted + aside
            left.plot([place, place], [found.low, found.high], color=colour, lw=1)
            left.plot(place, found.observed, marker, color=colour, ms=5)
            spot = (place, found.observed)
            left.annotate(f"{found.pools:.0f}", spot, (4, -8), textcoords="offset points", size=6)
        for place, (middle, error) in enumerate(rows[[f"brier {how}", f"brier {how} error"]].to_numpy()):
            at = place + 10 * aside
            right.plot([middle - error, middle + error], [at, at], color=colour, lw=1.2)
            right.plot(middle, at, marker, color=colour, ms=5, label=how if place == 0 else None)
    left.set(xlabel="predicted probability of a gain beyond noise", ylabel="observed share")
    left.set(xlim=(0, 1), ylim=(-0.07, 1.04))
    title = "Pools held back, both soups and splits together;\n95 % intervals, a pool counts once; numbers: pools"
    left.set_title(title, fontsize=7)
    right.axvline(0.25, color="black", lw=0.8, ls="--", label="always one half")
    right.set_yticks(range(len(rows)), rows["soup"] + ", " + rows["on"])
    right.invert_yaxis()
    right.set(xlabel="Brier score (lower is better)", xlim=(-0.02, None))
    right.set_title("Pools held back; bars: one standard\nerror over pools", fontsize=7)
    right.legend(fontsize=6, loc="center right", bbox_to_anchor=(1, 0.36))
    figure.tight_layout()
    return figure


def write_will_it_help(folder: Path, table: Path = TABLE) -> list[Path]:
    """Write will_it_help.{md,tex,csv,pdf,png} and will_it_help_held_back.csv into a folder of results, and the table
    that `soups doctor` reads.
    """
    lines = read_lines(folder)
    predicted = held_back(lines)
    rows, images = rows_of(lines, predicted), of_images(lines)
    gain, error = improvement(of_images(predicted))
    caption = (
        f"{images['pool'].nunique()} pools of image classifiers ({len(images)} pools and sub-pools), each pool counted "
        f"once; noise is {NOISE} standard errors of the difference to the best model; 95 % intervals by Jeffreys; "
        "Brier scores of pools held back, ± a standard error over pools (0.25: always one half). Features change "
        f"the Brier score by {-gain:+.3f} ± {error:.3f}."
    )
    files = write_cells(_cells(rows), rows, folder / "will_it_help", caption)
    files += save(_figure_of(predicted, rows), folder / "will_it_help")
    files.append(write_csv(predicted, folder / "will_it_help_held_back.csv", "%.6g"))
    write_json(table, {**table_of(lines, predicted), "commit": provenance()["commit"]})
    return [*files, table]
