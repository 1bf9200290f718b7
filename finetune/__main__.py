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
    from rich.console import Console  # noqa: PLC0415

    from finetune.length import refuse_unequal_shares  # noqa: PLC0415
    from finetune.start import wait_for_starts  # noqa: PLC0415
    from finetune.sweep import describe, train_sweep, train_together  # noqa: PLC0415
    from finetune.train import train_row  # noqa: PLC0415
    from store.processes import end_processes, start_processes, started_processes  # noqa: PLC0415
    from store.rows import row_config  # noqa: PLC0415
    from store.staging import staged  # noqa: PLC0415
    from store.workers import use_threads  # noqa: PLC0415

    use_threads(config.cluster.threads)
    record_words(config, sys.argv[1:])
    config = staged(config)
    rows = range(config.sweep.size + 1) if config.sweep.index is None else [config.sweep.index]
    for row in rows if started_processes() > 1 and config.sweep.imported is None else ():
        if row > 0:
            # Said by each process alone: later, one would wait for another that has ended.
            refuse_unequal_shares(row_config(config, row).optim, started_processes())
    if config.sweep.index is None and started_processes() == 1:
        train_sweep(config)
        return
    processes, console = start_processes(), Console()
    if config.sweep.index is None:
        train_together(config, processes, console)
    else:
        wait_for_starts(config, config.sweep.index, processes)
        done = train_row(config, config.sweep.index, console)
        if processes.is_main:
            print(describe(done))
    end_processes()


if __name__ == "__main__":
    entry_point(run, several=True)()
