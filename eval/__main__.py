"""Evaluate every finished model of an experiment:  python -m eval experiment=demo

Reads   runs/<name>/{ingredients,zero_shot,soups}, the held-out, test and shift splits
Writes  runs/<name>/logits/<split>/<key>.npy, scores.jsonl beside each model; what is there is not computed again
"""

from configs.cli import entry_point
from configs.errors import UserError
from configs.schema import Experiment
from eval.pool import evaluate_all, model_folders
from store.runs import RunFolder


def run(config: Experiment) -> None:
    """All models that are finished by now."""
    folders = model_folders(config)
    if not folders:
        raise UserError(f"no finished model in {RunFolder.of(config).root}: run python -m finetune first")
    evaluate_all(config, folders)
    print(f"{len(folders)} models evaluated; next: python -m soups, then python -m analysis")


if __name__ == "__main__":
    entry_point(run)()
