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
from collections.abc import Callable
from importlib import import_module

from configs.cli import entry_point
from soups.errors import one_line_errors, refuse

# module:function of each. The first need no experiment.
ALONE = {"list": "artefacts:list_artefacts", "claims": "commands:claims", "will_it_help": "commands:will_it_help"}
OF_EXPERIMENTS = {"report": "commands:report", "predictions": "commands:predictions"}


def command(name: str, *given: str) -> Callable[..., None]:
    """A function of analysis, imported when it is called: --help and mistyped settings wait for no torch."""
    module, _, function = name.partition(":")
    return lambda *arguments: getattr(import_module(f"analysis.{module}"), function)(*given, *arguments)


def main() -> None:
    """A word without a value, wherever it stands, says what is wanted besides tables; the others are settings."""
    words = sys.argv[1:]
    names = [word for word in words if word in (*ALONE, *OF_EXPERIMENTS)]
    first, settings = names[0] if names else "", [word for word in words if word not in names[:1]]
    if first in ALONE and not settings:
        one_line_errors(command(ALONE[first]))
    elif len(words) == 1 and words[0].startswith("artefact="):
        one_line_errors(command("artefacts:redraw_measured", words[0].removeprefix("artefact=")))
    elif first in ALONE and {"--help", "-h"}.isdisjoint(words):
        refuse(f"python -m analysis {first} takes no settings: leave out {settings[0]}")
    else:
        sys.argv[1:] = settings
        entry_point(command(OF_EXPERIMENTS.get(first, "commands:analyse_all")), whole=True)()


if __name__ == "__main__":
    main()
