"""A run's place on disk is its identity: experiment and row, never the clock.

runs/<name>/ingredients/<iii>/   config.json  metrics.jsonl  state.pt  weights.safetensors  done.json   (one writer);
                                 trained.json in the place of done.json where training is over and scoring is not
runs/<name>/zero_shot/           weights.safetensors  done.json
runs/<name>/manifest.csv         rebuilt from the done.json files, never edited
runs/<name>/logits/<split>/      <key>.npy, written once
runs/<name>/features/<split>/<key>/  00000.npy ..., what a linear probe is fitted to, so many examples a file
runs/<name>/probe/<key>/         its head for each value of C, and the fit that is going on
runs/<name>/midpoints/<split>/   <key>.npy, what the mean of two models answers (Figures 3 and 4)
runs/<name>/landscape/<split>/   <key>.npy, what all points of a plane answer on some examples (Figures 2 and J.1)
runs/<name>/soups/<recipe>/      weights.safetensors  journal.jsonl  soup.json
runs/<name>/analysis/            tables and figures
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pandas as pd
from torch import Tensor

from configs.errors import UserError
from configs.schema import Experiment
from soups.files.atomic import read_json, replacing
from soups.files.weights import load_weights
from store.rows import identity, score_of

RAW = "raw"  # weights as the optimiser leaves them
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """All paths of one experiment."""

    root: Path

    @classmethod
    def of(cls, config: Experiment) -> "RunFolder":
        """The folder of an experiment."""
        return cls(config.paths.runs / config.name)

    def ingredient(self, row: int) -> Path:
        """The folder of a sweep's row."""
        return self.root / "ingredients" / f"{row:03d}"

    def is_done(self, row: int) -> bool:
        """Whether a row is finished, with whatever settings."""
        return (self.ingredient(row) / "done.json").exists()

    @property
    def zero_shot(self) -> Path:
        """The folder of the zero-shot model."""
        return self.root / "zero_shot"

    def soup(self, recipe: str) -> Path:
        """The folder of a recipe's soup or ensemble."""
        return self.root / "soups" / recipe

    @property
    def analysis(self) -> Path:
        """Tables and figures."""
        return self.root / "analysis"


def lock(file: IO[str], remedy: str, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process dies; False where another has it and nobody waits.

    Where its file system has no locks, a UserError says `remedy`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{file.name} cannot be locked ({error.strerror}): {remedy}") from None
    return True


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for one process, however it dies; a UserError where another holds it or no file can be locked."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        if not lock(file, "type paths.runs=FOLDER of a file system with locks, or have this one mounted with flock"):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder} is being written by {holder}: wait for it, or stop it and run again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        for half_written in folder.glob(".*.tmp*"):
            delete_path(half_written)
        yield


def delete_path(path: Path) -> None:
    """Delete a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def weights_of(done: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind of weights -> its file and its record (digest, held_out); the ingredient of soups comes first."""
    beside = {kind: (f"{kind}.safetensors", made) for kind, made in done.get("variants", {}).items()}
    return {done.get("ingredient", RAW): (WEIGHTS, done)} | beside


@dataclass(frozen=True)
class Ingredient:
    """A fine-tuned model of the pool, as its done.json describes it."""

    row: int
    folder: Path
    digest: str  # of the weights; empty where it diverged
    drawn: dict[str, Any]
    held_out: dict[str, Any]  # correct and n, and score where the task has another metric than top-1
    status: str  # "done", or "diverged"
    seconds: float
    kind: str = RAW  # of the weights: raw, swa, or ema_<decay>
    file: str = WEIGHTS

    @property
    def held_out_score(self) -> float:
        """By the task's metric; what recipes sort by."""
        return score_of(self.held_out)

    @property
    def usable(self) -> bool:
        """Whether training ended with finite weights."""
        return self.status == "done"

    def load(self) -> dict[str, Tensor]:
        """The weights, checked against the digest recorded when they were written."""
        return load_weights(self.folder / self.file, self.digest)

    def kinds(self) -> dict[str, "Ingredient"]:
        """Every kind of weights that the row left, by its name: this one, and those beside it."""
        found = weights_of(read_json(self.folder / "done.json"))
        return {
            kind: replace(self, kind=kind, file=file, digest=made["digest"], held_out=made["held_out"])
            for kind, (file, made) in found.items()
        }


DONE = "done.json"  # written last
TRAINED = "trained.json"  # stands between training and scoring: the weights are on disk


def finished(folder: Path, identity: str, record: str = DONE) -> dict[str, Any] | None:
    """The folder's done.json, or another `record`; None where it is not there, a UserError if of other settings."""
    path = folder / record
    if not path.exists():
        return None
    done = read_json(path)
    if done["identity"] != identity:
        raise _foreign(f"{folder} was")
    return done


def _foreign(what: str) -> UserError:
    return UserError(
        f"{what} made with other settings than these (config.json beside the weights has them): give this experiment "
        "another name, e.g. name=demo_mine, or delete what is there"
    )


def done_row(config: Experiment, row: int) -> dict[str, Any] | None:
    """The done.json of a row of an experiment, None where it is not finished; raises as `finished`."""
    return finished(RunFolder.of(config).ingredient(row), identity(config, row))


def done_rows(config: Experiment) -> dict[int, dict[str, Any]]:
    """Row -> done.json of the rows that are finished; a UserError lists all that were made with other settings."""
    run = RunFolder.of(config)
    rows = [row for row in range(config.sweep.size + 1) if run.is_done(row)]
    done = {row: read_json(run.ingredient(row) / DONE) for row in rows}
    foreign = [row for row in rows if done[row]["identity"] != identity(config, row)]
    if foreign:
        many = f"rows {', '.join(map(str, foreign))} of {run.root} were"
        raise _foreign(many if len(foreign) > 1 else f"{run.ingredient(foreign[0])} was")
    return done


def read_pool(config: Experiment) -> list[Ingredient]:
    """Every row of a sweep, from 0 on; a UserError lists those that are not done, or made with other settings."""
    run, done = RunFolder.of(config), done_rows(config)
    missing = [row for row in range(config.sweep.size + 1) if row not in done]
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise UserError(f"rows {listed} of {run.root} are not finished: run python -m finetune for them first")
    pool = []
    for row, each in done.items():
        digest, kind = each["digest"] or "", each.get("ingredient", RAW)
        recorded = {name: each[name] for name in ("drawn", "held_out", "status", "seconds")}
        pool.append(Ingredient(row, run.ingredient(row), digest, kind=kind, **recorded))
    return pool


def write_manifest(config: Experiment) -> None:
    """runs/<name>/manifest.csv: row, drawn values, digest, held-out score, seconds; raises as `read_pool`."""
    table = pd.DataFrame(
        {
            "row": ingredient.row,
            **ingredient.drawn,
            "digest": ingredient.digest,
            "held_out_top1": ingredient.held_out["correct"] / ingredient.held_out["n"],
            "held_out_n": ingredient.held_out["n"],
            **({"held_out_score": ingredient.held_out_score} if "score" in ingredient.held_out else {}),
            "status": ingredient.status,
            "seconds": ingredient.seconds,
        }
        for ingredient in read_pool(config)
    )
    with replacing(RunFolder.of(config).root / "manifest.csv") as temporary:
        table.to_csv(temporary, index=False)
