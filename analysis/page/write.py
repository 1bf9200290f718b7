"""runs/<name>/report.html: all that an experiment shows on one page, which needs nothing beside it.

The page loads nothing: styles, script and pictures are in it, and its policy forbids the rest. Every number in its
tables stands in a <data> element with the word that the csv or record has. Figures are those of the analysis.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
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
from analysis.page import tables
from analysis.page.files import Results, read_results
from analysis.tables.table3 import note
from configs.schema import Experiment, dump
from soups.files.atomic import write_text

HERE = Path(__file__).resolve().parent
LANDSCAPES = ("figure2", "figurej1")
TILES = ("best", "uniform", "greedy", "ensemble")  # the first numbers to look at
MOST_STEPS, MOST_CELLS, MOST_MEMBERS = 200, 6000, 16  # beyond them a drawing, table or list says too little
ENVIRONMENT = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


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


def write_report(config: Experiment, out: Path | None = None, typed: Sequence[str] = ()) -> Path:
    """Write the page of a finished experiment, from the files of its run folder alone.

    Args:
        config: of the experiment; of several sweep seeds, one of its replicates.
        out: where to, runs/<name>/report.html where it is not said.
        typed: settings of the command line, for the commands that the page names.

    Raises:
        UserError: a stage before this one is not finished, or a file is damaged.
    """
    results = read_results(config, typed)
    path = out or results.run.root / "report.html"
    write_text(path, page(results))
    return path


def page(results: Results) -> str:
    """The whole page."""
    config = results.config
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    drawing, marks = scatter(results)
    reliability, landscapes = results.table("reliability"), {name: results.table(name) for name in LANDSCAPES}
    made = [name for name, csv in {"reliability": reliability, **landscapes}.items() if csv is not None]
    keys = [mark.key for mark in marks]
    varied = {name for mark in marks for name in mark.drawn if len({each.drawn.get(name) for each in marks}) > 2}
    return ENVIRONMENT.get_template("page.html.j2").render(
        name=config.name,
        note=note(config),
        commands=results.commands,
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tiles={name: of for name, of in tables.by_method(results.scores).items() if name in TILES},
        tables=tables,
        results=results,
        scatter=drawing,
        marks=marks,
        settings={name: {m.key: m.drawn[name] for m in marks if name in m.drawn} for name in sorted(varied)},
        chosen=next(key for key in ("greedy", "uniform", "best") if key in keys),
        logs=[_log(results, output, soup) for output, soup in results.soups.items() if soup["trials"]],
        maps={recipe: shares for recipe, shares in results.shares.items() if shares.size <= MOST_CELLS},
        reliability=reliability,
        diagrams=None if reliability is None else _reliability(results),
        landscapes={name: csv for name, csv in landscapes.items() if csv is not None},
        seeds_only=results.picture("figureb2"),
        parts=tables.parts(results, made),
        config=json.dumps(dump(config), indent=2, sort_keys=True),
    )


def _reliability(results: Results) -> Markup:
    numbers = pd.read_csv(results.run.analysis / "reliability.csv")
    return inline_svg(draw_reliability(results.config, numbers), "diagrams", "Reliability diagrams; a table follows")


def _log(results: Results, output: str, soup: dict[str, Any]) -> dict[str, Any]:
    drawing = None
    if 1 < len(soup["trials"]) <= MOST_STEPS:
        says = "Held-out score with each model that was tried; the table after it has the numbers"
        drawing = inline_svg(draw_decisions(decisions(soup)), f"drawn-{output.replace('/', '-')}", says)
    table = tables.decisions(results.config, output, soup)
    return {"output": output, "soup": soup, "drawing": drawing, "table": table}


def scatter(results: Results) -> tuple[Markup, list[Mark]]:
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
    return drawing, [
        _mark(results, words.loc[index], round(x, 2), round(height - y, 2))
        for index, (x, y) in zip(numbers.index, pixels, strict=True)
    ]


def _mark(results: Results, point: pd.Series, x: float, y: float) -> Mark:
    config, name = results.config, point["name"]
    titles = {"test": tables.column_title(config.task, config.task.test), SHIFT_MEAN: "Mean of shifts"}
    lines: list[tuple[str, object]] = [
        (f"{title} (%)", tables.percentage(point[column]))
        for column, title in (titles | {"held_out": "Held-out"}).items()
        if point[column]
    ]
    if point["kind"] == "individual":
        row = next(row for row in results.done if name.partition(" (")[0] == f"row {row}")
        drawn = results.manifest.set_index("row").loc[str(row)]
        drawn = {setting: value for setting, value in drawn.items() if "." in setting and value}
        lines += [(setting, tables.short(value)) for setting, value in drawn.items()]
        lines += [
            (f"in {tables.method_name(config, output)}", f"{100 * member['weight']:.0f} %")
            for output, soup in results.soups.items()
            for member in soup["ingredients"]
            if member["row"] == row and len(soup["ingredients"]) < len(results.done) - 1
        ]
        return Mark(_key(name), tables.row_name(config, row), x, y, "Fine-tuned model", lines, [], drawn)
    cells = tables.by_method(results.scores)[name]
    columns = (config.task.test, SHIFT_MEAN) if name != "best" else ()
    lines += [(f"{tables.column_title(config.task, c)} − best", tables.gain(cells[c])) for c in columns if c in cells]
    lines.append(("Models at inference", cells[config.task.test]["models"]))
    members: dict[str, None] = {}
    for output, soup in results.soups.items():
        if output.partition("/")[0] == name:
            made_of = sorted(soup["ingredients"], key=lambda member: -member["weight"])
            members |= dict.fromkeys(_key(f"row {member['row']}") for member in made_of)
            shown = made_of[:MOST_MEMBERS] if output == name else []
            lines += [(f"of {tables.row_name(config, each['row'])}", f"{100 * each['weight']:.0f} %") for each in shown]
            rest = len(made_of) - len(shown)
            lines += [(f"{tables.method_name(config, output) if not shown else 'and'}", f"{rest} models")] * (rest > 0)
    what = {"initialisation": "What fine-tuning starts from", "best": "Chosen on held-out"}.get(name)
    what = what or ("Mean of answers" if "ensemble" in name else "Mean of weights")
    return Mark(_key(name), tables.method_name(config, name), x, y, what, lines, list(members), {})


def _key(name: str) -> str:
    """How the page's script calls a point.

    >>> _key("row 3"), _key("row 0"), _key("greedy")
    ('row-3', 'initialisation', 'greedy')
    """
    return "initialisation" if name == "row 0" else name.partition(" (")[0].replace("row ", "row-")
