"""Tables and figures of finished experiments:  python -m analysis experiment=demo [paths.results=results/measured]

    python -m analysis list                                    the paper's tables and figures, and what is measured
    python -m analysis artefact=figure4 experiment=demo        one of them; artefact=all: all of this experiment
    python -m analysis artefact=all                            all of them again from results/measured, without runs
    python -m analysis report experiment=demo                  runs/demo/report.html: all of it on one page
    python -m analysis predictions experiment=demo72           what each method gets right, image by image
    python -m analysis claims                                  docs/claims.md, answered from results/measured
    python -m analysis will_it_help                            how often soups help: what soups doctor says of a pool

Reads   runs/<name>/{ingredients,soups,logits}
Writes  runs/<name>/analysis/{table3.md,table3.tex,table3.csv,figure1.pdf,figure1.png,figure1.csv,provenance.json},
        with artefact=NAME runs/<name>/analysis/NAME*.{md,tex,csv,pdf,png} and NAME_provenance.json
With replicates (experiment=demo_seeds) their tables, and seeds.{md,csv} over all of them; of an experiment with parts
(experiment=demo_full) those of all parts.
"""

import sys
from functools import partial

from configs.cli import entry_point
from configs.schema import Experiment
from soups.errors import one_line_errors

# What works is imported when it is asked for, so that --help and mistyped settings are answered at once: torch and the
# models take seconds.


def run(config: Experiment) -> None:
    """Analyse the experiment and its parts."""
    from analysis.commands import analyse_all  # noqa: PLC0415

    analyse_all(config)


def report(config: Experiment) -> None:
    """Write the page of the experiment, or of each of its parts and replicates."""
    from analysis.commands import report_all  # noqa: PLC0415

    report_all(config)


def predictions(config: Experiment) -> None:
    """Write the tables of predictions of the experiment, or of each of its parts."""
    from analysis.commands import predictions_of_all  # noqa: PLC0415

    predictions_of_all(config)


def show_claims() -> None:
    """Answer the claims from the pools that are measured."""
    from analysis.commands import claims  # noqa: PLC0415

    claims()


def show_will_it_help() -> None:
    """Measure how often soups help."""
    from analysis.commands import will_it_help  # noqa: PLC0415

    will_it_help()


def show_measured(artefact: str) -> None:
    """Make tables and figures from the numbers in results/measured."""
    from analysis.commands import redraw_measured  # noqa: PLC0415

    print(*redraw_measured(artefact), sep="\n")


def show_list() -> None:
    """A line for each of the paper's tables and figures."""
    from analysis.commands import list_artefacts  # noqa: PLC0415

    list_artefacts()


if __name__ == "__main__":
    if sys.argv[1:] == ["list"]:
        one_line_errors(show_list)
    elif sys.argv[1:] == ["claims"]:
        one_line_errors(show_claims)
    elif sys.argv[1:] == ["will_it_help"]:
        one_line_errors(show_will_it_help)
    elif len(sys.argv) == 2 and sys.argv[1].startswith("artefact="):
        one_line_errors(partial(show_measured, sys.argv[1].removeprefix("artefact=")))
    elif sys.argv[1:2] in (["report"], ["predictions"]):
        entry_point({"report": report, "predictions": predictions}[sys.argv.pop(1)])()
    else:
        entry_point(run)()
