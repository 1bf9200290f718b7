"""Evaluate every finished model of an experiment:  python -m eval experiment=demo

Reads   runs/<name>/{ingredients,zero_shot,soups}, the held-out, test and shift splits
Writes  runs/<name>/logits/<split>/<key>.npy, scores.jsonl beside each model; what is there is not computed again
Several jobs share the models by share.of=N and share.index=0, ..., N - 1.
On several GPUs: torchrun --nproc-per-node 8 -m eval experiment=..., where each evaluates its part of the images.
"""

from configs.cli import entry_point
from configs.schema import Experiment


def run(config: Experiment) -> None:
    """All models that are finished by now."""
    # Imported here, so that --help and mistyped settings are answered at once: torch and the models take seconds.
    from eval.pool import evaluate_here  # noqa: PLC0415

    evaluate_here(config)


if __name__ == "__main__":
    entry_point(run, several=True)()
