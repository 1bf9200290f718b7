"""The page's tables, from the csv files and records of a run folder; numbers keep the word that the file has."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from analysis.measure.methods import SHIFT_MEAN
from analysis.page.files import Results
from analysis.tables.cells import BEST, HEADS, NAMES, caption, column_title, percent
from analysis.tables.table3 import note
from configs.schema import Experiment

Line = Mapping[str, str]  # of a csv: column -> its word
STARTS = ("zero-shot", "initialisation")  # far below what is fine-tuned; no scale is made for them


@dataclass(frozen=True)
class Cell:
    """What one cell says."""

    shown: Markup
    kind: str = "text"  # for the style sheet; "number" is set to the right
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Cells under their heads; the first of each line is the line's own head."""

    id: str
    caption: str
    heads: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    kind: str = "dense"


def text(words: object, kind: str = "text") -> Cell:
    """Words alone."""
    return Cell(Markup.escape(str(words)), kind)


def data(word: str, shown: str) -> Markup:
    """A number of a file, and how it is shown; an empty cell of the file stays empty."""
    return Markup('<data value="{}">{}</data>').format(word, shown) if word else Markup()


def number(word: str, shown: str | None = None) -> Cell:
    """A number alone; in three digits that count where it is not said how it is shown."""
    return Cell(data(word, short(word) if shown is None else shown), "number")


def is_number(word: str) -> bool:
    """Whether a cell of a file is a finite number."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def short(word: str) -> str:
    """A number of a file in three digits that count, and other words as they are.

    >>> short("0.0019118233205326885"), short("620"), short("rand"), short("")
    ('0.00191', '620', 'rand', '')
    """
    if not is_number(word):
        return word
    value = float(word)
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def percentage(word: str) -> Markup:
    """A fraction of a file in per cent."""
    return data(word, percent(float(word)) if word else "")


def cells_of(words: pd.Series) -> list[Cell]:
    """A line of a csv: numbers in three digits, digests by their first eight, the rest as it is."""
    return [
        Cell(data(word, word[:8]), "code") if name == "digest" else number(word) if is_number(word) else text(word)
        for name, word in words.items()
    ]


def plain(id_: str, words: pd.DataFrame, said: str) -> Table:
    """All of a csv."""
    return Table(id_, said, list(words.columns), [cells_of(line) for _, line in words.iterrows()])


def method_name(config: Experiment, method: str) -> str:
    """What a method or output is called; of several random orders with its number."""
    if method == "initialisation":
        return f"Initialisation ({HEADS[config.model.head]})"
    recipe, _, order = method.partition("/")
    return NAMES.get(recipe, recipe) + (f", order {int(order) + 1}" if order.isdigit() else "")


def row_name(config: Experiment, row: int) -> str:
    """What a row of the sweep is called."""
    labels = config.analysis.labels
    return f"Row {row}" + (f": {labels[row - 1]}" if row <= len(labels) else "") if row else "Initialisation"


def gain(line: Line) -> Markup:
    """A difference to the best individual model with its interval, in points."""
    if line["method"] == "best":
        return Markup('<span class="baseline">baseline</span>')
    parts = [data(line[name], f"{100 * float(line[name]):+.1f}") for name in ("difference", "low", "high")]
    return Markup("{} [{}, {}]").format(*parts)


def accuracy(line: Line) -> Markup:
    """Per cent, with the standard deviation over random orders where there is one."""
    spread = Markup(" ({})").format(percentage(line["spread"])) if line["spread"] else Markup()
    return percentage(line["accuracy"]) + spread


def by_method(scores: pd.DataFrame) -> dict[str, dict[str, Line]]:
    """Method -> column -> its line of the table."""
    found: dict[str, dict[str, Line]] = {}
    for line in scores.to_dict("records"):
        found.setdefault(line["method"], {})[line["column"]] = line
    return found


def _drawn(line: Line, left: float, right: float) -> str:
    """Places of an interval between two ends, in per cent, as the style sheet draws it."""
    values = {"low": line["low"], "mean": line["difference"], "high": line["high"], "zero": "0"}
    at = {name: min(max((float(value) - left) / (right - left), 0), 1) for name, value in values.items()}
    return ";".join(f"--{name}:{100 * place:.1f}%" for name, place in at.items())


def headline(results: Results) -> Table:
    """Each method on test and on the mean of shifts, with its difference to the best individual model."""
    config, columns = results.config, (results.config.task.test, SHIFT_MEAN)[: 2 if results.config.task.shifts else 1]
    scores = results.scores
    numbers = scores[~scores["method"].isin(STARTS) & scores["column"].isin(columns)][["low", "high"]].astype(float)
    ends, lines = (min(numbers["low"].min(), -0.001), max(numbers["high"].max(), 0.001)), []
    for method, cells in by_method(scores).items():
        line = [text(method_name(config, method), "star" if method == "greedy" else "text")]
        for column in columns:
            found = cells[column]
            style = "" if method == "best" else _drawn(found, *ends)
            line += [Cell(accuracy(found), "number"), Cell(gain(found), "gain", style)]
        first = cells[config.task.test]
        lines.append([*line, Cell(percentage(first["held_out"]), "number"), number(first["models"])])
    titles = [column_title(config.task, column) for column in columns]
    heads = [head for title in titles for head in (f"{title} (%)", f"{title} − best")]
    said = caption(scores.assign(n=scores["n"].astype(int)), note(config), BEST, config.task)
    said += f" Lines show the intervals from {100 * ends[0]:+.1f} to {100 * ends[1]:+.1f} points."
    return Table("headline", said, ["Method", *heads, "Held-out (%)", "Models at inference"], lines, "headline")


def splits(results: Results) -> Table:
    """Each method on every split, with its difference to the best individual model."""
    config, sizes = results.config, dict(zip(results.scores["column"], results.scores["n"], strict=True))
    lines = [
        [text(method_name(config, method))]
        + [Cell(accuracy(cells[column]) + Markup("<br>") + gain(cells[column]), "number both") for column in sizes]
        for method, cells in by_method(results.scores).items()
    ]
    heads = ["Method", *(f"{column_title(config.task, column)} (n = {n})" for column, n in sizes.items())]
    said = "In %; below, the difference to the best individual model in points with its 95 % interval."
    return Table("splits", said, heads, lines)


def pool(results: Results) -> Table:
    """The manifest, with each model's name and its seed."""
    config, words = results.config, results.manifest
    shown = {"held_out_top1": "Held-out top-1 (%)", "held_out_score": "Held-out score (%)"}
    held_out, drawn = [n for n in words if n in shown], [n for n in words if "." in n]
    rest = [n for n in words if n not in ("row", *held_out, *drawn)]
    lines = []
    for _, line in words.iterrows():
        row = int(line["row"])
        scores = [Cell(percentage(line[name]), "number") for name in held_out]
        seed = text(results.done.get(row, {}).get("seed") or "", "code")
        name = Cell(data(line["row"], row_name(config, row)))
        lines.append([name, *scores, *cells_of(line[drawn]), *cells_of(line[rest]), seed])
    heads = ["Model", *(shown[name] for name in held_out), *drawn, *rest, "seed"]
    return Table("pool", f"{len(lines)} models. Choose a head to sort by it.", heads, lines, "dense sortable")


def _map(id_: str, said: str, heads: Sequence[str], lines: Iterable[tuple[Sequence[Cell], Mapping[str, str]]]) -> Table:
    """Shares in per cent, tinted by how large they are: each line has cells before, and column -> share in the file."""
    made, columns = [], [head.removeprefix("row ") for head in heads[2:]]
    for before, shares in lines:
        cells = [
            Cell(data(word, f"{100 * float(word):.0f}"), "share", f"--share:{float(word):.3f}") if word else text("")
            for word in (shares.get(head, "") for head in heads[2:])
        ]
        made.append([*before, *cells])
    return Table(id_, said, [*heads[:2], *columns], made, "dense grid")


def composition(results: Results) -> Table:
    """Which share every soup and ensemble takes of each model, in per cent."""
    lines = []
    for output, soup in results.soups.items():
        of_what = text(method_name(results.config, output)), text("weights" if soup["digest"] else "answers")
        lines.append((of_what, {str(member["row"]): repr(member["weight"]) for member in soup["ingredients"]}))
    said = "Share of each row in % of the mixture; row 0 is the initialisation. An empty cell takes nothing."
    return _map("composition", said, ["Soup or ensemble", "Mean of", *results.manifest["row"]], lines)


def coefficients(recipe: str, shares: pd.DataFrame) -> Table:
    """Mixing coefficients of a learned soup: groups of parameters down, models across (Appendix I)."""
    names = [name for name in shares if name != "group"]
    lines = [((text(line["group"], "code"), text("")), dict(line[names])) for _, line in shares.iterrows()]
    said = "Coefficients in %, each line sums to 100. Row 0 is the initialisation."
    return _map(f"coefficients-{recipe}", said, ["Group", "", *names], lines)


def decisions(config: Experiment, output: str, soup: Mapping[str, Any]) -> Table:
    """Every model that a greedy recipe tried, in order."""
    n, lines = soup["held_out"]["n"], []
    for place, trial in enumerate(soup["trials"], 1):
        counted = f" ({trial['correct']} of {n})" if "correct" in trial else ""
        score = Markup("" if trial["exact"] else "at most ") + percentage(repr(trial["score"])) + counted
        versus = ", ".join(f"{name} {short(str(value))}" for name, value in (trial["versus"] or {}).items())
        decision = text("✓ kept", "kept") if trial["accepted"] else text("✗ left out", "dropped")
        lines.append([text(place), text(row_name(config, trial["row"])), decision, Cell(score, "number"), text(versus)])
    size = 5 if any(trial["versus"] for trial in soup["trials"]) else 4
    heads = ["Step", "Model tried", "Decision", "Held-out with it (%)", "Against the soup before"][:size]
    said = f"Selected on {soup['selected_on']['split']}, n = {n}."
    return Table(f"log-{output}", said, heads, [line[:size] for line in lines])


def calibration(reliability: pd.DataFrame) -> Table:
    """Calibration errors before and after temperature scaling."""
    lines = []
    for model, rows in reliability.groupby("model", sort=False):
        before, after = rows.drop_duplicates("stage").to_dict("records")
        errors = [Cell(percentage(each["ece"]), "number") for each in (before, after)]
        n = str(rows.loc[rows["stage"] == "after", "count"].astype(int).sum())
        lines.append([text(model), *errors, number(after["beta"]), number(n)])
    said = "Expected calibration error on test in %, as trained and with the temperature fitted on held-out."
    heads = ["Model", "ECE before (%)", "ECE after (%)", "β, inverse temperature", "n"]
    return Table("reliability", said, heads, lines)


def planes(config: Experiment, name: str, landscape: pd.DataFrame) -> Table:
    """The three models of each plane, and the point of its grid with the least test error."""
    named = {"train_loss": "Training loss (nats)", f"error_{config.task.test}": "Test error (%)"}
    named |= {f"error_{SHIFT_MEAN}": "Mean error on shifts (%)"} if f"error_{SHIFT_MEAN}" in landscape else {}
    loss, *errors = named
    lines = []
    for (first, second), plane in landscape.groupby(["first", "second"], sort=False):
        on_test = pd.to_numeric(plane.loc[plane["point"] == "grid", errors[0]])
        best = plane.loc[[on_test.idxmin()]] if on_test.notna().any() else plane[:0]
        rows = {"initialisation": 0, "first": int(first), "second": int(second)}
        for point in pd.concat([plane[plane["point"] != "grid"], best]).to_dict("records"):
            row = rows.get(point["point"])
            what = "Best point of the grid on test" if row is None else row_name(config, row)
            scores = [number(point[loss]), *(Cell(percentage(point[error]), "number") for error in errors)]
            lines.append([text(what), text(f"rows 0, {first} and {second}"), *scores])
    said = "Models of each plane, and the grid's best point on test."
    return Table(name, said, ["Point", "Plane", *named.values()], lines)


def made_by(results: Results) -> Table:
    """Commit, machine and versions of models, soups and tables; a line for each that differ."""
    records = [("models", each.get("provenance")) for each in results.done.values()]
    records += [("soups and ensembles", each.get("provenance")) for each in results.soups.values()]
    counts = Counter((_commit(each or {}), _machine(each or {}), what) for what, each in records)
    counts[(_commit(results.provenance), _machine(results.provenance), "tables")] = 1
    lines = [
        [text(what if what == "tables" else f"{n} {what}"), text(commit, "code"), text(machine)]
        for (commit, machine, what), n in counts.items()
    ]
    return Table("made-by", "What made the files that this page shows.", ["Part", "Commit", "Machine, versions"], lines)


def _commit(record: Mapping[str, Any]) -> str:
    commit = record.get("commit") or "unknown: not a git checkout"
    return commit + (" with uncommitted changes" if record.get("modified") else "")


def _machine(record: Mapping[str, Any]) -> str:
    machine, versions = record.get("machine") or {}, record.get("versions") or {}
    known = [machine.get(name) for name in ("processor", "capability", "system")]
    known += [f"{machine['cores']} cores"] if machine.get("cores") else []
    known += [
        f"{package} {version}" for package, version in {"Python": record.get("python"), **versions}.items() if version
    ]
    return ", ".join(str(each) for each in known if each)


def parts(results: Results, figures: Sequence[str]) -> Table:
    """The command behind each part of the page, and of figures that have one of their own."""
    commands, table = results.commands, "table5" if results.config.task.is_text else "table3"
    lines = [
        ("Everything but single figures", "all of these", f"python reproduce.py {commands.settings}"),
        ("Models", "ingredients/*/done.json, manifest.csv", commands.stage("finetune")),
        ("Answers", "logits/*/*.npy", commands.stage("eval")),
        ("Soups and ensembles", "soups/*/soup.json", commands.stage("soups")),
        ("Results and scatter", f"analysis/{table}.csv, figure1.csv", commands.stage("analysis")),
        *((figure, f"analysis/{figure}.*", commands.artefact(figure)) for figure in figures),
        ("This page", "report.html", f"python -m analysis report {commands.settings}"),
    ]
    cells = [[text(what), text(files, "code"), text(command, "code command")] for what, files, command in lines]
    return Table("parts", "Each command skips what is there and unchanged.", ["Part", "Files", "Command"], cells)
