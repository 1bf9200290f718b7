"""Make the soups and ensembles of a finished sweep:  python -m soups experiment=demo [recipe=greedy]

Reads   runs/<name>/ingredients, the held-out split
Writes  runs/<name>/soups/<recipe>/{weights.safetensors, soup.json}; skipped where made from the same pool.
        An ensemble has no weights of its own: soup.json lists its members.
`soups --help` has the commands for files of your own, which need no experiment.
"""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
from configs.cli import entry_point
from configs.schema import Experiment
from soups.ranks import end, start, this_rank


def run(config: Experiment) -> None:
    """One recipe with recipe=..., else this job's share of all that the experiment lists."""
    # Imported here, since mistyped settings and --help need none of it, and torch alone takes seconds.
    from soups.experiment.soups import job_recipes, make_soup_together, make_soups, summary  # noqa: PLC0415
    from store.staging import staged  # noqa: PLC0415
    from store.workers import use_threads  # noqa: PLC0415

    use_threads(config.cluster.threads)
    config = staged(config)
    start()
    if this_rank()[1] > 1:
        make_soup_together(config)
        recipes: tuple[str, ...] = ("greedy",)
    else:
        recipes = job_recipes(config)
        make_soups(config, recipes)
    if this_rank()[0] == 0:
        print(summary(config, recipes))
    end()


def main() -> None:
    """The entry point, of Hydra."""
    entry_point(run, several=True)()
