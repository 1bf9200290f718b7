"""The paper's 33 tables and figures: what each shows, how it is made from runs, and again from csv that were kept.

artefacts.csv has a line for each, with the functions that make it. They are imported when they are called.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure
from rich import get_console

from analysis.figures.pool import decisions
from analysis.figures.style import save_with_numbers, write_csv
from analysis.measure.methods import NAN, SHIFT_MEAN
from analysis.released import published_instead, write_instead
from analysis.tables.cells import write_cells
from analysis.tables.paper import paper_table
from analysis.tables.table3 import publish, write_provenance
from configs.cli import with_run
from configs.errors import UserError
from configs.schema import Experiment, load, replicate
from soups.files.atomic import read_json
from store.runs import RunFolder

MEASURED = Path(__file__).resolve().parents[1] / "results/measured"
FORWARD = "forward"  # artefact=forward means all that need forward passes of their own


def _function(words: str) -> Callable[..., Any]:
    """What a line of artefacts.csv calls, as in "analysis.figures.landscape:draw_landscape log=true"."""
    place, *options = words.split()
    module, _, name = place.partition(":")
    given = (option.partition("=") for option in options)
    return partial(getattr(import_module(module), name), **{key: yaml.safe_load(value) for key, _, value in given})


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper: a line of artefacts.csv."""

    name: str
    shows: str
    paper: tuple[str, ...]  # experiments it is made of; none where the paper has formulas alone
    embedded: tuple[str, ...]  # their counterparts of the embedded benchmark
    forward: bool  # whether soups or points are evaluated for it that no recipe made
    several: bool  # whether several experiments make one of it
    measure: str  # the function that takes an experiment, or `several`, and returns its numbers
    show: str  # the function of the same and of the numbers alone: the picture, of a table the cells and the caption
    summary: str  # of one whose table is another csv, <name>_summary.csv

    @property
    def is_table(self) -> bool:
        """Whether it is no figure."""
        return self.name.startswith("table")

    @property
    def stem(self) -> str:
        """What its files are called, without suffix."""
        return f"{self.name}_with_paper" if self.is_table else self.name

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
        return f"{self.measure.split()[0]} {self.show.split()[0]}"

    def shown(self, configs: Sequence[Experiment], numbers: pd.DataFrame) -> Any:
        """Its picture, or its cells and caption, from its numbers alone."""
        return _function(self.show)(configs if self.several else configs[0], numbers)

    def write(self, configs: Sequence[Experiment], numbers: pd.DataFrame, stem: Path) -> list[Path]:
        """Write a figure as stem.{pdf,png,csv} with its summary, or a table as stem.{md,tex,csv}.

        Differences to the paper stand only in tables of the paper's own experiments: of a proxy they say nothing.
        """
        if "minus_paper" in numbers and not all(self.is_papers(config) for config in configs):
            numbers = numbers.assign(minus_paper=NAN)
        if self.is_table:
            cells, caption = self.shown(configs, numbers)
            return write_cells(cells, numbers, stem, caption)
        files = save_with_numbers(self.shown(configs, numbers), numbers, stem)
        if self.summary:
            table = _function(self.summary)(configs[0], numbers)
            files.append(write_csv(table, stem.with_name(f"{stem.name}_summary.csv"), "%.6f"))
        return files


TABLE = pd.read_csv(Path(__file__).with_name("artefacts.csv"), index_col="name", keep_default_na=False)
DRAWN = {  # all that `artefact=` may name
    name: Artefact(
        name=name,
        **line[["shows", "measure", "show", "summary"]],
        **line[["paper", "embedded"]].str.split().map(tuple),
        **line[["forward", "several"]].eq("yes"),
    )
    for name, line in TABLE.iterrows()
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
    """Artefacts that `artefact=name` means: itself, all, or those that need forward passes; a UserError: of none."""
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
    """Make an artefact of finished experiments, in their analysis folders; returns the files."""
    artefact, files = DRAWN[name], []
    for group in [configs] if artefact.several else [[config] for config in configs]:
        numbers = _function(artefact.measure)(group if artefact.several else group[0])
        files += artefact.write(group, numbers, RunFolder.of(group[0]).analysis / artefact.stem)
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
    """Make an artefact again in `out` from the numbers that were measured and kept in a folder, without runs."""
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
    ending = f"_{DRAWN[name].stem}.csv"
    return {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*{ending}"))}


def paper_numbers(name: str) -> str:
    """What the paper says, for `python -m analysis list`; empty where no number was recovered.

    >>> paper_numbers("table3")
    'greedy test 81.03, best test 80.38, uniform test 79.97'
    """
    found = []
    for table, row, column in NUMBERS.get(name, ()):
        value = paper_table(table).set_index(["row", "column"])["value"][row, column]
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
    """Make what `artefact` names: of `all`, each that one of the experiments belongs to."""
    names, files = named(config.artefact or ""), []
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
        """A csv, as in `read("table3")`; a UserError says what to type for one that was not made."""
        path = Path(f"{self.begin}{name}.csv")
        if not path.exists():
            words = f"artefact={name} " * (name in DRAWN)
            words += f"run={self.run}" if self.run else f"experiment={self.config.name}"
            raise UserError(f"{path} is missing: type python -m analysis {words}")
        return pd.read_csv(path)

    def draw(self, name: str) -> Figure:
        """A figure from its csv, as in `draw("figure1")`; raises as `read`."""
        if DRAWN[name].is_table:
            raise UserError(f"{name} is a table: read({DRAWN[name].stem!r}) has its numbers")
        return DRAWN[name].shown([self.config], self.read(name))

    def decisions(self, recipe: str = "greedy") -> pd.DataFrame:
        """What a greedy recipe tried, from `analysis.figures.pool.decisions`; kept results have no record of it."""
        record = self.run and self.run / "soups" / recipe / "soup.json"
        if record is None or not record.exists():
            raise UserError(
                f"{self.run or self.begin} has no record of {recipe}: RUN needs the folder of a run with it"
            )
        return decisions(read_json(record))


def results_of(run: str) -> Results:
    """The results of a run's folder, as "runs/demo", or those kept of an experiment, as "results/measured/demo"."""
    path = Path(run)
    if path.is_dir():
        experiment, *words = sorted(with_run([f"run={run}"]), key=lambda word: not word.startswith("experiment="))
        config = load(experiment.removeprefix("experiment="), *words)
        return Results(config, f"{path / 'analysis'}/", path)
    if not list(path.parent.glob(f"{path.name}_*.csv")):
        raise UserError(f"RUN={run}: neither a run's folder nor what results in {path.parent} begin with")
    return Results(measured_experiment(path.name), f"{run}_", None)
