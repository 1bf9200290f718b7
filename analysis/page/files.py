"""What the page shows, read from a run folder; nothing here computes a result."""

import base64
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from configs.cli import COMMAND
from configs.errors import UserError
from configs.schema import Experiment
from soups.files.atomic import read_json
from store.runs import RunFolder, done_rows

IMAGES = 2_000_000  # bytes of pictures on one page, before base64 makes them a third larger


@dataclass(frozen=True)
class Commands:
    """What to type to make each part again."""

    settings: str  # experiment=..., and whatever else was typed

    @classmethod
    def of(cls, config: Experiment, typed: Sequence[str]) -> "Commands":
        """By the run's folder where it has the words that make it, else from what was typed.

        A sweep seed of several is named in full, so that a command makes this one alone.
        """
        parent, _, seed = config.name.partition("/")
        folder = config.paths.runs / parent
        words = [f"run={folder}"] if (folder / COMMAND).exists() else list(typed) or [f"experiment={parent}"]
        if seed:
            words += [f"name={config.name}", f"sweep.seed={config.sweep.seed}", "replicates=[]"]
        return cls(shlex.join(words))

    def stage(self, name: str) -> str:
        """Of finetune, eval, soups or analysis."""
        return f"python -m {name} {self.settings}"

    def artefact(self, name: str) -> str:
        """Of one table or figure."""
        return f"python -m analysis artefact={name} {self.settings}"

    @property
    def page(self) -> str:
        """Of the page itself."""
        return f"python -m analysis report {self.settings}"

    @property
    def everything(self) -> str:
        """All stages one after the other."""
        return f"python reproduce.py {self.settings}"


@dataclass(frozen=True)
class Texts:
    """A csv twice: as the words in the file, which the page quotes, and as the numbers they are."""

    words: pd.DataFrame
    numbers: pd.DataFrame

    def lines(self) -> Iterator[tuple[pd.Series, pd.Series]]:
        """Line by line, words and numbers."""
        for (_, words), (_, numbers) in zip(self.words.iterrows(), self.numbers.iterrows(), strict=True):
            yield words, numbers


@dataclass(frozen=True)
class Results:
    """The files of one finished experiment."""

    config: Experiment
    run: RunFolder
    commands: Commands
    scores: Texts  # table3.csv, of texts table5.csv
    points: Texts  # figure1.csv
    manifest: Texts
    done: dict[int, dict[str, Any]]  # row -> done.json
    soups: dict[str, dict[str, Any]]  # dish -> soup.json, in the order of the recipes
    shares: dict[str, Texts]  # recipe -> coefficients.csv
    provenance: dict[str, Any]

    def table(self, stem: str) -> Texts | None:
        """analysis/<stem>.csv, where it was made."""
        path = self.run.analysis / f"{stem}.csv"
        return read_csv(path) if path.exists() else None


def read_csv(path: Path) -> Texts:
    """A csv with a head.

    Raises:
        UserError: it is damaged.
    """
    try:
        return Texts(pd.read_csv(path, dtype=str, keep_default_na=False), pd.read_csv(path))
    except ValueError as error:  # pandas' errors are ones, and so is text that is not UTF-8
        raise UserError(f"{path} is damaged ({error}): delete it and run the same again") from None


def _needed(path: Path, command: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing: run {command} first")
    return path


def _natural(path: Path) -> list[int | str]:
    """Sorts order 10 behind order 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _soups(config: Experiment, run: RunFolder) -> dict[str, dict[str, Any]]:
    """Every soup of the experiment's recipes that is cooked."""
    found = {}
    for recipe in config.recipes:
        folder = run.soup(recipe)
        for path in sorted(folder.rglob("soup.json"), key=_natural):
            found[str(path.parent.relative_to(folder.parent))] = read_json(path)
    return found


def read_results(config: Experiment, typed: Sequence[str] = ()) -> Results:
    """Everything the page is made of.

    Args:
        config: of a finished experiment.
        typed: settings of the command line, for the commands that the page names.

    Raises:
        UserError: the experiment is several, or a file is missing or damaged; the message says what to run.
    """
    if config.replicates:
        raise UserError(f"{config.name} is {len(config.replicates)} sweeps, each with a page of its own")
    run, commands, done = RunFolder.of(config), Commands.of(config, typed), done_rows(config)
    headline = run.analysis / ("table5.csv" if config.task.is_text else "table3.csv")
    coefficients = {recipe: run.soup(recipe) / "coefficients.csv" for recipe in config.recipes}
    return Results(
        config=config,
        run=run,
        commands=commands,
        manifest=read_csv(_needed(run.root / "manifest.csv", commands.stage("finetune"))),
        scores=read_csv(_needed(headline, commands.stage("analysis"))),
        points=read_csv(_needed(run.analysis / "figure1.csv", commands.stage("analysis"))),
        done=done,
        soups=_soups(config, run),
        shares={recipe: read_csv(path) for recipe, path in coefficients.items() if path.exists()},
        provenance=read_json(_needed(run.analysis / "provenance.json", commands.stage("analysis"))),
    )


@dataclass(frozen=True)
class Picture:
    """A figure of the analysis folder."""

    name: str
    source: str | None  # a data URI; None where the page would grow too large


def pictures(run: RunFolder, stems: Sequence[str], budget: int = IMAGES) -> dict[str, Picture]:
    """Those of some figures that were made, in the page itself as long as there is room.

    Args:
        run: folder of the experiment.
        stems: names of figures, the most important first.
        budget: bytes of all pictures together.
    """
    found = {}
    for stem in stems:
        path = run.analysis / f"{stem}.png"
        if not path.exists():
            continue
        data = path.read_bytes()
        fits = len(data) <= budget
        budget -= len(data) if fits else 0
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}" if fits else None
        found[stem] = Picture(f"analysis/{path.name}", source)
    return found
