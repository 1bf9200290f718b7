"""What python -m analysis does with experiments and with results/measured; `analysis.artefacts` has the rest."""

import sys
from pathlib import Path

from rich import reconfigure

from analysis.artefacts import artefacts
from analysis.catalogue import MEASURED
from analysis.claims import POOLS, write_claims
from analysis.ending import reminder, verdict
from analysis.page.write import write_report
from analysis.predictions import write_pool
from analysis.released import published_instead, write_instead
from analysis.subpools import write_pays, write_subpools
from analysis.tables.table3 import analyse, over_seeds
from analysis.will_it_help import write_will_it_help
from configs import cli
from configs.schema import Experiment, replicate
from store.staging import staged
from store.workers import use_threads


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


def predictions_of_all(config: Experiment) -> None:
    """Write the tables of predictions and of sub-pools of the experiment, or of each of its parts."""
    use_threads(config.cluster.threads)
    reconfigure(width=None if sys.stdout.isatty() else 110)  # a log may be wider than the usual terminal
    for part in cli.parts_of(config, sys.argv[1:]):
        print(*write_pool(part), *write_subpools(part), sep="\n")


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
        reconfigure(width=None if sys.stdout.isatty() else 110)
        print(*artefacts(config, parts), sep="\n")
        return
    for part in parts:
        files, sentences = tables(part)
        print(*files, *sentences, sep="\n")
