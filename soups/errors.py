"""The one exception that means: the input is wrong and its message says what to do; commands print it alone."""

import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
PACKAGES = (  # packages of this repository, whose absence is a bug
    *("analysis", "benchmarks", "configs", "embedded", "eval", "finetune"),
    *("models", "slurm", "soups", "store", "tasks"),
)


class UserError(RuntimeError):
    """Wrong input, data or files: one sentence naming the culprit and the remedy, which commands print alone."""


class InterruptedBySignalError(BaseException):
    """A signal asked for an end; what was done is on disk, and the same command continues.

    Like KeyboardInterrupt it is no `Exception`, which libraries catch and take for a failure of their own.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def one_of(name: str, value: Any, *known: str) -> None:
    """Raise UserError where a setting is none of a few words."""
    if value not in known:
        raise UserError(f"{name}={value!r}: write {', '.join(known[:-1])} or {known[-1]}")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def refuse(line: str) -> NoReturn:
    """End with a line on stderr and status 2."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def one_line_errors(work: Callable[[], None], *, several: bool = False) -> None:
    """Run `work`; what its user can mend becomes one line on stderr and exit status 2, Ctrl-C status 130.

    A stage that a signal asked to end ends with status 128 + the signal's number; so does one whose output nobody reads
    any more, as `| head` leaves it, without a word.

    With `several`, processes that torchrun started share the work; else they would overwrite each other's files.
    """
    try:
        if not several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "this command is one process: start it with python, not with torchrun, whose processes share the work "
                "of python -m finetune, python -m eval, and soups greedy, random-order, with-replacement and learned"
            )
        work()
        sys.stdout.flush()
    except UserError as error:
        refuse(str(error))
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not any(events & select.POLLERR for _, events in output.poll(0)):
            raise  # another pipe's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
        sys.exit(128 + signal.SIGPIPE)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in PACKAGES:
            raise
        refuse(f"the package {error.name} is not installed: run `make setup`, or pip install -r requirements.txt")
    except InterruptedBySignalError as error:
        print("interrupted by a signal, and saved: run the same command again to continue", file=sys.stderr)
        sys.exit(128 + error.signum)
    except OSError as error:
        if error.errno in FULL:
            refuse(f"no space left on the disk of {error.filename}: free some and run again")
        if error.errno in FORBIDDEN and error.filename:
            refuse(f"{error.filename} cannot be read or written ({error.strerror}): name another place, or change that")
        raise
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
