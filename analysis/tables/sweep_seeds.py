"""The claim over several sweep seeds: mean and spread of each method, and how often it beats the best individual."""

import pandas as pd

from analysis.figures.style import write_csv
from analysis.measure.methods import SHIFT_MEAN
from analysis.tables.cells import NAMES, column_title, percent
from analysis.tables.table3 import Report, published
from configs.data import Task
from configs.schema import Experiment
from soups.files.atomic import write_text
from store.runs import RunFolder


def seeds_table(tidy: dict[int, pd.DataFrame], task: Task) -> pd.DataFrame:
    """One row per method: accuracy mean (standard deviation) over sweep seeds, difference to best individual per seed.

    Args:
        tidy: sweep seed -> `analysis.measure.methods.tidy` of that replicate.
        task: that they are of.
    """
    everything = pd.concat(frame.assign(seed=seed) for seed, frame in tidy.items())
    rows = []
    for method in everything["method"].unique():
        row = {"Method": NAMES.get(method, method)}
        for column in (task.test, SHIFT_MEAN):
            title = column_title(task, column)
            cells = everything[(everything["method"] == method) & (everything["column"] == column)]
            row[title] = f"{percent(cells['accuracy'].mean())} ({100 * cells['accuracy'].std(ddof=1):.1f})"
            per_seed = ", ".join(f"{100 * difference:+.1f}" for difference in cells["difference"])
            significant = int((cells["low"] > 0).sum())
            row[f"{title} − best, per seed"] = "" if method == "best" else per_seed
            row[f"{title}: interval above 0"] = "" if method == "best" else f"{significant} of {len(cells)}"
        rows.append(row)
    return pd.DataFrame(rows)


def over_seeds(config: Experiment, tidy: dict[int, pd.DataFrame]) -> Report:
    """Write seeds.{md,csv} for all replicates of an experiment."""
    folder = RunFolder.of(config).analysis
    table = seeds_table(tidy, config.task)
    everything = pd.concat([frame.assign(seed=seed) for seed, frame in tidy.items()], ignore_index=True)
    text = (
        f"Top-1 accuracy in %, mean (standard deviation) over sweep seeds {', '.join(map(str, tidy))}; differences to "
        "each seed's best individual model in percentage points; intervals are 95 % paired bootstrap."
    )
    files = [folder / f"seeds{suffix}" for suffix in (".md", ".csv")]
    write_text(files[0], f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{text}\n")
    write_csv(everything, files[1])
    return Report(table, everything, (*files, *published(files, config)), text)
