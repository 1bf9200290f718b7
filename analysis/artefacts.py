"""Make the paper's tables and figures: from finished runs, or again from the numbers that were measured and kept."""

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
from rich import get_console

from analysis.catalogue import ARTEFACTS, DRAWN, MEASURED, NUMBERS
from analysis.released import published_instead, write_instead
from analysis.tables.paper import paper_table
from analysis.tables.table3 import publish, write_provenance
from configs.errors import UserError
from configs.schema import Experiment, load, replicate
from store.runs import RunFolder

FORWARD = "forward"  # artefact=forward means all that need forward passes of their own


def forward_artefacts(experiment: str) -> list[str]:
    """The tables and figures of an experiment that need forward passes of their own, which a GPU does fast.

    >>> forward_artefacts("table3_clip_b32")
    ['figure4', 'figureb1', 'figured1']
    """
    return [name for name in named(FORWARD) if ARTEFACTS[name].is_of(experiment)]


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
    artefact = DRAWN[name]
    by_name = {config.name: config for config in configs}
    return [by_name[each] for each in (*artefact.paper, *artefact.embedded) if each in by_name]


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
    """Make an artefact of finished experiments, record where it comes from, and publish it in `config.paths.results`.

    Raises:
        UserError: as `write_artefact`.
    """
    files = write_artefact(name, configs)
    homes = {RunFolder.of(each).analysis: each for each in configs}
    for folder, each in homes.items():
        if any(file.parent == folder for file in files):
            date = datetime.now(timezone.utc).date().isoformat()
            files.append(write_provenance(each, folder / f"{name}_provenance.json", artefact=name, date=date))
    if config.paths.results is None:
        return files
    return [publish(file, config.paths.results, homes[file.parent].name) for file in files]


def redraw(name: str, out: Path, folder: Path = MEASURED) -> list[Path]:
    """Make an artefact again in `out` from the numbers that were measured and kept in a folder, without runs.

    Raises:
        UserError: it was not measured yet; says what to run.
    """
    measured = measured_files(name, folder)
    if not measured:
        raise UserError(f"{name} is {state(name, folder)}")
    files = []
    for experiment, file in measured.items():
        config, numbers = measured_experiment(experiment), pd.read_csv(file)
        texts = numbers.columns.intersection(["confidence", "source"])
        numbers[texts] = numbers[texts].fillna("")
        files += DRAWN[name].write([config], numbers, out / file.stem)
    return files


def measured_experiment(named: str) -> Experiment:
    """The experiment whose results begin with a name: of one of several sweeps it ends with the seed."""
    whole, _, seed = named.rpartition("_seed")
    return replicate(load(whole), int(seed)) if seed.isdigit() else load(named)


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


def measured_files(name: str, folder: Path = MEASURED) -> dict[str, Path]:
    """Experiment -> its numbers of an artefact, of those that were measured and kept in a folder."""
    ending = f"_{name}{DRAWN[name].made.ending}.csv"
    return {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*{ending}"))}


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
    for name, chosen in wanted.items():
        if not chosen:
            needs = ", ".join((*DRAWN[name].paper, *DRAWN[name].embedded))
            raise UserError(f"artefact={name} is made of {needs}, none of which {config.name} has")
        started = time.monotonic()
        made = draw(config, name, chosen)
        get_console().print(f"{name}: {DRAWN[name].shows}, {time.monotonic() - started:.0f} s")
        files += made
    if not wanted:
        raise UserError(f"{config.name} belongs to no table or figure of the paper; name one: python -m analysis list")
    return files


def list_artefacts() -> None:
    """Of each of the paper's tables and figures: what it shows, what is measured of it, and which functions make it."""
    for name, artefact in ARTEFACTS.items():
        paper = paper_numbers(name)
        print(f"{name:<8}  {artefact.shows}" + (f"; the paper's: {paper}" if paper else ""))
        print(f"          {state(name)}")
        print(f"          made by {artefact.functions}\n")
    print(f"{len(ARTEFACTS)} tables and figures. Each from a finished run: artefact=NAME experiment=NAME; from")
    print("results/measured, without runs: python -m analysis artefact=NAME, or artefact=all.")


def redraw_measured(name: str, out: Path = Path("runs/measured")) -> None:
    """Make an artefact, or all, from results/measured alone; says which were not measured yet.

    Raises:
        UserError: there is none of this name, or the one that is named was not measured yet.
    """
    files, names = [], list(DRAWN) if name == "all" else named(name)
    for each in names:
        if len(names) > 1 and not measured_files(each):
            print(f"{each}: {state(each)}")
        else:
            files += redraw(each, out)
    print(*files, sep="\n")
