"""What each stage asks of a file system's metadata server: files created, records read, images listed and opened."""

from dataclasses import dataclass

from configs.schema import Experiment
from slurm.costs import trained_rows
from slurm.recipes import members
from slurm.workload import images_of, kinds_of, row_work
from soups.cook import ENSEMBLES, dishes

FILE_PER_IMAGE = ("image_folder", "dtd", "food101", "sun397", "cars", "fmow", "iwildcam")  # kinds of tasks
ROW = 4  # files of a row beside weights and logits: config.json, metrics.jsonl, lock, done.json
SOUP = 2  # of a soup: lock and soup.json


@dataclass(frozen=True)
class Metadata:
    """Of one stage. Every file is also written under a temporary name and renamed, which is not counted."""

    stage: str
    tasks: int
    created: int  # files that are there afterwards, by all tasks together
    records: int  # done.json and soup.json that one task reads
    listed: int  # image files whose names and sizes one task lists before its work
    opened: int  # image files opened, by all tasks together


def metadata(config: Experiment) -> tuple[Metadata, ...]:
    """Of the stages that have many files, where every row, every model and every recipe is a task of its own.

    Raises:
        UserError: as in `slurm.workload.images_of`.
    """
    task, k, images = config.task, members(config), images_of(config.task)
    models = k + (config.model.templates is not None)
    has_files = task.kind in FILE_PER_IMAGE
    # Held-out is a part of train's folders, which are listed to find it.
    training = images[task.train] + images[task.held_out] if has_files else 0
    reporting = sum(images[split] for split in task.reported) if has_files else 0
    rows = trained_rows(config)
    steps = sum(row_work(row, images).augmented for row in rows) if has_files else 0
    cooked = [name for recipe in config.recipes for name in dishes(config, recipe)]
    files = SOUP * len(cooked) + len([name for name in cooked if name not in ENSEMBLES])
    created = sum(ROW + 2 * kinds_of(row.regularizer) for row in rows)
    decoded_once = reporting if config.compute.decoded is not None else models * reporting
    return (
        Metadata("fine-tune", len(rows), created, 2, training, steps),
        Metadata("evaluate", models, models * (len(task.reported) + 1), models, training + reporting, decoded_once),
        Metadata("recipes", len(cooked), files, k, training, 0),
    )
