"""Tables and figures of a finished experiment:  python -m analysis experiment=demo [paths.results=results/measured]

Reads   runs/<name>/{ingredients,soups,logits}
Writes  runs/<name>/analysis/{table3.md,table3.tex,table3.csv,figure1.pdf,figure1.png,figure1.csv,provenance.json}
With replicates (experiment=demo_seeds) their tables, and seeds.{md,csv} over all of them.
"""

from analysis.released import published_instead, write_instead
from analysis.report import analyse
from analysis.seeds import over_seeds
from configs.cli import entry_point
from configs.schema import Experiment, replicate
from store.workers import use_threads


def run(config: Experiment) -> None:
    """Analyse the experiment, or its replicates and then all of them together."""
    use_threads(config.cluster.threads)
    if published_instead(config):
        files = tuple(write_instead(config))
    elif not config.replicates:
        files = analyse(config).files
    else:
        reports = {seed: analyse(replicate(config, seed)) for seed in config.replicates}
        files = tuple(file for report in reports.values() for file in report.files)
        files += over_seeds(config, {seed: report.tidy for seed, report in reports.items()}).files
    for file in files:
        print(file)


if __name__ == "__main__":
    entry_point(run)()
