"""The page's tables, from the csv files and records of a run folder."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from analysis.measure.methods import SHIFT_MEAN
from analysis.page.cells import Cell, Interval, Table, cells_of, number, percentage, short, text
from analysis.page.files import Results, Texts
from analysis.tables.cells import BEST, HEADS, NAMES, caption, column_title, points
from analysis.tables.table3 import note
from configs.schema import Experiment

STARTS = ("zero-shot", "initialisation")  # far below what is fine-tuned; no scale is made for them


def method_name(config: Experiment, method: str) -> str:
    """What a method or dish is called; of several random orders with its number."""
    if method == "initialisation":
        return f"Initialisation ({HEADS[config.model.head]})"
    recipe, _, order = method.partition("/")
    return NAMES.get(recipe, recipe) + (f", order {int(order) + 1}" if order.isdigit() else "")


def row_name(config: Experiment, row: int) -> str:
    """What a row of the sweep is called."""
    if row == 0:
        return "Initialisation"
    labels = config.analysis.labels
    return f"Row {row}" + (f": {labels[row - 1]}" if row <= len(labels) else "")


def gain(words: pd.Series, numbers: pd.Series, ends: tuple[float, float] | None = None) -> Cell:
    """A difference with its interval.

    Args:
        words: a line of the table's csv.
        numbers: the same.
        ends: of the line on which it is drawn; None: it is not drawn.
    """
    if numbers["method"] == "best":
        return Cell((("baseline", None),), kind="baseline")
    mean, low, high = (numbers[name] for name in ("difference", "low", "high"))
    first, _, rest = points(mean, low, high).partition(" [")
    lower, _, upper = rest.rstrip("]").partition(", ")
    parts = (
        (first, words["difference"]),
        (" [", None),
        (lower, words["low"]),
        (", ", None),
        (upper, words["high"]),
        ("]", None),
    )
    drawn = None
    if ends:
        left, right = ends
        at = [100 * min(max((value - left) / (right - left), 0.0), 1.0) for value in (low, mean, high, 0.0)]
        drawn = Interval(*at)
    return Cell(parts, interval=drawn, kind="gain")


def accuracy(words: pd.Series) -> Cell:
    """Per cent, with the standard deviation over random orders where there is one."""
    parts: tuple[tuple[str, str | None], ...] = ((percentage(words["accuracy"]), words["accuracy"]),)
    if words["spread"]:
        parts += ((" (", None), (percentage(words["spread"]), words["spread"]), (")", None))
    return Cell(parts, kind="number")


def by_method(scores: Texts) -> Iterator[tuple[str, dict[str, tuple[pd.Series, pd.Series]]]]:
    """Each method's lines of the table by column, as words and numbers."""
    found: dict[str, dict[str, tuple[pd.Series, pd.Series]]] = {}
    for words, numbers in scores.lines():
        found.setdefault(words["method"], {})[words["column"]] = (words, numbers)
    return iter(found.items())


def ends_of(scores: Texts, columns: tuple[str, ...]) -> tuple[float, float]:
    """Where intervals begin and end, 0 among them, of all methods but the starts of fine-tuning."""
    rows = scores.numbers[~scores.numbers["method"].isin(STARTS) & scores.numbers["column"].isin(columns)]
    return min(float(rows["low"].min()), -0.001), max(float(rows["high"].max()), 0.001)


def headline(results: Results) -> Table:
    """Each method on test and on the mean of shifts, with its difference to the best individual model."""
    config, scores = results.config, results.scores
    columns = (config.task.test, SHIFT_MEAN) if config.task.shifts else (config.task.test,)
    heads = ["Method"]
    for column in columns:
        heads += [f"{column_title(config.task, column)} (%)", f"{column_title(config.task, column)} − best"]
    scale, lines = ends_of(scores, columns), []
    for method, cells in by_method(scores):
        line = [text(method_name(config, method), "star" if method == "greedy" else "")]
        for column in columns:
            words, numbers = cells[column]
            line += [accuracy(words), gain(words, numbers, scale)]
        words = cells[config.task.test][0]
        line += [number(words["held_out"], percentage(words["held_out"])), number(words["models"], words["models"])]
        lines.append(tuple(line))
    said = caption(scores.numbers, note(config), BEST, config.task)
    drawn = f" Lines show the intervals from {100 * scale[0]:+.1f} to {100 * scale[1]:+.1f} points."
    return Table(said + drawn, (*heads, "Held-out (%)", "Models at inference"), tuple(lines), kind="headline")


def splits(results: Results) -> Table:
    """Each method on every split, with its difference to the best individual model."""
    config, lines = results.config, []
    columns = list(results.scores.words["column"].unique())
    sizes = results.scores.numbers.drop_duplicates("column").set_index("column")["n"]
    for method, cells in by_method(results.scores):
        line = [text(method_name(config, method))]
        for column in columns:
            words, numbers = cells[column]
            line.append(Cell((*accuracy(words).parts, ("\n", None), *gain(words, numbers).parts), kind="number both"))
        lines.append(tuple(line))
    heads = ("Method", *(f"{column_title(config.task, column)} (n = {sizes[column]})" for column in columns))
    said = "In %; below, the difference to the best individual model in points with its 95 % interval."
    return Table(said, heads, tuple(lines), kind="dense")


def pool(results: Results) -> Table:
    """The manifest, with each model's name and its seed."""
    config, words = results.config, results.manifest.words
    held_out = [name for name in words.columns if name in ("held_out_top1", "held_out_score")]
    drawn = [name for name in words.columns if "." in name]
    rest = [name for name in words.columns if name not in ("row", *held_out, *drawn)]
    lines = []
    for _, line in words.iterrows():
        row = int(line["row"])
        seed = results.done.get(row, {}).get("seed")
        cells = [Cell(((row_name(config, row), line["row"]),))]
        cells += [number(line[name], percentage(line[name])) for name in held_out]
        cells += [*cells_of(line[drawn]), *cells_of(line[rest])]
        lines.append((*cells, text("" if seed is None else seed, "code")))
    shown = {"held_out_top1": "Held-out top-1 (%)", "held_out_score": "Held-out score (%)", "held_out_n": "Held-out n"}
    heads = [shown.get(name, name) for name in (*held_out, *drawn, *rest)]
    said = f"{len(lines)} models. Choose a head to sort by it."
    return Table(said, ("Model", *heads, "seed"), tuple(lines), kind="dense", sortable=True)


def composition(results: Results) -> Table:
    """Which share every soup and ensemble takes of each model, in per cent."""
    config = results.config
    rows = [int(row) for row in results.manifest.words["row"]]
    lines = []
    for dish, soup in results.soups.items():
        weights = {member["row"]: member["weight"] for member in soup["ingredients"]}
        cells = [
            Cell(((f"{100 * weights[row]:.0f}", repr(weights[row])),), share=weights[row], kind="share")
            if row in weights
            else text("", "share")
            for row in rows
        ]
        name = text(method_name(config, dish), "star" if dish == "greedy" else "")
        count = text("weights" if soup["digest"] else "answers")
        lines.append((name, count, *cells))
    said = "Share of each row in % of the mixture; row 0 is the initialisation. An empty cell takes nothing."
    return Table(said, ("Soup or ensemble", "Mean of", *map(str, rows)), tuple(lines), kind="dense grid")


def decisions(config: Experiment, soup: Mapping[str, Any]) -> Table:
    """Every model that a greedy recipe tried, in order."""
    n, lines = soup["held_out"]["n"], []
    compared = any(trial["versus"] for trial in soup["trials"])
    for place, trial in enumerate(soup["trials"], 1):
        score = ("" if trial["exact"] else "at most ") + percentage(repr(trial["score"]))
        counted = f" ({trial['correct']} of {n})" if "correct" in trial else ""
        line = [
            text(place),
            text(row_name(config, trial["row"])),
            text("✓ kept" if trial["accepted"] else "✗ left out", "kept" if trial["accepted"] else "dropped"),
            Cell(((score, repr(trial["score"])), (counted, None)), kind="number"),
        ]
        if compared:
            versus = trial["versus"] or {}
            line.append(text(", ".join(f"{name} {short(str(value))}" for name, value in versus.items())))
        lines.append(tuple(line))
    heads = ("Step", "Model tried", "Decision", "Held-out with it (%)", *(("Against the soup before",) * compared))
    said = f"Selected on {soup['selected_on']['split']}, n = {n}."
    return Table(said, heads, tuple(lines), kind="dense")


def coefficients(results: Results, recipe: str) -> Table:
    """Mixing coefficients of a learned soup: groups of parameters down, models across (Appendix I)."""
    shares = results.shares[recipe]
    names = [name for name in shares.words.columns if name != "group"]
    most = float(shares.numbers[names].max().max()) or 1.0
    lines = []
    for words, numbers in shares.lines():
        cells = [
            Cell(((f"{100 * numbers[name]:.0f}", words[name]),), share=numbers[name] / most, kind="heat")
            for name in names
        ]
        lines.append((text(words["group"], "code"), *cells))
    said = f"Coefficients in %, each line sums to 100; the darkest is {100 * most:.0f} %. Row 0 is the initialisation."
    return Table(said, ("Group", *(name.removeprefix("row ") for name in names)), tuple(lines), kind="dense grid")


def calibration(reliability: Texts) -> Table:
    """Calibration errors before and after temperature scaling."""
    first = reliability.words.drop_duplicates(["model", "stage"])
    n = reliability.numbers.groupby(["model", "stage"])["count"].sum()
    lines = []
    for model in first["model"].unique():
        before, after = (first[(first["model"] == model) & (first["stage"] == stage)] for stage in ("before", "after"))
        beta, errors = after["beta"].iloc[0], [each["ece"].iloc[0] for each in (before, after)]
        lines.append(
            (
                text(model),
                *(number(error, percentage(error)) for error in errors),
                number(beta, f"{float(beta):.2f}"),
                number(str(n[model, "before"]), str(n[model, "before"])),
            )
        )
    said = "Expected calibration error on test in %, as trained and with the temperature fitted on held-out."
    return Table(said, ("Model", "ECE before (%)", "ECE after (%)", "β, inverse temperature", "n"), tuple(lines))


def planes(config: Experiment, landscape: Texts) -> Table:
    """The three models of each plane, and the point of its grid with the least test error."""
    error = f"error_{config.task.test}"
    shifts = f"error_{SHIFT_MEAN}"
    columns = ["train_loss", error] + [shifts] * (shifts in landscape.words)
    named = {"train_loss": "Training loss (nats)", error: "Test error (%)", shifts: "Mean error on shifts (%)"}
    lines = []
    for (first, second), plane in landscape.numbers.groupby(["first", "second"], sort=False):
        names = {"initialisation": 0, "first": first, "second": second}
        grid = plane[plane["point"] == "grid"]
        best = grid[error].idxmin() if grid[error].notna().any() else None
        for index, point in plane["point"].items():
            if point == "grid" and index != best:
                continue
            words = landscape.words.loc[index]
            what = row_name(config, int(names[point])) if point in names else "Best point of the grid on test"
            cells = [number(words[c], short(words[c]) if c == "train_loss" else percentage(words[c])) for c in columns]
            lines.append((text(what), text(f"rows 0, {first} and {second}"), *cells))
    heads = ("Point", "Plane", *(named[column] for column in columns))
    return Table("Models of each plane, and the grid's best point on test.", heads, tuple(lines))
