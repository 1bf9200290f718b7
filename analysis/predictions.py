"""From a finished pool to one table of predictions, in which held-out and test have changed places once.

Both are unseen drawings of the same designs, so either can select and the other report (docs/claims.md). Everything
that is claimed of pools of 72 is computed from these tables alone.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich import get_console

from analysis.figures.style import write_csv
from analysis.tables.table3 import published, write_provenance
from configs.errors import UserError
from configs.schema import Experiment, Recipe
from eval.forward import Evaluator
from eval.metrics import nll
from soups.experiment.pool import usable_pool
from soups.experiment.soups import logits_of, make_soup, make_soups
from store.runs import RunFolder

METHODS: tuple[Recipe, ...] = ("best", "uniform", "greedy", "learned_by_tensor", "ensemble", "greedy_ensemble")
KEYS = ("selects", "split", "image", "class")


def directions(config: Experiment) -> tuple[tuple[str, str], ...]:
    """(the split that selects, the split that reports), both ways."""
    task = config.task
    return (task.held_out, task.test), (task.test, task.held_out)


def predictions(config: Experiment) -> pd.DataFrame:
    """Which images each method gets right, whichever of held-out and test selects; what is not made yet is made.

    Returns one row for each direction and image of the splits that report: selects, split, image (its number in the
    split), class (of the task), and a column of 0 and 1 for each of `METHODS`.

    Raises:
        UserError: something was chosen on held-out before the pool was made, so that the two cannot change places; or
            a pool that is not finished.
    """
    if len(config.model.probe_c) > 1 or config.optim.keep == "best":
        raise UserError(
            "held-out has chosen before the pool was made, so it cannot change places with test: the pool needs "
            "model.probe_c=[1] and optim.keep=last"
        )
    evaluator, frames = Evaluator(config), []
    for selects, reports in directions(config):
        make_soups(config, METHODS, get_console(), selects)
        soups = {method: make_soup(method, evaluator, selects) for method in METHODS}
        for split in (reports, *config.task.shifts):
            labels = evaluator.split(split).labels.tolist()
            frame = pd.DataFrame({"selects": selects, "split": split, "image": range(len(labels)), "class": labels})
            for method, made in soups.items():
                frame[method] = evaluator.hits(logits_of(made, split, evaluator), split).int().numpy()
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def models(config: Experiment) -> pd.DataFrame:
    """One row for each usable model: row, digest, what was drawn, and accuracy and NLL on every split."""
    evaluator, rows = Evaluator(config), []
    splits = (config.task.held_out, *config.task.reported)
    for member in usable_pool(config):
        row = {"row": member.row, "digest": member.digest, **member.drawn}
        for split in splits:
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


def read_pools(folder: Path, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The tables of predictions that are in a folder, by experiment; pools that are not measured yet are left out."""
    files = {name: folder / f"{name}_predictions.csv" for name in names}
    return {name: pd.read_csv(file) for name, file in files.items() if file.exists()}
