"""The numbers of one experiment as notebooks open them: of a run's folder, or of those that are kept."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.artefacts import measured_experiment
from analysis.catalogue import DRAWN, Drawing
from analysis.figures.decisions import decisions
from configs.cli import with_run
from configs.errors import UserError
from configs.schema import Experiment, load
from soups.files.atomic import read_json


@dataclass(frozen=True)
class Results:
    """An experiment, and where its files are."""

    config: Experiment
    begin: str  # of the path of each csv, before the artefact's name
    run: Path | None  # its folder, where it was run here

    def read(self, name: str) -> pd.DataFrame:
        """A csv, as in `read("table3")`.

        Raises:
            UserError: it was not made; says what to type.
        """
        path = Path(f"{self.begin}{name}.csv")
        if not path.exists():
            words = f"run={self.run}" if self.run else f"experiment={self.config.name}"
            what = f"artefact={name} {words}" if name in DRAWN else words
            raise UserError(f"{path} is missing: type python -m analysis {what}")
        return pd.read_csv(path)

    def draw(self, name: str) -> Figure:
        """A figure from its csv, as in `draw("figure1")`; raises as `read`."""
        made = DRAWN[name].made
        if not isinstance(made, Drawing):
            raise UserError(f"{name} is a table: read({name + made.ending!r}) has its numbers")
        return made.draw(self.config, self.read(name))

    def decisions(self, recipe: str = "greedy") -> pd.DataFrame:
        """What a greedy recipe tried, from `analysis.figures.decisions`.

        Raises:
            UserError: these are kept results, which have no record of it, or its soup is not made.
        """
        record = self.run and self.run / "soups" / recipe / "soup.json"
        if record is None or not record.exists():
            raise UserError(
                f"{self.run or self.begin} has no record of {recipe}: RUN needs the folder of a run with it"
            )
        return decisions(read_json(record))


def results_of(run: str) -> Results:
    """The results of a run's folder, as "runs/demo", or those that are kept of an experiment, "results/measured/demo".

    Raises:
        UserError: there are none.
    """
    path = Path(run)
    if path.is_dir():
        experiment, *words = sorted(with_run([f"run={run}"]), key=lambda word: not word.startswith("experiment="))
        config = load(experiment.removeprefix("experiment="), *words)
        return Results(config, f"{path / 'analysis'}/", path)
    if not list(path.parent.glob(f"{path.name}_*.csv")):
        raise UserError(f"RUN={run}: neither a run's folder nor what results in {path.parent} begin with")
    return Results(measured_experiment(path.name), f"{run}_", None)
