"""What every entry point does before and after its work: Hydra, the closed config, and errors in one line.

Exit statuses: 0, done; 1, a bug, with its traceback, or the no of a command that answers yes or no (soups.verify);
2, wrong words, settings, data or files, no room, or a package that is not installed; 128 + n, ended by signal n, so 130
by Ctrl-C.
"""

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import UserError
from configs.help import GROUPS, command_help, mentions, nearest, nearest_setting, options_of, settings_of, topic_help
from configs.registered import CONFIGS
from configs.schema import GROUP_OF_SETTINGS, Experiment, composed, field_of, fields_of, load, parse
from configs.slurm import requeueing
from soups.errors import one_line_errors, refuse
from soups.files.atomic import read_json, write_json

COMMAND = "command.json"  # in a run's folder: the words that make it
MULTIRUN = ("-m", "--multirun")  # the one option of Hydra that is taken
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


def typed_right(main: Callable[[], None], document: str) -> Callable[[], None]:
    """A `main` of Hydra that answers --help by itself, takes `run=FOLDER`, and refuses what is mistyped in one line.

    The `document` of the command's module is on top of its help.
    """

    def checked() -> None:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # it raises, in place of printing and ending
        try:
            sys.argv[1:] = with_run(sys.argv[1:])
            is_help = not {"--help", "-h"}.isdisjoint(sys.argv[1:])
            refuse_mistyped([word for word in sys.argv[1:] if "=" in word] if is_help else sys.argv[1:])
            if is_help:
                print(helped(sys.argv[1:], document))
            else:
                main()
        except UserError as error:
            refuse(str(error))
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


def refuse_mistyped(words: Sequence[str]) -> None:
    """Raise a `UserError` for the first word that Hydra would refuse in words of its own, or misunderstand."""
    for word in words:
        if word.startswith("-") and word not in MULTIRUN:
            raise UserError(f"there is no option {word}: settings are typed as field=value, and --help lists them")
        if "=" in word:
            _refuse_misspelled(word, is_multirun=not set(MULTIRUN).isdisjoint(words))
        elif not word.startswith(("-", "~")):
            _refuse_bare(word)


def _refuse_bare(word: str) -> None:
    """A word without a value is no setting, and perhaps the name of an experiment."""
    if word in GROUPS or word == "experiment" or any(word == each.name for each in settings_of(Experiment)):
        raise UserError(f"{word} has no value: type {word}=VALUE")
    near = [f"experiment={name}" for name in nearest(word, options_of("experiment"))]
    near = [f"{group}={word}" for group in GROUPS if word in options_of(group)] + near
    remedy = f"type {near[0]}" if near else "settings are typed as field=value, as in experiment=demo"
    raise UserError(f"{word!r} is no setting: {remedy}")


def _refuse_misspelled(word: str, *, is_multirun: bool) -> None:
    """A word with a value that cannot be read as one, or that names a file which its group has not."""
    field, _, text = word.partition("=")
    name = field.strip()
    group = name.lstrip("+~")
    if not group:
        raise UserError(f"{word!r} names no setting: settings are typed as field=value, as in experiment=demo")
    if not text and not word.startswith("~"):
        raise UserError(f"{name} has no value: type {name}=VALUE")
    if name != field:
        raise UserError(f"{word!r} has a space where none may be: type {name}={text.strip()}")
    if text.startswith("~/"):
        raise UserError(f"{word}: your shell leaves ~ as it is here: type {name}=$HOME{text[1:]}")
    inner = text.replace('"', r"\"")
    quoted, options = shlex.quote(f'{name}="{inner}"'), options_of(group)
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        remedy = "its brackets or quotes do not match" if text[:1] in "[{" else f"type {quoted}, its value in quotes"
        raise UserError(f"{word} cannot be read: {remedy}") from None
    if options and word.startswith("+"):
        raise UserError(f"{word}: {group} is chosen without +: type {group}={text}")
    if override.is_sweep_override():
        if is_multirun:
            return
        if options:
            raise UserError(f"{word} is several files of configs/{group}: type one of them")
        raise UserError(
            f"{word} is several values: type a list as {shlex.quote(f'{name}=[{text}]')}, a text as {quoted}"
        )
    if options and override.value() not in options:
        raise UserError(_unknown(group, text.strip(), options))


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
    """What Hydra's message says is wrong, without its advice, which closed settings would refuse."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    name = lines[0].split("'")[1] if lines[0].count("'") > 1 else ""
    group, names = name.split(".")[0], [each.name for each in settings_of(Experiment)]
    if lines[0].startswith("Could not append"):
        return f"+{name} adds what is there already: type {name}=VALUE, without +"
    if lines[0].startswith("Error merging override"):
        return f"{lines[0].removeprefix('Error merging override ')}: the value {GROUP_OF_SETTINGS}"
    if not lines[0].startswith(("Could not override", "Could not delete")) or "The value of" in lines[0]:
        return f"{lines[0].rstrip('.')}; --help says what there is"
    holder, _, field = name.rpartition(".")
    if holder in names or (name in names and holder == group):  # values by name, as in task.titles.test
        return f"{name} gets names that it has not yet: type +{name} in place of {name}"
    if name in names:
        files = [each for each in options_of(group) if mentions(group, each, field)]
        return f"{holder} is null here: type '{holder}={{{field}: VALUE}}'" + "".join(
            f", or {group}={each}" for each in files
        )
    near = nearest_setting(name, Experiment)
    return (
        f"there is no setting {name}{f', but {near}' if near else ''}; "
        f"{f'--help {group} lists all of {group}' if group in GROUPS else '--help says what there is'}"
    )


def _unknown(group: str, name: str, options: Sequence[str]) -> str:
    """A file of a group that is not there, and those whose names are like it."""
    now = {"folders": "image_folder"}.get(name, name.removeprefix("any_"))  # from the name of an earlier version
    if now != name and now in options:
        return f"{group}={name} is called {group}={now} now"
    stem = Path(name).stem
    near = nearest(stem, options) or [each for each in options if mentions(group, each, stem)] or sorted(options)[:3]
    more = f"; all are in configs/{group}" if len(options) > len(near) else ""
    return f"there is no {group}={name}, but {', '.join(near)}{more}"


def entry_point(
    stage: Callable[[Experiment], None], *, several: bool = False, whole: bool = False
) -> Callable[[], None]:
    """The `main` of a stage: compose configs/config.yaml with the command line, freeze it and run `stage`.

    In a SLURM job, SIGUSR1 makes the stage save and requeue itself, SIGTERM makes it save and end. With `several`
    torchrun may start it. An experiment of several sweeps is refused, unless the command takes it `whole`.
    """

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def main(cfg: DictConfig) -> None:
        def work() -> None:
            config = parse(cfg, HydraConfig.get().overrides.task)
            if not whole:
                _refuse_several_sweeps(config)
            with requeueing(config.cluster.restarts):
                stage(config)

        one_line_errors(work, several=several)

    return typed_right(main, inspect.getdoc(inspect.getmodule(stage)) or "")


def _refuse_several_sweeps(config: Experiment) -> None:
    """For a stage of one sweep; python reproduce.py, python -m analysis and python -m slurm.* take several."""
    if config.parts:
        raise UserError(
            f"{config.name} is {len(config.parts)} experiments: type one, as in experiment={config.parts[0]}"
        )
    if config.replicates:
        seed = config.replicates[0]
        raise UserError(
            f"{config.name} is {len(config.replicates)} sweeps: type one of them, with name={config.name}/seed{seed} "
            f"sweep.seed={seed} 'replicates=[]'"
        )
