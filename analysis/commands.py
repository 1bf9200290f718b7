"""What python -m analysis does with experiments and with results/measured; `analysis.artefacts` has the rest."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import reconfigure

from analysis.artefacts import MEASURED, artefacts
from analysis.claims import POOLS, write_claims, write_pool
from analysis.ending import reminder, verdict
from analysis.page.write import write_report
from analysis.released import published_instead, write_instead
from analysis.subpools import write_pays, write_subpools
from analysis.tables.table3 import Report, analyse, over_seeds
from analysis.will_it_help import write_will_it_help
from configs import cli
from configs.schema import Experiment, replicate
from store.staging import staged
from store.workers import use_threads


def sweeps_of(config: Experiment) -> list[Experiment]:
    """The replicates of an experiment, or itself."""
    return [replicate(config, seed) for seed in config.replicates] or [config]


def reports_of(config: Experiment, of_one: Callable[[Experiment], Report] = analyse) -> list[Report]:
    """A report of each sweep of an experiment, and last that of all of it."""
    reports = [of_one(each) for each in sweeps_of(config)]
    if config.replicates:
        tidy = {seed: report.tidy for seed, report in zip(config.replicates, reports, strict=True)}
        reports.append(over_seeds(config, tidy))
    return reports


def predictions(config: Experiment) -> None:
    """Write the tables of predictions and of sub-pools of the experiment, or of each of its parts."""
    use_threads(config.cluster.threads)
    wide_log()
    for part in cli.parts_of(config, sys.argv[1:]):
        print(*write_pool(part), *write_subpools(part), sep="\n")


def wide_log(**options: bool) -> None:
    """A log may be wider than the usual terminal."""
    reconfigure(width=None if sys.stdout.isatty() else 110, **options)


def claims() -> None:
    """Answer the claims from the pools whose predictions are in results/measured."""
    files = write_claims(MEASURED)
    if any(MEASURED.glob("*_subpools.csv")):
        files += write_pays(MEASURED, POOLS)
    _show_first(files)


def will_it_help() -> None:
    """Measure how often soups help, and how well that is predicted, from the pools in results/measured."""
    _show_first(write_will_it_help(MEASURED))


def _show_first(files: Sequence[Path]) -> None:
    print(files[0].read_text(), *files, sep="\n")


def report(config: Experiment) -> None:
    """Write the page of an experiment, or of each of its parts and replicates."""
    use_threads(config.cluster.threads)
    for part, words in cli.parts_as_typed(config, sys.argv[1:]):
        for each in sweeps_of(part):
            print(write_report(each, typed=[word for word in words if not word.startswith("artefact=")]))


def analyse_all(config: Experiment) -> None:
    """Analyse the experiment and its parts, or draw the artefact that is named."""
    use_threads(config.cluster.threads)
    parts = [staged(part) for part in cli.parts_of(config, sys.argv[1:])]
    if config.artefact is not None:
        wide_log()
        print(*artefacts(config, parts), sep="\n")
        return
    for part in parts:
        if published_instead(part):
            print(*write_instead(part), sep="\n")
            continue
        reports = reports_of(part)
        files = [file for each in reports for file in each.files]
        print(*files, *verdict(part, reports[-1].tidy), *filter(None, [reminder(part)]), sep="\n")
