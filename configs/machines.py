"""Settings of where an experiment runs, on this machine or as jobs of SLURM, and of what plans assume of machines."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.fields import Count, Fraction, Natural, Needs, Positive, closed

Time = Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]  # days-hours:minutes:seconds


@closed
class Slurm:
    """What jobs ask of SLURM; null leaves it to the cluster."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gpus: Natural  # for a row's job, as many of them as can share its batch; the other stages take one GPU, if not 0
    sharded_gpus: Natural = 8  # for a row whose network is too large for one GPU (compute.strategy=fsdp)
    gpu_type: str | None  # the word for it in gres: a100, h100; null: any
    nodes: Count  # for a row's job, with so many GPUs each; more than one, or several GPUs, start torchrun
    cpus: Count  # for a task; where several GPUs train a row, for all of them
    memory: str | None  # for each CPU, e.g. 5G
    time: Time  # longest that a row asks for, after which it saves and requeues itself
    stage_time: Time  # the same for a job of any other stage
    margin: Annotated[float, Field(ge=1)] = 2.0  # jobs ask for so many times what the cost model expects
    cpu_partition: str | None = None  # for jobs without a GPU; null: `partition`
    check_space: bool = True  # refuse to send what the disk of paths.runs has no room for, by the cost model
    max_parallel: Count | None  # rows at the same time; null: as many as fit
    evaluate_jobs: Count  # jobs that share the models to be evaluated
    setup: Path | None  # a shell file with modules, an environment or a container's line; null: slurm/setup.sh
    environment: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)  # variables of every job
    options: tuple[str, ...] = ()  # more options of sbatch, as in --exclude=node7


@closed
class Cluster:
    """configs/cluster/*.yaml: where rows run."""

    kind: Literal["local", "slurm"]
    workers: Count  # processes, one row each; with slurm, within a job
    threads: Count  # torch's and BLAS's, of each process; recorded with results, since it can change the last bits
    # how often a SLURM job may be requeued before it no longer requeues itself
    restarts: Annotated[Natural, Needs("cluster.kind", "slurm")] = 20
    slurm: Slurm | None = None
    stage: Path | None = None  # an archive or folder with what task.folder holds, which jobs unpack to a local disk
    stage_to: Path | None = None  # that disk; null: $SLURM_TMPDIR, else $TMPDIR, else /tmp

    @model_validator(mode="after")
    def slurm_has_its_settings(self) -> "Cluster":
        """Jobs say what they ask for, and only jobs do."""
        if (self.kind == "slurm") != (self.slurm is not None):
            raise ValueError("cluster.kind=slurm and cluster.slurm belong together")
        return self


@closed
class Share:
    """Which models `python -m eval` looks at, and which recipes `python -m soups` makes, where several jobs share them.

    Every `of`-th, from the one with number `index` on: a task of a job array has share.index=$SLURM_ARRAY_TASK_ID.
    """

    index: Natural = 0
    of: Count = 1

    @model_validator(mode="after")
    def index_is_a_share(self) -> "Share":
        """Shares are counted from 0."""
        if self.index >= self.of:
            raise ValueError(
                f"index={self.index} is past the last of {self.of} shares; share.of=N says how many there are"
            )
        return self


@closed
class Plan:
    """configs/plan/*.yaml: what `python -m slurm.plan` assumes of machines; no result depends on it."""

    gpu: str  # words of its name in the table of finetune/log.py, as in h100 or a100 or "h100 pcie"
    gpus: Count | None = None  # wall time is said for so many too
    gpus_per_row: Count | None = None  # that train one row together; null: 8 where compute.strategy=fsdp, else 1
    utilisation: Fraction  # share of the GPU's peak while it trains, what is computed again for memory included
    inference_utilisation: Fraction  # share of the GPU's peak in forward passes alone
    cores_per_gpu: Count  # CPU cores that decode images for each GPU
    augmented_per_core: Positive  # images a second that a core decodes and augments
    fixed_per_core: Positive  # images a second that a core decodes for evaluation
    copied_per_core: Positive  # images a second that a core reads from decoded copies (compute.decoded)
    read_gigabytes: Positive  # 10^9 bytes a second that one task reads from the shared file system
    reread_gigabytes: Positive  # 10^9 bytes a second that one task reads once more, where the node has kept the files
    cache_gigabytes: Positive  # 10^9 bytes of files that a node's memory keeps between two readings
