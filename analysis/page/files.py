"""What the page shows, read from a run folder; nothing here computes a result."""

import base64
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from configs.cli import COMMAND
from configs.errors import UserError
from configs.schema import Experiment
from soups.experiment.soups import outputs_of
from soups.files.atomic import read_json
from store.runs import RunFolder, done_rows


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


@dataclass(frozen=True)
class Results:
    """The files of one finished experiment; csv files as the words in them, which the page quotes."""

    config: Experiment
    run: RunFolder
    commands: Commands
    scores: pd.DataFrame  # table3.csv, of texts table5.csv
    points: pd.DataFrame  # figure1.csv
    manifest: pd.DataFrame
    done: dict[int, dict[str, Any]]  # row -> done.json
    soups: dict[str, dict[str, Any]]  # output -> soup.json, in the order of the recipes
    shares: dict[str, pd.DataFrame]  # recipe -> coefficients.csv
    provenance: dict[str, Any]

    def table(self, stem: str) -> pd.DataFrame | None:
        """analysis/<stem>.csv, where it was made."""
        path = self.run.analysis / f"{stem}.csv"
        return _read_csv(path) if path.exists() else None

    def picture(self, stem: str) -> str | None:
        """analysis/<stem>.png as a data URI, where it was made."""
        path = self.run.analysis / f"{stem}.png"
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else None


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' errors are ones, and so is text that is not UTF-8
        raise UserError(f"{path} is damaged ({error}): delete it and run the same again") from None


def read_results(config: Experiment, typed: Sequence[str] = ()) -> Results:
    """Everything the page is made of; `typed` are settings of the command line, for the commands that it names."""
    if config.replicates:
        raise UserError(f"{config.name} is {len(config.replicates)} sweeps, each with a page of its own")
    run, commands, done = RunFolder.of(config), Commands.of(config, typed), done_rows(config)
    records = {name: run.soup(name) / "soup.json" for each in config.recipes for name in outputs_of(config, each)}
    coefficients = {recipe: run.soup(recipe) / "coefficients.csv" for recipe in config.recipes}

    def needed(path: Path, stage: str = "analysis") -> Path:
        if not path.exists():
            raise UserError(f"{path} is missing: run {commands.stage(stage)} first")
        return path

    return Results(
        config=config,
        run=run,
        commands=commands,
        manifest=_read_csv(needed(run.root / "manifest.csv", "finetune")),
        scores=_read_csv(needed(run.analysis / ("table5.csv" if config.task.is_text else "table3.csv"))),
        points=_read_csv(needed(run.analysis / "figure1.csv")),
        done=done,
        soups={name: read_json(path) for name, path in records.items() if path.exists()},
        shares={recipe: _read_csv(path) for recipe, path in coefficients.items() if path.exists()},
        provenance=read_json(needed(run.analysis / "provenance.json")),
    )
