"""The paper's 33 tables and figures: what each shows, how it is made from runs, and again from csv that were kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich import get_console

from analysis.figures.calibration import (
    draw_budget,
    draw_calibration,
    draw_reliability,
    measure_reliability,
    measure_seeds,
)
from analysis.figures.curves import draw_backbones, draw_wise, measure_backbones, measure_wise
from analysis.figures.landscape import draw_landscape, measure_landscape
from analysis.figures.pairs import draw_angles, draw_grids, draw_pairs, measure_angles, measure_grids, measure_pairs
from analysis.figures.pool import (
    decisions,
    draw_coefficients,
    draw_scatter,
    draw_subgroups,
    measure_coefficients,
    measure_scatter,
    measure_subgroups,
)
from analysis.figures.pool_size import draw_pool_size, measure_pool_size
from analysis.figures.style import save_with_numbers, write_csv
from analysis.measure.methods import NAN, SHIFT_MEAN
from analysis.released import published_instead, write_instead
from analysis.tables import paper
from analysis.tables.cells import write_cells
from analysis.tables.named_rows import draw_rows, measure_rows
from analysis.tables.table2 import cost_cells, inference_table
from analysis.tables.table3 import GROUPED, publish, write_provenance
from analysis.theory.approximation import draw_approximation, measure_approximation, summary_table
from configs.cli import with_run
from configs.errors import UserError
from configs.schema import Experiment, load, replicate
from soups.files.atomic import read_json
from store.runs import RunFolder

MEASURED = Path(__file__).resolve().parents[1] / "results/measured"
FORWARD = "forward"  # artefact=forward means all that need forward passes of their own


@dataclass(frozen=True)
class Made:
    """How an artefact is made: its numbers from finished runs, and from these alone what is shown."""

    measure: Callable[..., pd.DataFrame]  # takes an experiment, or all of them where `is_one`
    show: Callable[..., Any]  # takes the same and the numbers; a picture, of a table its cells and caption
    is_table: bool = False
    is_one: bool = False  # whether several experiments make one of it
    summary: Callable[[Experiment, pd.DataFrame], pd.DataFrame] | None = None  # another table, <name>_summary.csv

    @property
    def ending(self) -> str:
        """What the names of its files end with."""
        return "_with_paper" if self.is_table else ""


def _texts(table: str) -> Made:
    return Made(partial(paper.text_numbers, table=table), partial(paper.text_cells, table=table), True, is_one=True)


def _methods(table: str) -> Made:
    return Made(partial(paper.measure_beside_paper, table=table), paper.cells_beside_paper, is_table=True)


def _rows(table: str) -> Made:
    return Made(partial(paper.measure_rows_beside_paper, table=table), paper.row_cells_beside_paper, is_table=True)


SCATTER = Made(measure_scatter, draw_scatter)
POOL_SIZE = Made(measure_pool_size, draw_pool_size)
ROWS = Made(measure_rows, draw_rows)
MADE = {
    "table2": Made(inference_table, cost_cells, is_table=True),
    "figure2": Made(measure_landscape, partial(draw_landscape, log=True)),
    "figure3": Made(measure_angles, draw_angles),
    "figure4": Made(measure_pairs, draw_pairs),
    "figureb2": Made(partial(measure_seeds, calibrated=True), draw_calibration),
    "figured1": Made(measure_wise, draw_wise),
    "figuree1": Made(measure_backbones, draw_backbones),
    "figuref1": Made(measure_grids, draw_grids),
    "figureg1": Made(measure_subgroups, draw_subgroups),
    "figureg2": Made(partial(measure_scatter, one_shift=True), partial(draw_scatter, one_shift=True)),
    "figureg4": Made(partial(measure_seeds, calibrated=False), draw_budget),
    "figurej1": Made(measure_landscape, partial(draw_landscape, log=False)),
    "figurek1": Made(measure_approximation, draw_approximation, summary=summary_table),
    "figurel3": Made(partial(measure_scatter, bars=False), partial(draw_scatter, every_method=True)),
    "rows": ROWS,
    "reliability": Made(measure_reliability, draw_reliability),
}
MADE |= {f"coefficients_{r}": Made(partial(measure_coefficients, recipe=r), draw_coefficients) for r in GROUPED}
MADE |= dict.fromkeys(("figure1", "figure5", "figureg3"), SCATTER)
MADE |= dict.fromkeys(("figureb1", "figureh1", "figureh2", "figureh3", "figureh4"), POOL_SIZE)
MADE |= dict.fromkeys(("figurel1", "figurel2"), ROWS)
MADE |= {table: _methods(table) for table in ("table1", "table3", "table4", "tablec1")}
MADE |= {table: _rows(table) for table in ("tablel1", "tablel2", "tablel3")}
MADE |= {table: _texts(table) for table in ("table5", "tablej1")}


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper: a line of artefacts.csv."""

    shows: str
    paper: tuple[str, ...]  # experiments it is made of; none where the paper has formulas alone
    embedded: tuple[str, ...]  # their counterparts of the embedded benchmark
    forward: bool  # whether soups or points are evaluated for it that no recipe made
    made: Made

    @property
    def experiments(self) -> tuple[str, ...]:
        """Those that it is made of, the paper's first."""
        return (*self.paper, *self.embedded)

    def is_papers(self, config: Experiment) -> bool:
        """Whether an experiment of it has the paper's model on the paper's data."""
        return config.name in self.paper and config.model.proxy_for is None and config.task.proxy_for is None

    @property
    def functions(self) -> str:
        """Where its numbers and its cells or picture are made, each as module:function."""
        whole = [getattr(function, "func", function) for function in (self.made.measure, self.made.show)]
        return " ".join(f"{function.__module__}:{function.__qualname__}" for function in whole)

    def write(self, configs: Sequence[Experiment], numbers: pd.DataFrame, stem: Path) -> list[Path]:
        """Write a figure as stem.{pdf,png,csv} with its summary, or a table as stem.{md,tex,csv}.

        Differences to the paper stand only in tables of the paper's own experiments: of a proxy they say nothing.
        """
        made = self.made
        if "minus_paper" in numbers and not all(self.is_papers(config) for config in configs):
            numbers = numbers.assign(minus_paper=NAN)
        shown = made.show(configs if made.is_one else configs[0], numbers)
        if made.is_table:
            cells, caption = shown
            return write_cells(cells, numbers, stem, caption)
        files = save_with_numbers(shown, numbers, stem)
        if made.summary is not None:
            table = made.summary(configs[0], numbers)
            files.append(write_csv(table, stem.with_name(f"{stem.name}_summary.csv"), "%.6f"))
        return files


TABLE = pd.read_csv(Path(__file__).with_name("artefacts.csv"), index_col="name", keep_default_na=False)
DRAWN = {  # all that `artefact=` may name
    name: Artefact(row.shows, tuple(row.paper.split()), tuple(row.embedded.split()), row.forward == "yes", MADE[name])
    for name, row in TABLE.iterrows()
}
ARTEFACTS = {name: each for name, each in DRAWN.items() if name.startswith(("table", "figure"))}  # the paper's: `all`
NUMBERS = {  # that `python -m analysis list` has of the paper: table, row and column in results/paper
    "table1": (("table1", "greedy", "test"), ("table1", "greedy", SHIFT_MEAN)),
    "table3": (("table3", "greedy", "test"), ("table3", "best", "test"), ("table3", "uniform", "test")),
    "table4": (("table4", "greedy", "test"), ("table4", "best", "test"), ("table4", "greedy_ensemble", "test")),
    "table5": (("table5", "bert_base/greedy", "rte"), ("table5", "bert_base/best", "rte")),
    "tablec1": (("tablec1", "greedy", "test"), ("tablec1", "best", "test")),
    "tablej1": (("tablej1", "t5_large/greedy", "rte"), ("tablej1", "t5_large/uniform", "rte")),
    "tablel1": (("tablel1", "Soup of minimal, medium, strong", "test@3e-5"),),
    "tablel2": (("tablel2", "fix-aug", "test@3e-5"),),
    "tablel3": (("tablel3", "SAM, seed 0", "test"),),
    "figure1": (("table3", "greedy", "test"), ("table3", "greedy", SHIFT_MEAN)),
    "figure5": (("headlines", "align", "greedy minus best, test"),),
    "figuree1": (("headlines", "clip_vit_b32", "backbone soup minus zero-shot, CIFAR-100"),),
}


def forward_artefacts(experiment: str) -> list[str]:
    """The tables and figures of an experiment that need forward passes of their own, which a GPU does fast.

    >>> forward_artefacts("table3_clip_b32")
    ['figure4', 'figureb1', 'figured1']
    """
    return [name for name in named(FORWARD) if experiment in ARTEFACTS[name].experiments]


def named(name: str) -> list[str]:
    """Artefacts that `artefact=name` means: itself, all, or those that need forward passes of their own.

    Raises:
        UserError: there is none of this name.
    """
    if name == FORWARD:
        return [each for each, artefact in ARTEFACTS.items() if artefact.forward]
    if name != "all" and name not in DRAWN:
        raise UserError(f"artefact={name}: there is no such table or figure; python -m analysis list names all")
    return list(ARTEFACTS) if name == "all" else [name]


def parts_of(name: str, configs: Sequence[Experiment]) -> list[Experiment]:
    """Those of the experiments that an artefact is made of, in its order."""
    by_name = {config.name: config for config in configs}
    return [by_name[each] for each in DRAWN[name].experiments if each in by_name]


def write_artefact(name: str, configs: Sequence[Experiment]) -> list[Path]:
    """Make an artefact of finished experiments, in their analysis folders; returns the files.

    Raises:
        UserError: one is not finished, or is of another shape than the artefact needs.
    """
    artefact, files = DRAWN[name], []
    for group in [configs] if artefact.made.is_one else [[config] for config in configs]:
        stem = RunFolder.of(group[0]).analysis / f"{name}{artefact.made.ending}"
        files += artefact.write(group, artefact.made.measure(group if artefact.made.is_one else group[0]), stem)
    return files


def draw(config: Experiment, name: str, configs: Sequence[Experiment]) -> list[Path]:
    """`write_artefact`, with a record of where it comes from, and published in `config.paths.results`."""
    files = write_artefact(name, configs)
    homes = {RunFolder.of(each).analysis: each for each in configs}
    date = datetime.now(timezone.utc).date().isoformat()
    for folder in dict.fromkeys(file.parent for file in files):
        files.append(write_provenance(homes[folder], folder / f"{name}_provenance.json", artefact=name, date=date))
    if config.paths.results is None:
        return files
    return [publish(file, config.paths.results, homes[file.parent].name) for file in files]


def redraw(name: str, out: Path, folder: Path = MEASURED) -> list[Path]:
    """Make an artefact again in `out` from the numbers that were measured and kept in a folder, without runs.

    Raises:
        UserError: it was not measured yet; says what to run.
    """
    measured, files = measured_files(name, folder), []
    if not measured:
        raise UserError(f"{name} is {state(name, folder)}")
    for experiment, file in measured.items():
        numbers = pd.read_csv(file)
        texts = numbers.columns.intersection(["confidence", "source"])
        numbers[texts] = numbers[texts].fillna("")
        files += DRAWN[name].write([measured_experiment(experiment)], numbers, out / file.stem)
    return files


def measured_experiment(named: str) -> Experiment:
    """The experiment whose results begin with a name: of one of several sweeps it ends with the seed."""
    whole, _, seed = named.rpartition("_seed")
    return replicate(load(whole), int(seed)) if seed.isdigit() else load(named)


def measured_files(name: str, folder: Path = MEASURED) -> dict[str, Path]:
    """Experiment -> its numbers of an artefact, of those that were measured and kept in a folder."""
    ending = f"_{name}{DRAWN[name].made.ending}.csv"
    return {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*{ending}"))}


def paper_numbers(name: str) -> str:
    """What the paper says, for `python -m analysis list`; empty where no number was recovered.

    >>> paper_numbers("table3")
    'greedy test 81.03, best test 80.38, uniform test 79.97'
    """
    found = []
    for table, row, column in NUMBERS.get(name, ()):
        value = paper.paper_table(table).set_index(["row", "column"])["value"][row, column]
        found.append(f"{row} {column} {value:g}")
    return ", ".join(found)


def state(name: str, folder: Path = MEASURED) -> str:
    """Which numbers of an artefact there are, or what to run for some."""
    files = measured_files(name, folder)
    if files:
        return "measured: " + ", ".join(file.name for file in files.values())
    command, embedded = f"python -m analysis artefact={name} experiment=", DRAWN[name].embedded
    if not embedded:
        return f"not measured yet: {command}NAME, of a finished run"
    return f"not measured yet: python reproduce.py experiment={embedded[0]}, then {command}{embedded[0]}"


def artefacts(config: Experiment, parts: list[Experiment]) -> list[Path]:
    """Make what `artefact` names: of `all`, each that one of the experiments belongs to.

    Raises:
        UserError: no such artefact, or one that these experiments are not made for.
    """
    assert config.artefact is not None
    names, files = named(config.artefact), []
    wanted = {name: parts_of(name, parts) for name in names}
    if len(names) > 1:
        wanted = {name: chosen for name, chosen in wanted.items() if chosen}
        wanted = {name: wanted[name] for name in list(wanted)[config.share.index :: config.share.of]}
    elif not wanted[names[0]] and not config.parts:
        wanted[names[0]] = parts  # your own experiment
    if published_instead(config):
        return write_instead(config)
    if not wanted:
        raise UserError(f"{config.name} belongs to no table or figure of the paper; name one: python -m analysis list")
    for name, chosen in wanted.items():
        if not chosen:
            needs = ", ".join(DRAWN[name].experiments)
            raise UserError(f"artefact={name} is made of {needs}, none of which {config.name} has")
        started = time.monotonic()
        files += draw(config, name, chosen)
        get_console().print(f"{name}: {DRAWN[name].shows}, {time.monotonic() - started:.0f} s")
    return files


def list_artefacts() -> None:
    """Print of each table and figure what it shows, what is measured of it, and which functions make it."""
    for name, artefact in ARTEFACTS.items():
        numbers = paper_numbers(name)
        print(f"{name:<8}  {artefact.shows}" + (f"; the paper's: {numbers}" if numbers else ""))
        print(f"          {state(name)}")
        print(f"          made by {artefact.functions}\n")
    print(f"{len(ARTEFACTS)} tables and figures. Each from a finished run: artefact=NAME experiment=NAME; from")
    print("results/measured, without runs: python -m analysis artefact=NAME, or artefact=all.")


def redraw_measured(name: str, out: Path = Path("runs/measured")) -> None:
    """Make an artefact, or all, from results/measured alone; says which were not measured yet."""
    files, names = [], list(DRAWN) if name == "all" else named(name)
    for each in names:
        if len(names) > 1 and not measured_files(each):
            print(f"{each}: {state(each)}")
        else:
            files += redraw(each, out)
    print(*files, sep="\n")


@dataclass(frozen=True)
class Results:
    """The numbers of one experiment as notebooks open them: of a run's folder, or of those that are kept."""

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
        if made.is_table:
            raise UserError(f"{name} is a table: read({name + made.ending!r}) has its numbers")
        return made.show(self.config, self.read(name))

    def decisions(self, recipe: str = "greedy") -> pd.DataFrame:
        """What a greedy recipe tried, from `analysis.figures.pool`; kept results have no record of it."""
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
