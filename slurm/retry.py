"""Send the failed rows of an experiment again, and nothing else:  python -m slurm.retry experiment=X cluster=slurm_1gpu

Rows that are done, wait or run are left alone. What comes after them (evaluation, recipes, tables) is sent by
python reproduce.py experiment=X cluster=slurm_1gpu submit=true, which waits for the rows that are in the queue.
"""

import sys
from dataclasses import replace

from configs.cli import entry_point, parts_as_typed
from configs.schema import Experiment
from slurm.jobs import ROWS
from slurm.status import failures
from slurm.submit import planned, send, sent_jobs, sent_states


def retry(config: Experiment) -> None:
    """Send them and print what was sent, for each experiment that one is made of."""
    for part, typed in parts_as_typed(config, sys.argv[1:]):
        left, before = planned(part, typed).jobs, sent_jobs(part)
        failed = {(each.name, each.stage, each.task) for each in failures(part, left, before, sent_states(before))}
        again = [
            replace(job, tasks=tasks)
            for job in left
            if job.stage in ROWS and (tasks := tuple(t for t in job.tasks if (job.name, job.stage, t) in failed))
        ]
        for each in send(part, again) if again else ():
            print(each.line)
        if not again:
            print(f"{part.name}: no row has failed")


if __name__ == "__main__":
    entry_point(retry, whole=True)()
