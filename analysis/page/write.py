"""runs/<name>/report.html: all that an experiment shows on one page, which needs nothing beside it.

The page loads nothing: styles, script and pictures are in it, and its policy forbids the rest. Every number in its
tables stands in a <data> element with the word that the csv or record has. Figures are those of the analysis.
"""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis.figures.calibration import draw_reliability
from analysis.figures.pool import BARS, LOOKS, decisions, draw_decisions, scatter_figure
from analysis.figures.style import inline_svg
from analysis.measure.methods import SHIFT_MEAN
from analysis.measure.mixtures import axis_labels
from analysis.page.files import Results, read_results
from analysis.tables.cells import BEST, caption, column_title, names_for, percent
from analysis.tables.table3 import note
from configs.schema import Experiment, dump
from soups.files.atomic import write_text

HERE = Path(__file__).resolve().parent
LANDSCAPES = ("figure2", "figurej1")
TILES = ("best", "uniform", "greedy", "ensemble")  # the first numbers to look at
STARTS = ("zero-shot", "initialisation")  # far below what is fine-tuned; no scale is made for them
MOST_STEPS, MOST_CELLS, MOST_MEMBERS = 200, 6000, 16  # beyond them a drawing, table or list says too little
Line = Mapping[str, str]  # of a csv: column -> its word


def data(word: str, shown: str) -> Markup:
    """A number of a file, and how it is shown; an empty cell of the file stays empty."""
    return Markup('<data value="{}">{}</data>').format(word, shown) if word else Markup()


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def short(word: str) -> str:
    """A number of a file in three digits that count, and other words as they are.

    >>> short("0.0019118233205326885"), short("620"), short("rand"), short("")
    ('0.00191', '620', 'rand', '')
    """
    if not _is_number(word):
        return word
    value = float(word)
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def percentage(word: str) -> Markup:
    """A fraction of a file in per cent."""
    return data(word, percent(float(word)) if word else "")


def accuracy(line: Line) -> Markup:
    """Per cent, with the standard deviation over random orders where there is one."""
    spread = Markup(" ({})").format(percentage(line["spread"])) if line["spread"] else Markup()
    return percentage(line["accuracy"]) + spread


def gain(line: Line) -> Markup:
    """A difference to the best individual model with its interval, in points."""
    if line["method"] == "best":
        return Markup('<span class="baseline">baseline</span>')
    parts = [data(line[name], f"{100 * float(line[name]):+.1f}") for name in ("difference", "low", "high")]
    return Markup("{} [{}, {}]").format(*parts)


def cell(word: str, name: str = "") -> Markup:
    """A cell of a csv's line: numbers in three digits, digests by their first eight, the rest as it is."""
    kind, shown = ("number", data(word, short(word))) if _is_number(word) else ("text", Markup.escape(word))
    if name == "digest":
        kind, shown = "code", data(word, word[:8])
    return Markup('<td class="{}">{}</td>').format(kind, shown)


def share(word: str) -> Markup:
    """A cell with a share in per cent, tinted by how large it is, or an empty one."""
    if not word:
        return Markup("<td></td>")
    shown = data(word, f"{100 * float(word):.0f}")
    return Markup('<td class="share" style="--share:{:.3f}">{}</td>').format(float(word), shown)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.tests["numeric"] = _is_number
ENVIRONMENT.filters |= {each.__name__: each for each in (data, short, percentage, accuracy, gain, cell, share, repr)}


def method_name(config: Experiment, method: str) -> str:
    """What a method or output is called; of several random orders with its number."""
    recipe, _, order = method.partition("/")
    return names_for(config.model.head).get(recipe, recipe) + (f", order {int(order) + 1}" if order.isdigit() else "")


def row_name(config: Experiment, row: int) -> str:
    """What a row of the sweep is called."""
    labels = config.analysis.labels
    return f"Row {row}" + (f": {labels[row - 1]}" if row <= len(labels) else "") if row else "Initialisation"


def write_report(config: Experiment, out: Path | None = None, typed: Sequence[str] = ()) -> Path:
    """Write the page of a finished experiment, from the files of its run folder alone; returns its path.

    Raises:
        UserError: it is several sweeps, or a file is missing or damaged; the message says what to run.
    """
    results = read_results(config, typed)
    path = out or results.run.root / "report.html"
    write_text(path, _page(results))
    return path


def _page(results: Results) -> str:
    config, scores, soups = results.config, results.scores, results.soups
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    drawing, marks = _scatter(results)
    reliability, tables = results.table("reliability"), {name: results.table(name) for name in LANDSCAPES}
    landscapes = {name: csv for name, csv in tables.items() if csv is not None}
    keys = [mark.key for mark in marks]
    varied = {name for mark in marks for name in mark.drawn if len({each.drawn.get(name) for each in marks}) > 2}
    columns = (config.task.test, SHIFT_MEAN)[: 2 if config.task.shifts else 1]
    ends = _ends(scores[scores["column"].isin(columns)])
    said = caption(scores.assign(n=scores["n"].astype(int)), note(config), BEST, config.task)
    return ENVIRONMENT.get_template("page.html.j2").render(
        results=results,
        config=config,
        commands=results.commands,
        note=note(config),
        method=partial(method_name, config),
        row=partial(row_name, config),
        title=partial(column_title, config.task),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        methods=_by_method(scores),
        tiles=TILES,
        columns=columns,
        sizes=dict(zip(scores["column"], scores["n"], strict=True)),
        interval=partial(_interval, *ends),
        headline=f"{said} Lines show the intervals from {100 * ends[0]:+.1f} to {100 * ends[1]:+.1f} points.",
        scatter=drawing,
        marks=marks,
        varied={name: {m.key: m.drawn[name] for m in marks if name in m.drawn} for name in sorted(varied)},
        chosen=next(key for key in ("greedy", "uniform", "best") if key in keys),
        models=results.manifest.to_dict("records"),
        drawings={output: _steps(output, soup) for output, soup in soups.items() if soup["trials"]},
        maps={r: csv.to_dict("records") for r, csv in results.shares.items() if csv.size <= MOST_CELLS},
        reliability=None if reliability is None else reliability.to_dict("records"),
        diagrams=None if reliability is None else _reliability(results),
        landscapes={name: list(_planes(config, csv)) for name, csv in landscapes.items()},
        made_by=_made_by(results),
        figures=["reliability"] * (reliability is not None) + list(landscapes),
        settings=json.dumps(dump(config), indent=2, sort_keys=True),
    )


def _by_method(scores: pd.DataFrame) -> dict[str, dict[str, Line]]:
    """Method -> column -> its line of the table."""
    found: dict[str, dict[str, Line]] = {}
    for line in scores.to_dict("records"):
        found.setdefault(line["method"], {})[line["column"]] = line
    return found


def _ends(scores: pd.DataFrame) -> tuple[float, float]:
    """The ends of the scale on which the intervals of a table are drawn."""
    numbers = scores.loc[~scores["method"].isin(STARTS), ["low", "high"]].astype(float)
    return min(numbers["low"].min(), -0.001), max(numbers["high"].max(), 0.001)


def _interval(left: float, right: float, line: Line) -> str:
    """Places of an interval between two ends, in per cent, as the style sheet draws it."""
    values = {"low": line["low"], "mean": line["difference"], "high": line["high"], "zero": "0"}
    at = {name: min(max((float(value) - left) / (right - left), 0), 1) for name, value in values.items()}
    return ";".join(f"--{name}:{100 * place:.1f}%" for name, place in at.items())


def _reliability(results: Results) -> Markup:
    numbers = pd.read_csv(results.run.analysis / "reliability.csv")
    return inline_svg(draw_reliability(results.config, numbers), "diagrams", "Reliability diagrams; a table follows")


def _steps(output: str, soup: dict[str, Any]) -> Markup | None:
    if not 1 < len(soup["trials"]) <= MOST_STEPS:
        return None
    says = "Held-out score with each model that was tried; the table after it has the numbers"
    return inline_svg(draw_decisions(decisions(soup)), f"drawn-{output.replace('/', '-')}", says)


def _planes(config: Experiment, landscape: pd.DataFrame) -> Iterator[tuple[str, str, Line]]:
    """The three models of each plane, and the point of its grid with the least test error, each with its plane."""
    error = f"error_{config.task.test}"
    for (first, second), plane in landscape.groupby(["first", "second"], sort=False):
        on_test = pd.to_numeric(plane.loc[plane["point"] == "grid", error])
        best = plane.loc[[on_test.idxmin()]] if on_test.notna().any() else plane[:0]
        rows = {"initialisation": 0, "first": int(first), "second": int(second)}
        for point in pd.concat([plane[plane["point"] != "grid"], best]).to_dict("records"):
            row = rows.get(point["point"])
            what = "Best point of the grid on test" if row is None else row_name(config, row)
            yield what, f"rows 0, {first} and {second}", point


def _made_by(results: Results) -> list[tuple[str, str, str]]:
    """What of the page, commit, and machine with versions of what made it; a line for each that differ."""
    records = {"models": results.done.values(), "soups and ensembles": results.soups.values()}
    counts = Counter((*_maker(each.get("provenance") or {}), what) for what, of in records.items() for each in of)
    lines = [(f"{n} {what}", commit, machine) for (commit, machine, what), n in counts.items()]
    return [*lines, ("tables", *_maker(results.provenance))]


def _maker(record: Mapping[str, Any]) -> tuple[str, str]:
    commit = record.get("commit") or "unknown: not a git checkout"
    machine, versions = record.get("machine") or {}, record.get("versions") or {}
    known = [machine.get(name) for name in ("processor", "capability", "system")]
    known += [f"{machine['cores']} cores"] if machine.get("cores") else []
    known += [f"{name} {version}" for name, version in {"Python": record.get("python"), **versions}.items() if version]
    modified = " with uncommitted changes" if record.get("modified") else ""
    return commit + modified, ", ".join(str(each) for each in known if each)


@dataclass(frozen=True)
class Mark:
    """A point of the scatter with everything that is said of it."""

    key: str
    name: str
    x: float  # in the units of the drawing
    y: float
    what: str
    lines: list[tuple[str, object]]  # scores, then settings or what it is made of
    members: list[str]  # keys of the models it is made of
    drawn: dict[str, str]  # of a model, the settings that the sweep draws

    @property
    def says(self) -> str:
        """For those who do not see it."""
        return f"{self.name}: " + ", ".join(f"{title} {Markup(value).striptags()}" for title, value in self.lines[:3])


def _scatter(results: Results) -> tuple[Markup, list[Mark]]:
    """Figure 1 with every method, and its points at their places in it; without shifts, held-out is drawn upwards."""
    config, words = results.config, results.points
    numbers = words[["name", "kind"]].join(words.drop(columns=["name", "kind"]).apply(pd.to_numeric))
    labels = axis_labels(config)
    x_label, y_label = labels[config.task.test], labels.get(SHIFT_MEAN, "Held-out (%)")
    if SHIFT_MEAN not in labels:
        numbers = numbers.assign(shift_mean=numbers["held_out"]).drop(columns=BARS, errors="ignore")
    numbers = numbers[numbers["kind"].isin(LOOKS) & numbers[["test", SHIFT_MEAN]].notna().all(axis=1)]
    figure = scatter_figure(numbers, (x_label, y_label), every_method=True)
    says = f"Scatter of {len(numbers)} models, soups and ensembles: {x_label} across, {y_label} up"
    drawing = inline_svg(figure, "plot", says)
    pixels = figure.axes[0].transData.transform(100 * numbers[["test", SHIFT_MEAN]].to_numpy()) * 72 / figure.dpi
    height = 72 * figure.get_figheight()
    places = [(round(x, 2), round(height - y, 2)) for x, y in pixels]
    return drawing, [_mark(results, words.loc[i], *place) for i, place in zip(numbers.index, places, strict=True)]


def _mark(results: Results, point: pd.Series, x: float, y: float) -> Mark:
    config, name, test = results.config, point["name"], results.config.task.test
    titles = {"test": column_title(config.task, test), SHIFT_MEAN: "Mean of shifts", "held_out": "Held-out"}
    lines: list[tuple[str, object]]
    lines = [(f"{title} (%)", percentage(point[column])) for column, title in titles.items() if point[column]]
    if point["kind"] == "individual":
        row = next(row for row in results.done if name.partition(" (")[0] == f"row {row}")
        drawn = results.manifest.set_index("row").loc[str(row)]
        drawn = {setting: value for setting, value in drawn.items() if "." in setting and value}
        lines += [(setting, short(value)) for setting, value in drawn.items()]
        lines += [
            (f"in {method_name(config, output)}", f"{100 * member['weight']:.0f} %")
            for output, soup in results.soups.items()
            for member in soup["ingredients"]
            if member["row"] == row and len(soup["ingredients"]) < len(results.done) - 1
        ]
        return Mark(_key(name), row_name(config, row), x, y, "Fine-tuned model", lines, [], drawn)
    cells = _by_method(results.scores)[name]
    columns = (test, SHIFT_MEAN) if name != "best" else ()
    lines += [(f"{column_title(config.task, c)} − best", gain(cells[c])) for c in columns if c in cells]
    lines.append(("Models at inference", cells[test]["models"]))
    members: dict[str, None] = {}
    for output, soup in results.soups.items():
        if output.partition("/")[0] == name:
            made_of = sorted(soup["ingredients"], key=lambda member: -member["weight"])
            members |= dict.fromkeys(_key(f"row {member['row']}") for member in made_of)
            shown = made_of[:MOST_MEMBERS] if output == name else []
            lines += [(f"of {row_name(config, each['row'])}", f"{100 * each['weight']:.0f} %") for each in shown]
            rest = len(made_of) - len(shown)
            lines += [(method_name(config, output) if not shown else "and", f"{rest} models")] * (rest > 0)
    what = {"initialisation": "What fine-tuning starts from", "best": "Chosen on held-out"}.get(name)
    what = what or ("Mean of answers" if "ensemble" in name else "Mean of weights")
    return Mark(_key(name), method_name(config, name), x, y, what, lines, list(members), {})


def _key(name: str) -> str:
    """How the page's script calls a point.

    >>> _key("row 3"), _key("row 0"), _key("greedy")
    ('row-3', 'initialisation', 'greedy')
    """
    return "initialisation" if name == "row 0" else name.partition(" (")[0].replace("row ", "row-")
