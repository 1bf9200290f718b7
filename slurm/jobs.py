"""The jobs that an experiment still needs, in order, and the sbatch line of each."""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.clusters import Slurm
from configs.errors import UserError
from configs.schema import Experiment, replicate
from eval.pool import is_scored
from finetune.rows import identity, teachers
from soups.cook import ENSEMBLES, dishes, identity_of
from soups.pool import ingredients_of
from store.atomic import read_json
from store.runs import RunFolder, finished

ROWS = ("initialise", "fine-tune", "distil")  # stages that train
OWN = (
    "submit",
    "sweep.index",
    "share.of",
    "share.index",
    "recipe",
)  # settings of the command line that are not the jobs'


@dataclass(frozen=True)
class Job:
    """One call of sbatch."""

    stage: str
    script: str  # of slurm/
    name: str  # of the experiment, which may be one of several replicates
    tasks: tuple[int, ...]  # indices of the array that are left to do; empty: a job without an array
    of: int  # how many indices there are with those that are done
    after: tuple[str, ...]  # stages, or job ids, that must be finished
    options: tuple[str, ...]  # of sbatch, without dependencies
    settings: tuple[str, ...]  # of python


def compact(indices: Iterable[int]) -> str:
    """Array indices as sbatch takes them.

    >>> compact([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def slurm_of(config: Experiment) -> Slurm:
    """What its jobs ask for.

    Raises:
        UserError: the experiment's cluster is not one of SLURM.
    """
    if config.cluster.slurm is None:
        raise UserError(
            f"cluster.kind={config.cluster.kind} sends no jobs: choose cluster=slurm_1gpu or a file like it"
        )
    return config.cluster.slurm


def log_folder(config: Experiment) -> Path:
    """Where the jobs of an experiment write what they print."""
    return RunFolder.of(config).root / "slurm" / "logs"


def _options(config: Experiment, stage: str, gpus: int, cpus: int, *, array: bool) -> tuple[str, ...]:
    slurm = slurm_of(config)
    kind = f":{slurm.gpu_type}" if slurm.gpu_type else ""
    limit = slurm.time if stage in ("fine-tune", "distil") else slurm.stage_time
    found = [
        f"--job-name={config.name.replace('/', '-')}-{stage.replace(' ', '-')}",
        f"--output={log_folder(config)}/%x-{'%A_%a' if array else '%j'}.out",
        f"--time={limit}",
        f"--cpus-per-task={cpus}",
        f"--gres=gpu{kind}:{gpus}" if gpus else "--gres=none",
    ]
    for option, value in (
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("mem-per-cpu", slurm.memory),
    ):
        found += [f"--{option}={value}"] if value is not None else []
    return (*found, *slurm.options)


def left_rows(config: Experiment) -> tuple[int, ...]:
    """Rows without a done.json of these settings; raises as `finished`."""
    run = RunFolder.of(config)
    rows = range(config.sweep.size + 1)
    return tuple(row for row in rows if finished(run.ingredient(row), identity(config, row)) is None)


def is_dish_left(config: Experiment, name: str) -> bool:
    """Whether a soup or ensemble is not there, or not of these settings and this pool; all rows must be done."""
    record = RunFolder.of(config).soup(name) / "soup.json"
    if not record.exists():
        return True
    cooked = read_json(record)
    # Of the digest of held-out that it was made with: no image is read.
    digest = cooked["selected_on"]["digest"]
    return cooked["identity"] != identity_of(config, name, ingredients_of(config), digest)


def _trainings(config: Experiment, left: Sequence[int], settings: tuple[str, ...]) -> list[Job]:
    """The initialisation by one GPU, then rows, then those that are distilled from rows."""
    slurm, size = slurm_of(config), config.sweep.size
    several = slurm.gpus > 1 or slurm.nodes > 1
    rows = [row for row in left if row and not teachers(config, row)]
    distilled = [row for row in left if row and teachers(config, row)]
    jobs = []
    one = min(slurm.gpus, 1)
    if 0 in left:
        options = _options(config, "initialise", one, _cpus(slurm), array=True)
        jobs.append(Job("initialise", "finetune", config.name, (0,), 1, (), options, settings))
    for stage, some in (("fine-tune", rows), ("distil", distilled)):
        if not some:
            continue
        options = _options(config, stage, slurm.gpus, slurm.cpus, array=True)
        if several:
            options = (*options, f"--nodes={slurm.nodes}")
        of = sum(bool(teachers(config, row)) == (stage == "distil") for row in range(1, size + 1))
        script = "finetune_multi" if several else "finetune"
        before = {"fine-tune": ("initialise",), "distil": ("initialise", "fine-tune")}[stage]
        jobs.append(Job(stage, script, config.name, tuple(some), of, before, options, settings))
    return jobs


def _cpus(slurm: Slurm) -> int:
    """CPUs of a job with one GPU of several."""
    return max(1, slurm.cpus // max(1, slurm.gpus))


def _is_unscored(folder: Path) -> bool:
    """Whether a model still has to be evaluated, or to be made first; a diverged row has nothing to be evaluated."""
    record = next((path for path in (folder / "done.json", folder / "soup.json") if path.exists()), None)
    return record is None or (read_json(record)["digest"] is not None and not is_scored(folder))


def _evaluation(config: Experiment, settings: tuple[str, ...]) -> list[Job]:
    """Of rows and the zero-shot model, shared in the order of `eval.pool.model_folders`."""
    run = RunFolder.of(config)
    models = [run.ingredient(row) for row in range(config.sweep.size + 1)]
    models += [run.zero_shot] if config.model.templates is not None else []
    of = min(slurm_of(config).evaluate_jobs, len(models))
    unscored = [_is_unscored(folder) for folder in models]
    left = tuple(share for share in range(of) if any(unscored[share::of]))
    return _shared(config, "evaluate", "evaluate", left, of=of, after=ROWS, settings=settings)


def _shared(
    config: Experiment,
    stage: str,
    script: str,
    left: tuple[int, ...],
    *,
    of: int,
    after: tuple[str, ...],
    settings: tuple[str, ...],
) -> list[Job]:
    """An array of jobs with one GPU, if there is one; none where nothing is left."""
    slurm = slurm_of(config)
    options = _options(config, stage, min(slurm.gpus, 1), _cpus(slurm), array=True)
    job = Job(stage, script, config.name, left, of, after, options, (*settings, f"share.of={of}"))
    return [job] if left else []


def _recipes(config: Experiment, settings: tuple[str, ...], *, rows_left: bool) -> list[Job]:
    """A job for each recipe, then the evaluation of what they made."""
    places = tuple(
        place
        for place, recipe in enumerate(config.recipes)
        if rows_left or any(is_dish_left(config, name) for name in dishes(config, recipe))
    )
    number, before = len(config.recipes), (*ROWS, "evaluate")
    jobs = _shared(config, "recipes", "soups", places, of=number, after=before, settings=settings)
    soups = _soups(config)
    of = min(slurm_of(config).evaluate_jobs, len(soups))
    run = RunFolder.of(config)
    left = tuple(range(of)) if places or any(_is_unscored(run.soup(name)) for name in soups) else ()
    return jobs + _shared(config, "evaluate soups", "evaluate", left, of=of, after=("recipes",), settings=settings)


def totals(config: Experiment) -> dict[str, int]:
    """How many jobs each stage of one sweep has in all, with those that are done."""
    size, slurm = config.sweep.size, slurm_of(config)
    distilled = sum(bool(teachers(config, row)) for row in range(1, size + 1))
    models = size + 1 + (config.model.templates is not None)
    found = {"initialise": 1, "fine-tune": size - distilled, "distil": distilled}
    found |= {"evaluate": min(slurm.evaluate_jobs, models), "recipes": len(config.recipes)}
    found |= {"evaluate soups": min(slurm.evaluate_jobs, len(_soups(config))), "analysis": 1}
    return {stage: number for stage, number in found.items() if number}


def _soups(config: Experiment) -> list[str]:
    """What recipes make that has weights of its own."""
    return [name for recipe in config.recipes for name in dishes(config, recipe) if name not in ENSEMBLES]


def jobs_of(config: Experiment, typed: Sequence[str]) -> list[Job]:
    """The jobs that are left to do, each after those that it needs; nothing is written, no image is read.

    Args:
        config: of the experiment; with `replicates`, of all of them.
        typed: the settings of the command line, which the jobs get too.

    Raises:
        UserError: a cluster that is not SLURM; rows that were made with other settings.
    """
    settings = tuple(word for word in typed if word.split("=")[0].lstrip("+~") not in OWN and word[:2] != "--")
    if config.replicates:
        jobs = []
        for sweep_seed in config.replicates:
            once = replicate(config, sweep_seed)
            own = (*settings, f"sweep.seed={sweep_seed}", f"name={once.name}", "replicates=[]")
            jobs += [job for job in _once(once, own) if job.stage != "analysis"]
        return [*jobs, _analysis(config, settings)]
    return _once(config, settings)


def _once(config: Experiment, settings: tuple[str, ...]) -> list[Job]:
    left = left_rows(config)
    jobs = _trainings(config, left, settings) + _evaluation(config, settings)
    jobs += _recipes(config, settings, rows_left=bool(left))
    is_made = (RunFolder.of(config).analysis / "provenance.json").exists()
    return [*jobs, _analysis(config, settings)] if jobs or not is_made else []


def _analysis(config: Experiment, settings: tuple[str, ...]) -> Job:
    """Tables and figures, from what is on disk."""
    options = _options(config, "analysis", 0, _cpus(slurm_of(config)), array=False)
    return Job(
        "analysis", "analysis", config.name, (), 1, (*ROWS, "evaluate", "recipes", "evaluate soups"), options, settings
    )


def sbatch_words(config: Experiment, job: Job, after: Sequence[str]) -> list[str]:
    """The call that sends a job.

    Args:
        config: of the experiment.
        job: one of `jobs_of`.
        after: ids of jobs that must end well before it; as names in a dry run.
    """
    slurm = slurm_of(config)
    words = ["sbatch", "--parsable"]
    if job.tasks:
        at_once = f"%{slurm.max_parallel}" if slurm.max_parallel and job.stage in ("fine-tune", "distil") else ""
        words.append(f"--array={compact(job.tasks)}{at_once}")
    if after:
        words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    return [*words, *job.options, f"slurm/{job.script}.sbatch", *job.settings]


def environment_of(config: Experiment) -> dict[str, str]:
    """The variables that the jobs get, this process's own and the cluster file's.

    What SLURM set for this process is left out, but for where its settings are: sbatch would take it for options.
    """
    slurm = slurm_of(config)
    foreign = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]
    found = {name: value for name, value in os.environ.items() if name not in foreign}
    if slurm.setup is not None:
        found["MODEL_SOUPS_SETUP"] = str(slurm.setup)
    return found | slurm.environment


def shown(words: Sequence[str]) -> str:
    """A call as a shell takes it."""
    return shlex.join(words)
