"""What python -m analysis does: tables and figures of experiments, the list of all artefacts, the report."""

import sys
import time
from pathlib import Path

from rich.console import Console

from analysis.artefacts import draw, measured_files, named, paper_numbers, parts_of, redraw, state
from analysis.catalogue import ARTEFACTS, DRAWN, MEASURED
from analysis.claims import POOLS, write_claims
from analysis.ending import reminder, verdict
from analysis.page.write import write_report
from analysis.predictions import write_pool
from analysis.released import published_instead, write_instead
from analysis.subpools import write_pays, write_subpools
from analysis.tables.sweep_seeds import over_seeds
from analysis.tables.table3 import analyse
from analysis.will_it_help import write_will_it_help
from configs import cli
from configs.errors import UserError
from configs.schema import Experiment, replicate
from store.staging import staged
from store.workers import use_threads


def _console() -> Console:
    """For progress; a log may be wider than the usual terminal."""
    return Console(width=None if sys.stdout.isatty() else 110)


def tables(config: Experiment) -> tuple[list[Path], list[str]]:
    """Analyse the experiment, or its replicates and then all of them together; what came out, in sentences, too."""
    if published_instead(config):
        return write_instead(config), []
    reports = {seed: analyse(replicate(config, seed)) for seed in config.replicates}
    if config.replicates:
        whole = over_seeds(config, {seed: report.tidy for seed, report in reports.items()})
    else:
        whole = analyse(config)
    files = [file for report in (*reports.values(), whole) for file in report.files]
    return files, [*verdict(config, whole.tidy), *filter(None, [reminder(config)])]


def artefacts(config: Experiment, parts: list[Experiment], console: Console) -> list[Path]:
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
        made = draw(config, name, chosen, console)
        console.print(f"{name}: {DRAWN[name].shows}, {time.monotonic() - started:.0f} s")
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


def predictions_of_all(config: Experiment) -> None:
    """Write the tables of predictions and of sub-pools of the experiment, or of each of its parts."""
    use_threads(config.cluster.threads)
    console = _console()
    for part in cli.parts_of(config, sys.argv[1:]):
        print(*write_pool(part, console), *write_subpools(part, console), sep="\n")


def claims() -> None:
    """Answer the claims from the pools whose predictions are in results/measured."""
    files = write_claims(MEASURED)
    if any(MEASURED.glob("*_subpools.csv")):
        files += write_pays(MEASURED, POOLS)
    print(files[0].read_text(), *files, sep="\n")


def will_it_help() -> None:
    """Measure how often soups help, and how well that is predicted, from the pools in results/measured."""
    files = write_will_it_help(MEASURED)
    print(files[0].read_text(), *files, sep="\n")


def report_all(config: Experiment) -> None:
    """Write the page of an experiment, or of each of its parts and replicates."""
    use_threads(config.cluster.threads)
    for part, words in cli.parts_as_typed(config, sys.argv[1:]):
        for each in [replicate(part, seed) for seed in part.replicates] or [part]:
            print(write_report(each, typed=[word for word in words if not word.startswith("artefact=")]))


def analyse_all(config: Experiment) -> None:
    """Analyse the experiment and its parts, or draw the artefact that is named."""
    use_threads(config.cluster.threads)
    parts = [staged(part) for part in cli.parts_of(config, sys.argv[1:])]
    if config.artefact is not None:
        print(*artefacts(config, parts, _console()), sep="\n")
        return
    for part in parts:
        files, sentences = tables(part)
        print(*files, *sentences, sep="\n")
