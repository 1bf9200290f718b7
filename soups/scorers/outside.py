"""The user's score: a command that prints a number, or a function."""

import importlib
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from soups.candidates import Candidate
from soups.errors import UserError
from soups.files.tables import read_text
from soups.scoring import Scored, Scorer, key_of, mean_of_answers, scored
from soups.selection import Goal

PLACE = "{soup}"


def number_in(output: str, name: str) -> float:
    """The number that is the last line of what a command printed.

    >>> number_in("loading ...\\n0.8125\\n", "a.pt")
    0.8125
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    try:
        value = float(lines[-1])
    except (IndexError, ValueError):
        last = f"its last line is {lines[-1][:80]!r}" if lines else "it printed nothing"
        raise UserError(f"--score on {name}: {last}, not a number: print the score alone as the last line") from None
    if math.isnan(value):
        raise UserError(f"--score on {name}: the score is NaN: leave that model out, or mend the score")
    return value


def results_in(path: Path, metric: str | None) -> tuple[list[Any], str]:
    """A number for each example, and what names the examples, of a .jsonl that a scoring command wrote.

    A line is a number; or an object as EleutherAI's harness logs samples, with "doc_id" and the names of its "metrics",
    which is put in the order of "doc_id". Where it has several metrics or filters `metric` says which: acc_norm, or
    exact_match,strict-match.
    """
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: no JSON in a line ({error})") from None
    if rows and all(isinstance(row, (int, float)) for row in rows) and metric is None:
        return rows, ""
    if not (rows and all(isinstance(row, dict) for row in rows)):
        named = "" if metric is None else f" with {metric!r}"
        raise UserError(f"{path}: need a line for each example: a number, or an object{named} as lm_eval logs samples")
    columns: dict[str, list[tuple[Any, Any]]] = {}
    for place, row in enumerate(rows):
        example = [row.get("doc_id", place), row.get("doc_hash", "")]
        for name in row.get("metrics", [metric] if metric else []):
            column = f"{name},{row['filter']}" if "filter" in row else name
            columns.setdefault(column, []).append((example, row.get(name)))
    chosen = [name for name in columns if metric in (None, name, name.partition(",")[0])]
    if len(chosen) != 1:
        has = ", ".join(columns) or 'no "metrics"'
        raise UserError(f"{path} has {has}: name one of them by --metric NAME")
    found = sorted(columns[chosen[0]], key=lambda each: each[0])
    strange = [value for _, value in found if not isinstance(value, (int, float))]
    if strange:
        raise UserError(f"{path}: {chosen[0]} is {strange[0]!r} in a line, not a number")
    return [value for _, value in found], key_of([example for example, _ in found])


def _with_results(number: float, path: Path, metric: str | None, name: str) -> Scored:
    """The score that a command printed, made of the number of each example that it wrote."""
    values, examples = results_in(path, metric)
    found = scored(np.array(values), name)
    exponent = Decimal(repr(number)).as_tuple().exponent
    places = min(max(3, -exponent if isinstance(exponent, int) else 3), 6)  # it may be rounded, or a sum of float32
    if found.value != number and not abs(found.value - number) <= 0.5 * 10**-places + 1e-6 * abs(found.value):
        raise UserError(
            f"--score on {name}: the command printed {number:.8g}, and the mean of the {len(values)} numbers in "
            f"{path.name} is {found.value:.8g}: print their mean"
        )
    return Scored(found.value, found.answers, examples)


def _filled(command: str, path: Path) -> str:
    quoted = shlex.quote(str(path))
    for place in (f"'{PLACE}'", f'"{PLACE}"', PLACE):
        command = command.replace(place, quoted)
    return command


def of_command(command: str, goal: Goal, metric: str | None = None) -> Scorer:
    """A shell command in which {soup} stands for a file or folder, in the form that the ingredients have.

    Where it writes {soup}.jsonl, the numbers of single examples are read from there (`results_in`).

    The key holds the command and the content of every file that it names; not what those files read or import.
    Started by torchrun, the command of each process sees that process's GPU alone.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--score {command!r}: {error}") from None
    if PLACE not in command:
        raise UserError(f"--score {command!r}: write {PLACE} where the file to be scored stands")
    environment = dict(os.environ)
    if "LOCAL_RANK" in environment and "CUDA_VISIBLE_DEVICES" not in environment:
        environment["CUDA_VISIBLE_DEVICES"] = environment["LOCAL_RANK"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # of torchrun: the command is one process

    def measure(candidate: Candidate) -> Scored:
        path = candidate.file()
        results = path.with_name(f"{path.name}.jsonl")
        results.unlink(missing_ok=True)  # of an earlier command
        call = ["sh", "-c", _filled(command, path)]
        ended = subprocess.run(call, capture_output=True, text=True, errors="replace", env=environment, check=False)
        if ended.returncode:
            sys.stderr.write(ended.stderr)
            last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"--score on {candidate.name}: the command ended with status {ended.returncode}: {last}")
        number = number_in(ended.stdout, candidate.name)
        if results.exists():
            return _with_results(number, results, metric, candidate.name)
        if metric is not None:
            raise UserError(f"--metric {metric}: the command did not write {results.name}")
        return Scored(number)

    files = [Path(word) for word in words if PLACE not in word and Path(word).is_file()]
    return Scorer(measure, goal, metric or "score", key_of("command", command, *files), mean_of_answers)


def function_named(name: str) -> Callable[..., Any]:
    """The function of `module:function`, found from the current folder on; a UserError where there is none."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:  # noqa: PTH109
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name}: {error}; write module:function, of a module in this folder or installed") from None
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}, not a function")
    return found


def _carried(function: Any) -> list[str]:
    """What a function or its object has beside code, as numbers, texts and arrays; of other things their kind."""
    holder = getattr(function, "__self__", function)
    values = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    values += [*(getattr(function, "__defaults__", None) or ()), *getattr(holder, "__dict__", {}).values()]
    values += [*function.args, *function.keywords.values()] if isinstance(function, partial) else []
    told = (str, bytes, int, float, Path, slice, range)
    return [str(each) if isinstance(each, told) or hasattr(each, "shape") else type(each).__name__ for each in values]


def code_of(function: Callable[..., Any]) -> str:
    """Names a function, the file that it stands in and what it was made with; other files that it uses are not seen."""
    carried = [] if inspect.isbuiltin(function) else _carried(function)
    if isinstance(function, partial):
        return key_of(code_of(function.func), carried)
    where = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a class instance or a builtin
        file = inspect.getsourcefile(type(function)) if not inspect.isbuiltin(function) else None
    return key_of(where, *([Path(file)] if file and Path(file).is_file() else []), *([carried] if carried else []))


def of_function(function: Callable[..., Any], goal: Goal) -> Scorer:
    """A function of a state dict (a mapping that reads each tensor when it is asked for) to a number.

    It may return one number for each example: their mean is the score, and the gain gets an interval.
    """
    return Scorer(
        lambda candidate: scored(function(candidate.weights()), candidate.name),
        goal,
        "score",
        key_of("function", code_of(function)),
        mean_of_answers,
    )


def scorer_of(score: str | Callable[..., Any] | Scorer, goal: Goal | None, metric: str | None = None) -> Scorer:
    """A command, `module:function`, a function, or a scorer that is one already; `metric` is of a command."""
    if isinstance(score, Scorer):
        return score
    if goal not in ("max", "min"):
        got = "" if goal is None else f"; got {goal!r}"
        raise UserError(f"say whether the score is to be high or low: --goal max or --goal min (goal= in Python){got}")
    if not isinstance(score, str):
        return of_function(score, goal)
    is_name = PLACE not in score and " " not in score.strip() and ":" in score
    if not is_name:
        return of_command(score, goal, metric)
    if metric is not None:
        raise UserError(f"--metric is for a command that writes {PLACE}.jsonl, and {score} is a function")
    return of_function(function_named(score), goal)
