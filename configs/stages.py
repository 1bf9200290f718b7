"""Settings of tables and figures, of the export, of machines, and of where things are written."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.fields import Count, Fraction, Natural, Needs, NonNegative, Positive, closed

Target = Literal["timm", "open_clip", "transformers", "onnx"]
TIME = r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$"  # days-hours:minutes:seconds
Time = Annotated[str, Field(pattern=TIME)]


@closed
class Angles:
    """Figure 3: fine-tuned models that differ in one thing, in pairs."""

    # angles are over matrices and convolutions of the blocks (Appendix J.1's "repeated weights"), these with gains and
    # biases, or all parameters
    weights: Literal["repeated", "blocks", "all"] = "repeated"
    below_lr: Positive | None = None  # leave out models of this learning rate and above, the paper's 1e-4; null: none
    several: bool = False  # also pairs that differ in more than one thing


@closed
class Pairs:
    """Figure 4: random pairs of fine-tuned models."""

    count: Count = 100  # how many at most; a larger number keeps the pairs of a smaller one


@closed
class Plane:
    """Figures 2 and J.1: the error landscape in planes through the initialisation and two fine-tuned models."""

    rows: Annotated[tuple[tuple[Count, Count], ...], Field(min_length=1)] = ((1, 2), (1, 3))  # two models of each plane
    size: Annotated[int, Field(ge=3)] = 15  # points on the axis along which the models reach less far
    longest: Annotated[int, Field(ge=3)] = 15  # and at most on the other, which has as many as its spacing then needs
    margin: NonNegative = 0.25  # around the three models, as a share of how far they reach on each axis
    train_examples: Count = 10_000  # on which the training loss is measured, under the transform of evaluation
    chunk: Count = 1024  # examples that are read together for all points, between two saves


@closed
class Theory:
    """Figure K.1: approximation (1) against the truth, in the pairs of Appendix K.4."""

    # those of the rows that pairs are made of; four panels leave out the highest
    learning_rates: tuple[Positive, ...] = (1e-4, 1e-5, 1e-6)
    alphas: Annotated[int, Field(ge=5)] = 11  # equidistant, 0 and 1 among them
    # how the loss bends along a pair, from the losses at neighbouring alphas, or by second derivatives of the network,
    # which must be smooth (no relu)
    curvature: Literal["differences", "exact"] = "exact"


@closed
class Analysis:
    """How tables state their uncertainty, and what figures measure."""

    resamples: Count = 10_000  # how many the paired bootstrap takes
    bins: Count = 15  # for calibration errors, with as many examples in each; how many the paper has is not known
    oracle: bool = False  # a row with the best individual model on each test set, labelled so, as in Table 4
    seed: int = 0
    note: str = ""  # a sentence that captions end with, on what to keep in mind of these models
    labels: tuple[str, ...] = ()  # names of the rows 1, 2, ... in a table of rows; the first is its baseline
    sets: dict[str, tuple[Count, ...]] = Field(default_factory=dict)  # rows whose soup and ensemble join that table
    angles: Angles
    pairs: Pairs
    plane: Plane
    theory: Theory


@closed
class Export:
    """Which soup, for which library, where to."""

    soup: Path  # runs/<name>/soups/<recipe> or runs/<name>/ingredients/<iii>
    to: Target  # the library that is to load it
    out: Path  # a folder that is not there yet
    license: Annotated[str, Field(pattern=r"^[a-z0-9.\-]+$")] = "other"  # the weights' licence, in the hub's words
    classes: tuple[str, ...] | None = None  # names by class id, where the data that have them are not here

    @model_validator(mode="after")
    def can_be_written(self) -> "Export":
        """An export never lands inside the soup that it is made from."""
        if self.out.resolve() == self.soup.resolve():
            raise ValueError("out=FOLDER is the soup itself")
        return self


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


@closed
class Paths:
    """Where things are written."""

    runs: Path = Path("runs")  # run folders: runs/<name>/...
    results: Path | None = None  # also copy tables and scores here (results/measured holds the committed ones)


@closed
class Tracking:
    """configs/tracking/*.yaml: where metrics go beside metrics.jsonl."""

    kind: Literal["none", "wandb"]
    every: Count  # steps between two points of the loss curve
    project: str | None = None  # the project on W&B
    entity: Annotated[str | None, Needs("tracking.kind", "wandb")] = None  # user or team
    # offline: `wandb sync` sends it later
    mode: Annotated[Literal["online", "offline"], Needs("tracking.kind", "wandb")] = "online"

    @model_validator(mode="after")
    def wandb_has_a_project(self) -> "Tracking":
        """W&B sorts runs by project."""
        if (self.kind == "wandb") != (self.project is not None):
            raise ValueError("tracking.kind=wandb and tracking.project belong together")
        return self
