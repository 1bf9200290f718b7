"""The tables of slurm/SCALING.md, from the cost model:  python -m slurm.scaling [TABLE ...]

Three pools: the paper's 72 CLIP ViT-B/32 and 58 ViT-G/14 (its proxy), and 10,000 of the first, on H100s under the
assumptions of configs/plan/assumed.yaml. Estimates; nothing of it was measured on a cluster.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import lru_cache

from configs.cli import one_line_errors
from configs.errors import UserError
from configs.schema import Experiment, load
from slurm.costs import HOUR, Costs, costs, gpus_per_row, hours
from slurm.metadata import metadata
from slurm.plan import gigabytes, time
from slurm.recipes import STEP_READS, dish_work, learned_steps, members
from slurm.schedule import most_rounds, read_decisions, table
from slurm.workload import FLOAT32, Work, images_of, looked, network

POOLS = {
    "72 CLIP ViT-B/32": ("table3_clip_b32", ()),
    "58 ViT-G/14 (proxy)": ("table4_vitg", ()),
    "10,000 CLIP ViT-B/32": ("table3_clip_b32", ("sweep.rows=9999",)),
}
GPUS = (8, 64, 512)
RANKS = (1, 8, 64)
HALF = 2  # bytes of a bfloat16 difference, as learned soups keep with cooking.learned.place=host
PLAN = ("plan=assumed", "plan.gpu=h100")


@lru_cache(maxsize=len(POOLS))
def pool(name: str) -> Experiment:
    """The settings of a pool."""
    experiment, typed = POOLS[name]
    return load(experiment, *PLAN, *typed)


@lru_cache(maxsize=len(POOLS))
def pool_costs(name: str) -> Costs:
    """What a pool takes."""
    return costs(pool(name))


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    rows = ["| " + " | ".join(line) + " |" for line in [head, *lines]]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def time_table() -> str:
    """GPU-hours and wall time of each stage."""
    lines = []
    for name in POOLS:
        found = pool_costs(name)
        for part in found.stages:
            lines.append([name, part.name, f"{len(part.jobs):,}", part.bound, f"{part.gpu_hours:,.1f}"])
            lines[-1] += [time(part.wall_hours(n)) for n in GPUS]
        lines.append([name, "**all**", "", "", f"{found.gpu_hours:,.1f}", *(time(found.wall_hours(n)) for n in GPUS)])
    return markdown(["pool", "stage", "jobs", "most by", "GPU-hours", *(f"on {n}" for n in GPUS)], lines)


def storage_table() -> str:
    """What is kept, and what is there while rows train."""
    lines = []
    for name in POOLS:
        config, found = pool(name), pool_costs(name)
        kept = {part.name: part.storage for part in found.stages}
        images, task = images_of(config.task), config.task
        splits = sum(images[split] for split in (task.held_out, *task.reported))
        together = min(found.rows, 64 // gpus_per_row(config))
        lines.append(
            [
                name,
                gigabytes(network(config.model, task).bytes),
                gigabytes(kept["fine-tune"]),
                gigabytes(splits * task.size * FLOAT32 * (members(config) + 1)),
                gigabytes(splits * 3 * config.model.evaluated_at**2),
                gigabytes(kept["recipes"]),
                gigabytes(found.storage),
                gigabytes(together * found.state),
            ]
        )
    head = ["pool", "one model", "rows", "logits", "decoded copies", "soups", "all that is kept"]
    return markdown([*head, "states, 64 GPUs training"], lines)


def reading_table() -> str:
    """Bytes of ingredients that recipes read, and how long one task reads them."""
    lines = []
    for name in POOLS:
        config = pool(name)
        images = images_of(config.task)
        size = network(config.model, config.task).bytes
        whole, steps = size * members(config), learned_steps(config, images[config.task.held_out])
        stream = STEP_READS * steps * whole
        lines.append([name, gigabytes(whole), time(hours(config, Work(read=whole)).read)])
        lines[-1] += [gigabytes(STEP_READS * whole), f"{steps:,}", time(hours(config, Work(again=stream)).read)]
        lines[-1] += [gigabytes(whole * HALF / FLOAT32 / ranks) for ranks in RANKS]
    head = ["pool", "a uniform or greedy soup reads", "in", "a step of a learned soup reads", "steps", "all of them in"]
    return markdown([*head, *(f"memory a rank, {ranks}" for ranks in RANKS)], lines)


def metadata_table() -> str:
    """Files created, listed and opened."""
    lines = []
    for name in POOLS:
        for part in metadata(pool(name)):
            numbers = (part.tasks, part.created, part.records, part.tasks * part.records, part.listed, part.opened)
            lines.append([name, part.stage, *(f"{number:,}" for number in numbers)])
            lines[-1].insert(7, f"{part.tasks * part.listed:,}")
    head = ["pool", "stage", "tasks", "files created", "records read by a task", "by all"]
    return markdown([*head, "images listed by a task", "by all", "images opened by all"], lines)


def greedy_table() -> str:
    """How long greedy takes one candidate after the other, and on several workers at most."""
    decisions = read_decisions()
    lines = []
    for name in POOLS:
        config = pool(name)
        images = images_of(config.task)
        candidates = members(config) - 1
        accepts = -(-candidates * sum(decisions) // len(decisions))  # as often as in the authors' run
        one = hours(config, looked(config, images[config.task.held_out])).all
        read = hours(config, Work(read=network(config.model, config.task).bytes)).all
        lines.append([name, f"{candidates:,}", f"{accepts:,}", f"{read * HOUR:.1f} s", f"{one * HOUR:.1f} s"])
        lines[-1].append(time(hours(config, dish_work(config, "greedy", images)).all))
        rounds = [most_rounds(candidates, accepts, workers) for workers in GPUS]
        lines[-1] += [f"{n:,} rounds, {time((one + read) * n)}" for n in rounds]
    head = ["pool", "candidates", "accepts", "reading one", "evaluating one", "one worker"]
    return markdown([*head, *(f"at most, on {n}" for n in GPUS)], lines)


def schedule_table() -> str:
    """The authors' decisions on several workers."""
    found = table(read_decisions())
    return markdown(list(found.columns), [[f"{value:g}" for value in line] for line in found.to_numpy().tolist()])


TABLES: dict[str, Callable[[], str]] = {
    "time": time_table,
    "storage": storage_table,
    "reading": reading_table,
    "metadata": metadata_table,
    "greedy": greedy_table,
    "schedule": schedule_table,
}


def run(names: Sequence[str]) -> None:
    """Print some tables, or all.

    Raises:
        UserError: there is no such table.
    """
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise UserError(f"there is no table {unknown[0]!r}, only {', '.join(TABLES)}")
    for name in names or TABLES:
        print(f"{TABLES[name]()}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="*", help=f"{', '.join(TABLES)}; all where none is named")
    wanted = parser.parse_args().table
    one_line_errors(lambda: run(wanted))
