"""Cook soups and ensembles from a finished sweep:  python -m soups experiment=demo [recipe=greedy]

Reads   runs/<name>/ingredients, the held-out split
Writes  runs/<name>/soups/<recipe>/{weights.safetensors, soup.json}; skipped where cooked from the same pool.
        An ensemble has no weights of its own: soup.json lists its members.
"""

from configs.cli import entry_point
from configs.schema import Experiment
from eval.forward import Evaluator
from soups.cook import cook, describe
from store.workers import use_threads


def run(config: Experiment) -> None:
    """One recipe with recipe=..., else all that the experiment lists."""
    use_threads(config.cluster.threads)
    evaluator = Evaluator(config)
    for recipe in [config.recipe] if config.recipe else config.recipes:
        print(describe(cook(config, recipe, evaluator)))


if __name__ == "__main__":
    entry_point(run)()
