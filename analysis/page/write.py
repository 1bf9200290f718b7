"""runs/<name>/report.html: all that an experiment shows on one page, which needs nothing beside it.

The page loads nothing: styles, script and pictures are in it, and its policy forbids the rest. Every number in its
tables stands in a <data> element with the word that the csv or record has.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.measure.methods import SHIFT_MEAN
from analysis.page import tables
from analysis.page.cells import plain
from analysis.page.charts import Scatter, diagrams, scatter, steps
from analysis.page.details import details
from analysis.page.files import Results, pictures, read_results
from analysis.page.origin import made_by, parts, seeds
from analysis.tables.table3 import note
from configs.schema import Experiment, dump
from soups.files.atomic import write_text

HERE = Path(__file__).resolve().parent
LANDSCAPES, CALIBRATIONS = ("figure2", "figurej1"), ("reliability", "figureb2")
MOST_CELLS = 6000  # of a map of coefficients as a table; a larger one is a picture
ENVIRONMENT = Environment(
    loader=FileSystemLoader(HERE),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


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
    drawn = scatter(results)
    shown = pictures(
        results.run, (*LANDSCAPES, *CALIBRATIONS, *(f"coefficients_{recipe}" for recipe in results.shares))
    )
    made = [name for name in (*CALIBRATIONS, *LANDSCAPES) if (results.run.analysis / f"{name}.csv").exists()]
    return ENVIRONMENT.get_template("page.html.j2").render(
        name=config.name,
        note=note(config),
        commands=results.commands,
        script=script,
        style=style,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tiles=_tiles(results),
        headline=tables.headline(results),
        splits=tables.splits(results),
        scatter=drawn,
        details=details(results, drawn.marks),
        chosen=_chosen(drawn),
        settings=_settings(results),
        pool=tables.pool(results),
        composition=tables.composition(results),
        logs=[
            (tables.method_name(config, dish), dish, steps(results, soup), tables.decisions(config, soup), soup)
            for dish, soup in results.soups.items()
            if soup["trials"]
        ],
        maps=_maps(results, shown),
        **_calibration(results, shown),
        **_landscape(results, shown),
        made_by=made_by(results),
        seeds=seeds(results),
        parts=parts(results, made),
        config=json.dumps(dump(config), indent=2, sort_keys=True),
        pictures=shown,
    )


def _tiles(results: Results) -> list[dict[str, Any]]:
    """The first numbers to look at."""
    found, test = [], results.config.task.test
    for method, cells in tables.by_method(results.scores):
        if method in ("best", "uniform", "greedy", "ensemble"):
            second = cells.get(SHIFT_MEAN)
            found.append(
                {
                    "method": method,
                    "name": tables.method_name(results.config, method),
                    "test": tables.accuracy(cells[test][0]),
                    "gain": tables.gain(*cells[test]),
                    "shifts": second and tables.accuracy(second[0]),
                    "models": cells[test][0]["models"],
                }
            )
    return found


def _chosen(drawn: Scatter) -> str:
    """The point that is shown at first."""
    keys = [mark.key for mark in drawn.marks]
    return next(key for key in ("greedy", "uniform", "best") if key in keys)


def _settings(results: Results) -> dict[str, dict[str, str]]:
    """Setting -> key of a model -> its value, of those that differ between models."""
    words = results.manifest.words
    found = {}
    for name in (column for column in words.columns if "." in column):
        values = {f"row-{row}": value for row, value in zip(words["row"], words[name], strict=True) if value}
        if len(set(values.values())) > 1:
            found[name] = values
    return found


def _maps(results: Results, shown: dict[str, Any]) -> list[dict[str, Any]]:
    """A map for each learned soup with coefficients: a table, or of very many groups the picture."""
    maps = []
    for recipe, shares in results.shares.items():
        large = shares.words.size > MOST_CELLS
        maps.append(
            {
                "name": tables.method_name(results.config, recipe),
                "recipe": recipe,
                "table": None if large else tables.coefficients(results, recipe),
                "picture": shown.get(f"coefficients_{recipe}") if large else None,
                "file": f"soups/{recipe}/coefficients.csv",
            }
        )
    return maps


def _calibration(results: Results, shown: dict[str, Any]) -> dict[str, Any]:
    reliability, seeds_only = (results.table(name) for name in CALIBRATIONS)
    return {
        "reliability": reliability and {"table": tables.calibration(reliability), "diagrams": diagrams(reliability)},
        "reliability_numbers": reliability and plain(reliability.words, "All bins; fractions."),
        "seeds_only": seeds_only and plain(seeds_only.words, "Models that differ by their seed; fractions."),
    }


def _landscape(results: Results, shown: dict[str, Any]) -> dict[str, Any]:
    found = []
    for name, scale in zip(LANDSCAPES, ("contours on a log scale", "contours on a linear scale"), strict=True):
        csv = results.table(name)
        if csv is not None:
            table = tables.planes(results.config, csv)
            found.append({"name": name, "scale": scale, "table": table, "picture": shown.get(name)})
    return {"landscapes": found}
