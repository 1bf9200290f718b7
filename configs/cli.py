"""What every entry point does before and after its work: Hydra, the closed config, and errors in one line."""

import errno
import sys
from collections.abc import Callable, Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from configs.errors import InterruptedBySignalError, UserError
from configs.schema import CONFIGS, Experiment, OwnPool, load, parse, parse_own
from configs.slurm import requeueing


def one_line_errors(work: Callable[[], None]) -> None:
    """Run `work`; a `UserError` or a full disk becomes one line on stderr and exit status 2, Ctrl-C status 130.

    A stage that a signal asked to end, and that has saved its state, ends with status 128 + the signal's number.
    """
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except InterruptedBySignalError as error:
        print("interrupted by a signal, and saved: run the same command again to continue", file=sys.stderr)
        sys.exit(128 + error.signum)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: no space left on the disk of {error.filename}: free some and run again", file=sys.stderr)
        sys.exit(2)
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

    return main


def own_pool_entry_point(stage: Callable[[OwnPool], None]) -> Callable[[], None]:
    """The same for files of one's own: compose configs/own.yaml, which knows no experiment."""

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="own")
    def main(cfg: DictConfig) -> None:
        one_line_errors(lambda: stage(parse_own(cfg)))

    return main
