"""What every entry point does before and after its work: Hydra, the closed config, and errors in one line.

Exit statuses: 0, done; 1, a bug, with its traceback, or the no of a command that answers yes or no (soups.verify);
2, wrong words, settings, data or files, no room, or a package that is not installed; 128 + n, ended by signal n, so 130
by Ctrl-C.
"""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import UserError
from configs.help import GROUPS, command_help, mentions, nearest, nearest_setting, options_of, settings_of, topic_help
from configs.registered import CONFIGS
from configs.schema import Experiment, composed, field_of, fields_of, load, parse
from configs.slurm import requeueing
from soups.errors import one_line_errors, refuse
from soups.files.atomic import read_json, write_json

COMMAND = "command.json"  # in a run's folder: the words that make it
OF_ONE_CALL = ("run", "recipe", "artefact", "submit", "sweep.index", "share.index", "share.of", "paths.results")


def parts_as_typed(config: Experiment, typed: Sequence[str]) -> list[tuple[Experiment, list[str]]]:
    """The experiments that one is made of, each with the words that make it by itself; or itself with its own words.

    All parts get what is typed on the command line, but for what is said of the whole.
    """
    if not config.parts:
        return [(config, list(typed))]
    if "name" in fields_of(typed):
        raise UserError(
            f"{config.name} is made of {len(config.parts)} experiments, which keep their own names: to keep these runs "
            "apart from others, type another folder, paths.runs=runs/mine"
        )
    shared = [word for word in typed if field_of(word) not in ("experiment", "artefact", "parts")]
    parts = [(load(name, *shared), [f"experiment={name}", *shared]) for name in config.parts]
    if config.cluster.stage is not None and len({part.task.folder for part, _ in parts}) > 1:
        raise UserError(
            f"cluster.stage is the data of one experiment, and those of {config.name} have several data sets: type it "
            "for each experiment by itself"
        )
    return parts


def parts_of(config: Experiment, typed: Sequence[str]) -> list[Experiment]:
    """The experiments of `parts_as_typed`, without their words."""
    return [part for part, _ in parts_as_typed(config, typed)]


def typed_right(main: Callable[[], None], document: str = "") -> Callable[[], None]:
    """A `main` of Hydra that answers --help by itself, takes `run=FOLDER`, and refuses what is mistyped in one line.

    Without the `document` of the command's module, --help is Hydra's.
    """

    def checked() -> None:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # it raises, in place of printing and ending
        try:
            if document:
                sys.argv[1:] = with_run(sys.argv[1:])
                if not {"--help", "-h"}.isdisjoint(sys.argv[1:]):
                    print(helped(sys.argv[1:], document))
                    return
                refuse_bare_words(sys.argv[1:])
            main()
        except UserError as error:
            refuse(str(error))
        except MissingConfigException as error:
            refuse(_unknown(error))
        except (HydraException, OmegaConfBaseException) as error:
            refuse(_first(str(error)))

    return checked


def with_run(words: Sequence[str]) -> list[str]:
    """The words of a command with run=FOLDER replaced by those that this run was made with; typed ones win."""
    named = [word for word in words if word.startswith("run=")]
    if not named:
        return list(words)
    folder = Path(named[-1].removeprefix("run="))
    folder = folder if folder.name else folder.resolve()
    more = [word for word in words if word not in named]
    path = folder / COMMAND
    if not path.exists():
        if (folder.parent / COMMAND).exists():
            raise UserError(f"run={folder} is one of several sweeps: type run={folder.parent}")
        here = sorted(each.parent for each in folder.parent.glob(f"*/{COMMAND}"))
        near = nearest(folder.name, [each.name for each in here])
        beside = f"; there is {', '.join(str(folder.parent / name) for name in near)}" if near else ""
        what = "has no " + COMMAND if folder.is_dir() else "does not exist"
        raise UserError(
            f"run={folder} {what}, which python reproduce.py and python -m finetune write: name a run's folder, or "
            f"type experiment=NAME and its settings{beside}"
        )
    # It may have been moved since.
    made = [word for word in read_json(path)["words"] if field_of(word) not in ("name", "paths.runs")]
    made += [] if f"experiment={folder.name}" in made else [f"name={folder.name}"]
    made += [] if folder.parent == Path("runs") else [f"paths.runs={folder.parent}"]
    return [*(word for word in made if field_of(word) not in fields_of(more)), *more]


def record_words(config: Experiment, typed: Sequence[str]) -> None:
    """Keep the typed words that make a run in its folder, for run=FOLDER."""
    words = [word for word in typed if field_of(word) not in OF_ONE_CALL and "=" in word]
    path = config.paths.runs / config.name / COMMAND
    if not (path.exists() and read_json(path)["words"] == words):
        write_json(path, {"words": words})


def refuse_bare_words(words: Sequence[str]) -> None:
    """Raise a `UserError` for a word without a value, which is no setting, and perhaps the name of an experiment."""
    for before, word in zip(["", *words], words, strict=False):
        is_of_flag = before.startswith("-") and "=" not in before
        if "=" in word or word.startswith(("-", "~")) or is_of_flag:
            continue
        if word in GROUPS or any(word == each.name for each in settings_of(Experiment)):
            raise UserError(f"{word} has no value: type {word}=VALUE")
        near = nearest(word, options_of("experiment"))
        remedy = f"type experiment={near[0]}" if near else "settings are typed as field=value, as in experiment=demo"
        raise UserError(f"{word!r} is no setting: {remedy}")


def helped(words: Sequence[str], document: str) -> str:
    """What --help prints: of the command, or of groups of settings or settings beside it; raises as `topic_help`."""
    topics = [word for word in words if "=" not in word and not word.startswith("-")]
    if not topics:
        spec = getattr(sys.modules["__main__"], "__spec__", None)  # how this process was started
        name = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
        return command_help(document, f"python {name}")
    values = OmegaConf.to_container(composed(*(word for word in words if "=" in word)), resolve=False)
    return "\n".join(topic_help(topic, Experiment, values) for topic in topics)  # type: ignore[arg-type]


def _first(message: str) -> str:
    """The lines of Hydra's message that say what is wrong, without its advice, which closed settings would refuse."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines[0].startswith("Could not override"):
        name = lines[0].split(chr(39))[1]
        near, group = nearest_setting(name, Experiment), name.split(".")[0]
        all_are = f"--help {group} lists all of {group}" if group in GROUPS else "--help says what there is"
        return f"there is no setting {name}{f', but {near}' if near else ''}; {all_are}"
    return f"{'; '.join(lines[:2])}; --help says what there is"


def _unknown(error: MissingConfigException) -> str:
    """A file of a group that is not there, and those whose names are like it."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or [])
    if not group or not options:
        return str(error).splitlines()[0]
    now = {"folders": "image_folder"}.get(name, name.removeprefix("any_"))  # from the name of an earlier version
    if now != name and now in options:
        return f"{group}={name} is called {group}={now} now"
    near = nearest(name, options) or [each for each in options if mentions(group, each, name)] or sorted(options)[:3]
    more = f"; all are in configs/{group}" if len(options) > len(near) else ""
    return f"there is no {group}={name}, but {', '.join(near)}{more}"


def entry_point(stage: Callable[[Experiment], None], *, several: bool = False) -> Callable[[], None]:
    """The `main` of a stage: compose configs/config.yaml with the command line, freeze it and run `stage`.

    In a SLURM job, SIGUSR1 makes the stage save and requeue itself, SIGTERM makes it save and end. With `several`
    torchrun may start it.
    """

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def main(cfg: DictConfig) -> None:
        def work() -> None:
            config = parse(cfg, HydraConfig.get().overrides.task)
            with requeueing(config.cluster.restarts):
                stage(config)

        one_line_errors(work, several=several)

    return typed_right(main, inspect.getdoc(inspect.getmodule(stage)) or "")
