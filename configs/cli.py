"""What every entry point does before and after its work: Hydra, the closed config, and errors in one line.

Exit statuses: 0, done; 1, a bug, with its traceback, or the no of a command that answers yes or no (soups.verify);
2, wrong words, settings, data or files, no room, or a package that is not installed; 128 + n, ended by signal n, so 130
by Ctrl-C.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from configs.errors import InterruptedBySignalError, UserError
from configs.exporting import Export, parse_export
from configs.schema import CONFIGS, Experiment, OwnPool, load, parse, parse_own
from configs.slurm import requeueing

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
OWN = ("analysis", "benchmarks", "configs", "eval", "finetune", "models", "slurm", "soups", "store", "tasks")


def refuse(line: str) -> None:
    """End with a line on stderr and status 2."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def one_line_errors(work: Callable[[], None]) -> None:
    """Run `work`; what its user can mend becomes one line on stderr and exit status 2, Ctrl-C status 130.

    That is a `UserError`, a full or forbidden disk, or a package that is not installed.

    A stage that a signal asked to end, and that has saved its state, ends with status 128 + the signal's number.
    """
    try:
        work()
    except UserError as error:
        refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in OWN:
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


def parts_of(config: Experiment, typed: Sequence[str]) -> list[Experiment]:
    """The experiments that one is made of, each with what was typed beside `experiment` and `artefact`; or itself.

    Args:
        config: of the experiment that was named.
        typed: overrides of the command line.
    """
    own = ("experiment", "artefact", "parts")
    shared = [override for override in typed if override.split("=")[0].lstrip("+~") not in own]
    return [load(name, *shared) for name in config.parts] or [config]


def typed_right(main: Callable[[], None]) -> Callable[[], None]:
    """A `main` of Hydra whose complaints about what was typed are one line and status 2, not several and status 1."""

    def checked() -> None:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # it raises, in place of printing and ending
        try:
            main()
        except MissingConfigException as error:
            refuse(_unknown(error))
        except (HydraException, OmegaConfBaseException) as error:
            refuse(f"{_first(str(error))}; --help says what there is")

    return checked


def _first(message: str) -> str:
    """The lines of Hydra's message that say what is wrong, without its advice, which closed settings would refuse."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines[0].startswith("Could not override"):
        return f"there is no setting {lines[0].split(chr(39))[1]}"
    return "; ".join(lines[:2])


def _unknown(error: MissingConfigException) -> str:
    """A file of a group that is not there, and those whose names are like it."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or [])
    if not group or not options:
        return str(error).splitlines()[0]
    near = get_close_matches(name, options, n=3, cutoff=0.4) or sorted(options)[:3]
    return f"there is no {group}={name}, but {', '.join(near)}; all are in configs/{group}"


def entry_point(stage: Callable[[Experiment], None]) -> Callable[[], None]:
    """The `main` of a stage: compose configs/config.yaml with the command line, freeze it and run `stage`.

    In a SLURM job, SIGUSR1 makes the stage save and requeue itself, SIGTERM makes it save and end.
    """

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def main(cfg: DictConfig) -> None:
        def work() -> None:
            config = parse(cfg, HydraConfig.get().overrides.task)
            with requeueing(config.cluster.restarts):
                stage(config)

        one_line_errors(work)

    return typed_right(main)


def own_pool_entry_point(stage: Callable[[OwnPool], None]) -> Callable[[], None]:
    """The same for files of one's own: compose configs/own.yaml, which knows no experiment."""

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="own")
    def main(cfg: DictConfig) -> None:
        one_line_errors(lambda: stage(parse_own(cfg)))

    return typed_right(main)


def export_entry_point(stage: Callable[[Export], None]) -> Callable[[], None]:
    """The same for a finished soup: compose configs/export.yaml."""

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="export")
    def main(cfg: DictConfig) -> None:
        one_line_errors(lambda: stage(parse_export(cfg)))

    return typed_right(main)
