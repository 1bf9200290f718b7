"""Send the failed rows of an experiment again, and nothing else:  python -m slurm.retry experiment=X cluster=slurm_1gpu

Rows that are done, wait or run are left alone. What comes after them (evaluation, recipes, tables) is sent by
python reproduce.py experiment=X cluster=slurm_1gpu submit=true, which waits for the rows that are in the queue.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from configs.cli import entry_point
from configs.schema import Experiment
from slurm.jobs import ROWS, compact, jobs_of
from slurm.queue import send, sent_jobs, states_of
from slurm.status import failures


def retry(config: Experiment, typed: Sequence[str]) -> None:
    """Send them, print what was sent.

    Raises:
        UserError: SLURM is not here or refuses.
    """
    left, before = jobs_of(config, typed), sent_jobs(config)
    failed = failures(config, left, before, states_of(before))
    again = []
    for job in left:
        tasks = tuple(f.task for f in failed if (f.name, f.stage) == (job.name, job.stage) and f.task is not None)
        if job.stage in ROWS and tasks:
            again.append(replace(job, tasks=tasks))
    sent = send(config, again) if again else []
    for each in sent:
        print(f"job {each.job}: {each.name}, {each.stage}, tasks {compact(each.tasks)}")
    if not sent:
        print(f"{config.name}: no row has failed")


if __name__ == "__main__":
    entry_point(lambda config: retry(config, sys.argv[1:]))()
