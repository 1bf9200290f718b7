"""Fine-tune a sweep:  python -m finetune experiment=demo [sweep.index=3]

Reads   the task's train and held-out splits, the pretrained weights
Writes  runs/<name>/ingredients/<iii>/{config.json,metrics.jsonl,weights.safetensors,done.json} and
        runs/<name>/manifest.csv
Row 0 is the initialisation. Without sweep.index all rows that are not done are trained, here. Killed, it continues.
"""

from configs.cli import entry_point
from configs.schema import Experiment


def run(config: Experiment) -> None:
    """One row with sweep.index, else the whole sweep."""
    # Imported here, so that --help and mistyped settings are answered at once: torch and the models take seconds.
    from rich.console import Console  # noqa: PLC0415

    from finetune.sweep import describe, train_sweep  # noqa: PLC0415
    from finetune.train import train_row, wait_for_starts  # noqa: PLC0415
    from store.processes import end_processes, start_processes  # noqa: PLC0415
    from store.workers import use_threads  # noqa: PLC0415

    use_threads(config.cluster.threads)
    if config.sweep.index is None:
        train_sweep(config)
    else:
        wait_for_starts(config, config.sweep.index)
        done = train_row(config, config.sweep.index, Console())
        if start_processes().writes:
            print(describe(done))
        end_processes()


if __name__ == "__main__":
    entry_point(run)()
