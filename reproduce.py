"""Every stage of one experiment, on this machine:  python reproduce.py experiment=demo

Fine-tunes the sweep, evaluates it, makes soups and ensembles, evaluates those, writes tables and figures. What is done
is skipped, so a second call takes seconds and a killed one continues. The stages are also commands of their own:
python -m finetune, python -m eval, python -m soups, python -m analysis, each with the same experiment=...

On a SLURM cluster:  python reproduce.py experiment=table3_clip_b32 cluster=slurm_1gpu
Prints the jobs that are left and their sbatch lines; with submit=true it sends them. slurm/README.md tells more.
"""

import shlex
import sys
import time
from collections.abc import Sequence

import configs.first_contact  # noqa: F401 - says in one line what is not installed, so it comes before what may be not

# isort: split
from configs.cli import entry_point, parts_as_typed, record_words
from configs.errors import UserError
from configs.registered import ROOT
from configs.schema import Experiment
from store.again import printed_before


def missing_data(parts: Sequence[Experiment]) -> list[str]:
    """A line for each data set that experiments need and whose folder is not on this machine."""
    lines: dict[str, None] = {}
    for part in parts:
        task, place = part.task, part.cluster.stage or part.task.folder
        on_hub = task.kind in ("parquet", "glue") and not place.is_absolute()  # a name there, not a folder
        if not on_hub and not (ROOT / place).exists():
            missing = f"MISSING DATA: {place} ({task.name}) is not on this machine"
            lines[f"{missing}: docs/datasets.md says where to get it, task.folder=DIR names another place"] = None
    return list(lines)


def run_parts(whole: Experiment, typed: Sequence[str]) -> None:
    """All stages of each experiment that another is made of, one after the other."""
    started, parts = time.monotonic(), parts_as_typed(whole, typed)
    for part, words in parts:
        if not part.towers:  # made of other experiments' models, and drawn by python -m analysis
            run(part, words)
    print(f"{whole.name}: {len(parts)} experiments, {time.monotonic() - started:.0f} s. Next:")
    print(f"  python -m analysis artefact=all {shlex.join(typed)}")


def run(config: Experiment, typed: Sequence[str] | None = None) -> None:
    """All stages, of every replicate where the experiment has some; then a sentence, where to look and what is next.

    Args:
        config: of the experiment.
        typed: the words that make it; None: those of the command line.
    """
    words = sys.argv[1:] if typed is None else list(typed)
    if config.recipe:
        raise UserError(f"recipe={config.recipe} is for python -m soups: here type recipes=[{config.recipe}]")
    if config.cluster.kind == "slurm":
        parts = parts_as_typed(config, words)
        if config.submit:
            for part, typed_for_it in parts:
                record_words(part, typed_for_it)
        from slurm.submit import reproduce  # noqa: PLC0415 - as below

        reproduce(parts)
        for line in missing_data([part for part, _ in parts]):
            print(line)
        return
    if config.parts:
        run_parts(config, words)
        return
    printed = printed_before(config, words)
    if printed is not None:
        print(f"{config.name} is finished, and nothing has changed since. It said:\n\n{printed}")
        return
    # Imported here: plans for a cluster, --help, mistyped settings and a second call need not wait for the models'
    # libraries.
    from analysis.pipeline import run_here  # noqa: PLC0415
    from analysis.released import published_instead, write_instead  # noqa: PLC0415

    if published_instead(config):
        print(*write_instead(config), sep="\n")
    else:
        run_here(config, words)


if __name__ == "__main__":
    entry_point(run, whole=True)()
