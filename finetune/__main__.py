"""Fine-tune a sweep:  python -m finetune experiment=demo [sweep.index=3]

Reads   the task's train and held-out splits, the pretrained weights
Writes  runs/<name>/ingredients/<iii>/{config.json,metrics.jsonl,weights.safetensors,done.json} and
        runs/<name>/manifest.csv
Row 0 is the initialisation. Without sweep.index all rows that are not done are trained, here. Killed, it continues.
On several GPUs: torchrun --nproc-per-node 8 -m finetune experiment=..., where all of them train each row together.
"""

import sys

from configs.cli import entry_point, record_words
from configs.schema import Experiment


def run(config: Experiment) -> None:
    """One row with sweep.index, else the whole sweep; under torchrun, one row after the other by all processes."""
    # Imported here, so that --help and mistyped settings are answered at once: torch and the models take seconds.
    from finetune.sweep import train_here  # noqa: PLC0415

    record_words(config, sys.argv[1:])
    train_here(config)


if __name__ == "__main__":
    entry_point(run, several=True)()
