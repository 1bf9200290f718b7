"""The user's score: a command that prints a number, or a function."""

import importlib
import inspect
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soups.candidates import Candidate
from soups.errors import UserError
from soups.scoring import Scored, Scorer, key_of, mean_of_answers, scored
from soups.selection import Goal

PLACE = "{soup}"


def number_in(output: str, name: str) -> float:
    """The number that is the last line of what a command printed.

    Raises:
        UserError: there is none, or it is NaN.

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


def _filled(command: str, path: Path) -> str:
    quoted = shlex.quote(str(path))
    for place in (f"'{PLACE}'", f'"{PLACE}"', PLACE):
        command = command.replace(place, quoted)
    return command


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"--score {command!r}: {error}") from None


def of_command(command: str, goal: Goal) -> Scorer:
    """A shell command in which {soup} stands for a file or folder, in the form that the ingredients have.

    The key holds the command and the content of every file that it names; not what those files read or import.
    Started by torchrun, the command of each process sees that process's GPU alone.

    Raises:
        UserError: {soup} is not in it; or, when measuring, it fails or its last line is no number.
    """
    words = _words(command)
    if PLACE not in command:
        raise UserError(f"--score {command!r}: write {PLACE} where the file to be scored stands")
    environment = dict(os.environ)
    if "LOCAL_RANK" in environment and "CUDA_VISIBLE_DEVICES" not in environment:
        environment["CUDA_VISIBLE_DEVICES"] = environment["LOCAL_RANK"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # of torchrun: the command is one process

    def measure(candidate: Candidate) -> Scored:
        call = ["sh", "-c", _filled(command, candidate.file())]
        ended = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
        if ended.returncode:
            sys.stderr.write(ended.stderr)
            last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"--score on {candidate.name}: the command ended with status {ended.returncode}: {last}")
        return Scored(number_in(ended.stdout, candidate.name))

    files = [Path(word) for word in words if PLACE not in word and Path(word).is_file()]
    return Scorer(measure, goal, "score", key_of("command", command, *files))


def function_named(name: str) -> Callable[..., Any]:
    """The function of `module:function`, found from the current folder on.

    Raises:
        UserError: no such module or function.
    """
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


def code_of(function: Callable[..., Any]) -> str:
    """Names a function and the content of the file that it stands in; other files that it uses are not seen."""
    where = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a class instance or a builtin
        file = inspect.getsourcefile(type(function)) if not inspect.isbuiltin(function) else None
    return key_of(where, Path(file)) if file and Path(file).is_file() else key_of(where)


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


def scorer_of(score: str | Callable[..., Any] | Scorer, goal: Goal | None) -> Scorer:
    """A command, `module:function`, a function, or a scorer that is one already.

    Raises:
        UserError: it is none of these, or nobody said whether it is to be high or low.
    """
    if isinstance(score, Scorer):
        return score
    if goal is None:
        raise UserError("say whether the score is to be high or low: --goal max or --goal min (goal= in Python)")
    if not isinstance(score, str):
        return of_function(score, goal)
    is_name = PLACE not in score and " " not in score.strip() and ":" in score
    return of_function(function_named(score), goal) if is_name else of_command(score, goal)
