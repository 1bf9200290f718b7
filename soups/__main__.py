"""Cook soups and ensembles from a finished sweep:  python -m soups experiment=demo [recipe=greedy]

Reads   runs/<name>/ingredients, the held-out split
Writes  runs/<name>/soups/<recipe>/{weights.safetensors, soup.json}; skipped where cooked from the same pool.
        An ensemble has no weights of its own: soup.json lists its members.

Several jobs share the recipes by share.of=N and share.index=0, ..., N - 1.

Or from files of your own:  python -m soups recipe=uniform 'ingredients=[a.safetensors,b.safetensors]' out=s.safetensors
"""

import sys

from configs.cli import entry_point, own_pool_entry_point
from configs.schema import Experiment


def run(config: Experiment) -> None:
    """One recipe with recipe=..., else this job's share of all that the experiment lists."""
    # Imported here, since averaging files of one's own needs none of it, and torch alone takes seconds.
    from soups.cook import cook_all, own_recipes, summary  # noqa: PLC0415
    from store.workers import use_threads  # noqa: PLC0415

    use_threads(config.cluster.threads)
    recipes = own_recipes(config)
    cook_all(config, recipes)
    print(summary(config, recipes))


def main() -> None:
    """`ingredients=` on the command line means files of one's own."""
    if any(word.lstrip("+").startswith("ingredients=") for word in sys.argv[1:]):
        from soups.own import run as run_own  # noqa: PLC0415

        own_pool_entry_point(run_own)()
    else:
        entry_point(run)()


if __name__ == "__main__":
    main()
