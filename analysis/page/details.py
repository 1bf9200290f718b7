"""What is said of each point of the scatter when it is chosen."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.measure.methods import SHIFT_MEAN
from analysis.page.cells import Cell, number, percentage, short, text
from analysis.page.charts import Mark
from analysis.page.files import Results
from analysis.page.tables import by_method, gain, method_name, row_name
from analysis.tables.cells import column_title
from configs.data import Task

MOST = 16  # members that are listed one by one


@dataclass(frozen=True)
class Detail:
    """The words beside the scatter."""

    key: str
    title: str
    what: str
    scores: tuple[tuple[str, Cell], ...]
    settings: tuple[tuple[str, str], ...]
    mixture: tuple[tuple[str, str], ...]  # of a soup its models, of a model its soups, with their shares
    mixture_title: str


def details(results: Results, marks: tuple[Mark, ...]) -> tuple[Detail, ...]:
    """One for each mark, in their order."""
    lines = {words["name"]: words for _, words in results.points.words.iterrows()}
    rows, task = {f"row-{row}": row for row in results.done}, results.config.task
    found = []
    for mark in marks:
        if mark.kind == "individual":
            row = rows[mark.key]
            found.append(_of_model(results, mark, row, _scores(task, lines[f"row {row}"])))
        else:
            found.append(_of_method(results, mark, _scores(task, lines[mark.key])))
    return tuple(found)


def _scores(task: Task, words: pd.Series) -> list[tuple[str, Cell]]:
    named = {"test": column_title(task, task.test), SHIFT_MEAN: column_title(task, SHIFT_MEAN), "held_out": "Held-out"}
    shown = [(title, words[column]) for column, title in named.items() if words[column]]
    return [(f"{title} (%)", number(word, percentage(word))) for title, word in shown]


def _chooses(members: list[dict[str, Any]], size: int) -> bool:
    """Whether a mixture says anything of its models, as one of all in equal parts does not."""
    return len(members) < size - 1 or len({member["weight"] for member in members}) > 1


def _share(weight: float) -> str:
    return f"{100 * weight:.0f} %"


def _of_model(results: Results, mark: Mark, row: int, scores: list[tuple[str, Cell]]) -> Detail:
    words = results.manifest.words
    line = words[words["row"] == str(row)].iloc[0]
    settings = [(name, short(line[name])) for name in words.columns if "." in name and line[name]]
    soups = [
        (method_name(results.config, dish), _share(member["weight"]))
        for dish, soup in results.soups.items()
        if _chooses(soup["ingredients"], len(results.done))
        for member in soup["ingredients"]
        if member["row"] == row
    ]
    return Detail(mark.key, mark.name, "Fine-tuned model", tuple(scores), tuple(settings), tuple(soups), "Is part of")


def _of_method(results: Results, mark: Mark, scores: list[tuple[str, Cell]]) -> Detail:
    config, cells = results.config, dict(by_method(results.scores))[mark.key]
    for column in (config.task.test, SHIFT_MEAN):
        if column in cells and mark.key != "best":
            scores.append((f"{column_title(config.task, column)} − best", gain(*cells[column])))
    models = cells[config.task.test][0]["models"]
    scores.append(("Models at inference", text(models)))
    dishes = {dish: soup for dish, soup in results.soups.items() if dish.partition("/")[0] == mark.key}
    mixture = []
    for dish, soup in dishes.items():
        members = sorted(soup["ingredients"], key=lambda member: -member["weight"])
        if len(dishes) > 1:
            named = ", ".join(str(member["row"]) for member in members)
            mixture.append((f"{method_name(config, dish)}: rows {named}", f"{len(members)} models"))
        else:
            mixture += [(row_name(config, member["row"]), _share(member["weight"])) for member in members[:MOST]]
            if len(members) > MOST:
                mixture.append((f"and {len(members) - MOST} more", ""))
    what = {"initialisation": "What fine-tuning starts from", "best": "Chosen on held-out"}.get(mark.key, "")
    if not what:
        what = "Mean of answers" if "ensemble" in mark.key else "Mean of weights"
    return Detail(mark.key, mark.name, what, tuple(scores), (), tuple(mixture), "Made of")
