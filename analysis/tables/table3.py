"""The analysis of one experiment: Table 3, Figure 1, and the files behind them; and of its sweep seeds together."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.figures.pool import draw_coefficients, draw_scatter, measure_coefficients, scatter_points
from analysis.figures.style import save_with_numbers, write_csv
from analysis.measure.methods import SHIFT_MEAN, measure, tidy
from analysis.tables.cells import BEST, NAMES, caption, column_title, markdown, percent, table3, write_cells
from analysis.tables.named_rows import write_named_rows
from configs.data import Task
from configs.schema import Experiment, Recipe
from eval.forward import Evaluator
from soups.files.atomic import replacing, write_json, write_text
from store.provenance import provenance
from store.runs import RunFolder

GROUPED: tuple[Recipe, ...] = ("learned_by_layer", "learned_by_tensor")  # soups whose groups have coefficients


@dataclass(frozen=True)
class Report:
    """The files that `analyse` wrote, and the table for the terminal."""

    table: pd.DataFrame
    tidy: pd.DataFrame
    files: tuple[Path, ...]
    caption: str  # n of each split, and what intervals are


def note(config: Experiment) -> str:
    """A sentence for captions: benchmark and model, with what they are proxies for, the pool, and `analysis.note`."""
    model, task, cooking = config.model, config.task, config.cooking
    proxies = ["" if each.proxy_for is None else f", a proxy for {each.proxy_for}" for each in (task, model)]
    candidates = "and the initialisation" if cooking.initialisation else "without the initialisation"
    if cooking.individuals:
        best = ", ".join(cooking.individuals)
        candidates += f", soups and ensembles of {config.regularizer.ingredient}, best of {best}"
    text = (
        f"Benchmark {task.name}{proxies[0]}; model {model.name or model.kind}{proxies[1]}; "
        f"{config.sweep.size} fine-tuned models {candidates}, sweep seed {config.sweep.seed}. {config.analysis.note}"
    )
    return text.strip()


def analyse(config: Experiment) -> Report:
    """Write table3.{md,tex,csv} (of texts table5), figure1.{pdf,png,csv} and provenance.json, from cached logits."""
    evaluator = Evaluator(config)
    pool, methods = measure(evaluator)
    scores, folder = tidy(methods, evaluator), RunFolder.of(config).analysis
    table, text = table3(scores, config.task, config.model.head), caption(scores, note(config), BEST, config.task)
    files = write_cells(table, scores, folder / ("table5" if config.task.is_text else "table3"), text)
    if config.task.shifts:
        points = scatter_points(config, pool, methods, scores)
        files += save_with_numbers(draw_scatter(config, points), points, folder / "figure1")
    else:
        files.append(write_csv(scatter_points(config, pool, methods), folder / "figure1.csv"))
    files.append(write_provenance(config, folder / "provenance.json"))
    for recipe in [each for each in config.recipes if each in GROUPED]:
        shares = measure_coefficients(config, recipe=recipe)
        files += save_with_numbers(draw_coefficients(config, shares), shares, folder / f"coefficients_{recipe}")
    if config.analysis.labels:
        files += write_named_rows(evaluator, folder, note(config))
    return Report(table, scores, (*files, *published(files, config)), text)


def seeds_table(tidy: dict[int, pd.DataFrame], task: Task) -> pd.DataFrame:
    """One row per method: accuracy mean (standard deviation) over sweep seeds, difference to best model per seed."""
    everything, rows = pd.concat(tidy.values()), []
    for method, group in everything.groupby("method", sort=False):
        row = {"Method": NAMES.get(str(method), str(method))}
        for column in (task.test, SHIFT_MEAN):
            title, cells = column_title(task, column), group[group["column"] == column]
            row[title] = f"{percent(cells['accuracy'].mean())} ({100 * cells['accuracy'].std(ddof=1):.1f})"
            per_seed = ", ".join(f"{100 * difference:+.1f}" for difference in cells["difference"])
            above = f"{int((cells['low'] > 0).sum())} of {len(cells)}"
            row[f"{title} − best, per seed"] = "" if method == "best" else per_seed
            row[f"{title}: interval above 0"] = "" if method == "best" else above
        rows.append(row)
    return pd.DataFrame(rows)


def over_seeds(config: Experiment, tidy: dict[int, pd.DataFrame]) -> Report:
    """Write seeds.{md,csv} for all replicates of an experiment."""
    table, stem = seeds_table(tidy, config.task), RunFolder.of(config).analysis / "seeds"
    everything = pd.concat([frame.assign(seed=seed) for seed, frame in tidy.items()], ignore_index=True)
    text = (
        f"Top-1 accuracy in %, mean (standard deviation) over sweep seeds {', '.join(map(str, tidy))}; differences to "
        "each seed's best individual model in percentage points; intervals are 95 % paired bootstrap."
    )
    files = [stem.with_suffix(".md"), write_csv(everything, stem.with_suffix(".csv"))]
    write_text(files[0], markdown(table, text))
    return Report(table, everything, (*files, *published(files, config)), text)


def write_provenance(config: Experiment, path: Path, **more: str) -> Path:
    """Record which experiment, machine and commit the files beside are of, and more; returns the path."""
    of = {"experiment": config.name, "sweep_seed": config.sweep.seed, "rows": config.sweep.size}
    write_json(path, more | of | provenance())
    return path


def published(files: Sequence[Path], config: Experiment) -> list[Path]:
    """Copies of an experiment's files among other results; none where `paths.results` is not set."""
    results = config.paths.results
    return [] if results is None else [publish(file, results, config.name) for file in files]


def publish(file: Path, results: Path, name: str) -> Path:
    """Copy a result to results/<name>_<file>, whole or not at all."""
    target = results / f"{name.replace('/', '_')}_{file.name}"
    with replacing(target) as temporary:
        shutil.copyfile(file, temporary)
    return target
