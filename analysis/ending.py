"""What a run says when it ends: one sentence on its soup, where to look, and what to do next."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.artefacts import ARTEFACTS, MEASURED
from analysis.measure.methods import SHIFT_MEAN
from analysis.tables.cells import METRICS, NAMES, percent, points
from configs.schema import Experiment
from soups.files.atomic import read_json
from store.runs import RunFolder

LEADING = ("greedy", "uniform", "learned")  # the soup that the sentence is about, the first that was made
NO_SOUPS = ("best", "second_best", "initialisation", "zero-shot", "oracle")
LIBRARIES = {"open_clip": "open_clip", "timm": "timm", "transformers": "transformers", "text_encoder": "transformers"}


def verdict(config: Experiment, tidy: pd.DataFrame) -> list[str]:
    """A sentence on the soup's test score against the best single model, and one on the mean of the shifts.

    None where the experiment makes no soup. `tidy` is from `analysis.measure.methods`; of several sweeps it is of all.
    """
    soups = [name for name in (*LEADING, *config.recipes) if name not in NO_SOUPS and "ensemble" not in name]
    soup = next((name for name in soups if name in set(tidy["method"])), None)
    if soup is None:
        return []
    title, record = NAMES.get(soup, soup), RunFolder.of(config).soup(soup) / "soup.json"
    if record.exists() and not config.replicates:  # several random orders have several
        title += f" of {len(read_json(record)['ingredients'])}"
    columns = [config.task.test, *([SHIFT_MEAN] if len(config.task.shifts) > 1 else config.task.shifts)]
    lines = tidy[tidy["method"] == soup].set_index("column")
    if config.replicates:
        return [f"{title}, {_in_sweeps(config, lines.loc[[column]], column)}" for column in columns]
    return [f"{title}: {_sentence(config, lines.loc[column], column)}" for column in columns]


def _called(config: Experiment, column: str) -> str:
    """What a sentence calls a column, with its metric where that is not top-1 accuracy."""
    title = f"mean of {len(config.task.shifts)} shifts" if column == SHIFT_MEAN else config.task.split_title(column)
    metric = config.task.metrics.get(column, "top1")
    name = "test" if title == "Test" else title
    return name if metric == "top1" else f"{name}, {METRICS[metric].lower()}"


def _sentence(config: Experiment, line: pd.Series, column: str) -> str:
    low, high = line["low"], line["high"]
    decided = "better" if low > 0 else "worse" if high < 0 else "undecided"
    difference = f"{100 * line['difference']:+.1f} [{percent(low)}, {percent(high)}]"
    score = f"{_called(config, column)} {percent(line['accuracy'])} % (n = {line['n']:,})"
    return f"{score}, {difference} over the best single model: {decided}"


def _in_sweeps(config: Experiment, lines: pd.DataFrame, column: str) -> str:
    above, below = int((lines["low"] > 0).sum()), int((lines["high"] < 0).sum())
    differences = ", ".join(f"{100 * each:+.1f}" for each in lines["difference"])
    score = f"{_called(config, column)} {percent(lines['accuracy'].mean())} %"
    return (
        f"{len(lines)} sweeps: {score} in the mean, {differences} over the best single models: better in {above}, "
        f"worse in {below}, undecided in {len(lines) - above - below}"
    )


def reminder(config: Experiment) -> str:
    """That numbers mean nothing, where a task was cut so that commands can be tried in seconds; else empty."""
    if config.task.classes is None:
        return ""
    return (
        f"{config.name} takes the first {config.task.classes} of {config.task.num_classes} classes, to try the "
        "commands in seconds: its numbers mean nothing"
    )


def _beside_evidence(config: Experiment) -> list[str]:
    """What pools of 72 that are trained longer say of the demo's question, where they are measured."""
    answers = MEASURED / "claims.csv"
    if config.name.partition("/")[0] not in ("demo", "demo_seeds") or not answers.exists():
        return []
    claims = pd.read_csv(answers).set_index("claim")
    test, shifts = (points(*claims.loc[number, ["difference", "low", "high"]]) for number in (1, 2))
    pools = claims.loc[1, "pools"]
    models = f"{pools} pool{'s' if pools > 1 else ''} of 72 models trained for 4 to 16 epochs"
    gain = f"greedy soup {test} over the best single model on test, {shifts} on the mean of 5 shifts"
    return [f"{config.analysis.note} {models}: {gain} (docs/claims.md)"]


def next_steps(config: Experiment, words: Sequence[str], tidy: pd.DataFrame) -> list[tuple[str, str]]:
    """Commands that suit a finished run, each with what it does; `words` made the run, as in ["experiment=demo"]."""
    run = RunFolder.of(config)
    typed = f"run={shlex.quote(str(run.root))}"
    paper = [name for name, artefact in ARTEFACTS.items() if config.name in artefact.experiments]
    if reminder(config):
        return [("python reproduce.py experiment=demo", "the same with numbers that mean something, in ten minutes")]
    if config.name == "demo" and list(words) == ["experiment=demo"]:
        return [("python reproduce.py experiment=demo_seeds", "the same with three sweep seeds")]
    if paper:
        what = f"the paper's tables and figures that it is made for: {', '.join(paper)}"
        return [(f"python -m analysis artefact=all {typed}", what)]
    if config.replicates:
        return []
    steps, size, soup = [], config.sweep.size, run.soup("greedy")
    if config.sweep.draw and not any(": better" in line for line in verdict(config, tidy)):
        steps.append((f"python reproduce.py {typed} sweep.rows={2 * size}", f"{size} models more; keeps these"))
    if (soup / "weights.safetensors").exists():
        library, out = LIBRARIES.get(config.model.kind, "onnx"), f"{config.name.replace('/', '-')}-soup"
        command = f"python -m soups.experiment.export soup={shlex.quote(str(soup))} to={library} out={out}"
        steps.append((command, "the greedy soup as a folder for " + library))
    return steps


def ending(
    config: Experiment, words: Sequence[str], tidy: pd.DataFrame, pages: Sequence[Path], seconds: float
) -> list[str]:
    """All lines that a finished run ends with; arguments as for `next_steps`, and the pages to look at."""
    lines = verdict(config, tidy)
    if reminder(config):
        lines.append(f"{reminder(config)}.")
    lines += _beside_evidence(config)
    lines += [f"Look at {page}" for page in pages]
    lines.append(f"Models, soups, logits and tables are in {RunFolder.of(config).root} ({seconds:.0f} s).")
    steps = next_steps(config, words, tidy)
    width = max((len(command) for command, _ in steps), default=0)
    return lines + [f"Next: {command:{width}}  {what}" for command, what in steps]
