"""A run's place on disk is its identity: experiment and row, never the clock.

runs/<name>/ingredients/<iii>/   config.json  metrics.jsonl  state.pt  weights.safetensors  done.json   (one writer)
runs/<name>/zero_shot/           weights.safetensors  done.json
runs/<name>/manifest.csv         rebuilt from the done.json files, never edited
runs/<name>/logits/<split>/      <key>.npy, written once
runs/<name>/midpoints/<split>/   <key>.npy, what the mean of two models answers (Figures 3 and 4)
runs/<name>/landscape/<split>/   <key>.npy, what all points of a plane answer on some examples (Figures 2 and J.1)
runs/<name>/soups/<recipe>/      weights.safetensors  journal.jsonl  soup.json
runs/<name>/analysis/            tables and figures
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from configs.errors import UserError
from configs.schema import Experiment
from store.atomic import read_json, replacing, write_json
from store.weights import load_weights


def digest_of(value: Any) -> str:
    """32 hex digits that name a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


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


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; the lock goes with the process, however it dies.

    What a killed writer left half-written under a temporary name is deleted.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder} is being written by {holder}: wait for it, or stop it and run again") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        for half_written in folder.glob(".*.tmp*"):
            half_written.unlink()
        yield


def score_of(held_out: dict[str, Any]) -> float:
    """What a record of a model says of held-out: its score by the task's metric, else the share of right answers."""
    return held_out["score"] if "score" in held_out else held_out["correct"] / held_out["n"]


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
        return load_weights(self.folder / "weights.safetensors", self.digest)


def finished(folder: Path, identity: str) -> dict[str, Any] | None:
    """The folder's done.json if its work is done, None if it is not.

    Raises:
        UserError: it is done, but with other settings.
    """
    path = folder / "done.json"
    if not path.exists():
        return None
    done = read_json(path)
    if done["identity"] != identity:
        raise UserError(
            f"{folder} was made with other settings than these (its config.json has them): "
            "give this experiment another name, e.g. name=demo_mine, or delete that folder"
        )
    return done


def read_pool(run: RunFolder, rows: int) -> list[Ingredient]:
    """Every row from 0 to `rows`, in order.

    Raises:
        UserError: some are not done; the message lists them.
    """
    pool, missing = [], []
    for row in range(rows + 1):
        folder = run.ingredient(row)
        if not (folder / "done.json").exists():
            missing.append(row)
            continue
        done = read_json(folder / "done.json")
        pool.append(
            Ingredient(
                row=row,
                folder=folder,
                digest=done["digest"] or "",
                drawn=done["drawn"],
                held_out=done["held_out"],
                status=done["status"],
                seconds=done["seconds"],
            )
        )
    if missing:
        raise UserError(f"rows {missing} of {run.root} are not finished: run python -m finetune for them first")
    return pool


def write_manifest(run: RunFolder, pool: list[Ingredient]) -> Path:
    """runs/<name>/manifest.csv: row, drawn values, digest, held-out score, seconds."""
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
        for ingredient in pool
    )
    path = run.root / "manifest.csv"
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)
    return path


def record_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the settings beside the work they belong to."""
    write_json(folder / "config.json", config)
