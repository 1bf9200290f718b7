"""What `--help` prints for a command whose settings are an experiment's, and the settings nearest to a mistyped one."""

import inspect
import re
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from configs.errors import UserError
from configs.fields import either, kinds_in, needs_in, typed_fields
from configs.registered import CONFIGS, experiments

WIDTH = 110  # columns of what is printed
LAPTOP = ("demo", "own_")  # how names of experiments begin that need neither a GPU nor the paper's data
GROUPS = {
    "task": "the data: splits, classes, metrics",
    "model": "the pretrained network and its head",
    "optim": "optimiser, learning rate, epochs, loss",
    "augment": "what is done to training images",
    "regularizer": "averages along training, SAM, distillation",
    "compute": "precision, memory, loading",
    "tracking": "Weights & Biases",
    "sweep": "how many rows are fine-tuned, and in what they differ",
    "cooking": "what the recipes leave open",
    "analysis": "intervals, and what figures measure",
    "cluster": "workers and threads of this machine, or SLURM",
    "plan": "what estimates of hours assume",
    "paths": "where things are written",
    "share": "one job's part of the work of several",
}
GENERAL = "general"  # settings without a group: name, recipes, ...


@dataclass(frozen=True)
class Setting:
    """A field of the schema as a user types it."""

    name: str  # dotted, as in optim.lr
    values: str  # what it may be
    meaning: str  # the comment beside it
    kinds: tuple[str, ...]  # which kinds of tasks have it; empty: all have it


def settings_of(root: Any, group: str = "") -> list[Setting]:
    """Every setting of a dataclass of the schema and of the dataclasses in it, in their order.

    The root may be a union of several with a field `kind`; `group` is the setting that holds it, as in "optim".
    """
    types_of = {kind: typed_fields(kind) for kind in kinds_in(root)}
    found = []
    for name in dict.fromkeys(name for each in types_of.values() for name in each):
        dotted = f"{group}.{name}" if group else name
        having = [kind for kind, its_types in types_of.items() if name in its_types]
        annotation: Any = Union[tuple(types_of[kind][name] for kind in having)]  # noqa: UP007  # which is not known here
        if kinds_in(annotation):
            found += settings_of(annotation, dotted)
            continue
        meanings = dict.fromkeys(comments_of(kind).get(name, "") for kind in having)
        needs = [f"needs {needs_in(annotation)}"] if needs_in(annotation) else []
        owners = having if len(having) < len(types_of) else []
        kinds = tuple(each for kind in owners for each in get_args(types_of[kind]["kind"]))
        found.append(Setting(dotted, allowed(annotation), "; ".join(filter(None, [*meanings, *needs])), kinds))
    return found


@cache
def comments_of(kind: type) -> Mapping[str, str]:
    """Field of a dataclass -> the comment in the lines above it and beside it, that of its bases where it has none."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        comment: list[str] = []
        for line in inspect.getsource(each).splitlines():
            code, _, words = line.partition("# ")
            comment += [words] if words else []
            if field := re.match(r"    (\w+): ", code):
                found |= {field[1]: " ".join(comment)} if comment else {}
            if code.strip():
                comment = []
    return found


WORDS = {
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}


def allowed(annotation: Any) -> str:
    """What a value of this type may be, in words.

    >>> allowed(Literal["adamw", "sgd"] | None), allowed(tuple[int, ...]), allowed(dict[str, float])
    ('adamw, sgd or null', '[integer, ...]', '{text: number}')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return either([str(value) for value in arguments])
    if origin is Annotated:
        return " ".join([allowed(arguments[0]), *(limit for each in arguments[1:] for limit in _limits(each))])
    if origin in (Union, types.UnionType):
        options: list[str] = []
        for each in arguments:
            options += map(str, get_args(each)) if get_origin(each) is Literal else [allowed(each)]
        return either(options)
    if origin in (tuple, dict):
        inner = f"{allowed(arguments[0])}, ..." if origin is tuple else ": ".join(map(allowed, arguments))
        return f"[{inner}]" if origin is tuple else f"{{{inner}}}"
    return WORDS.get(annotation, "a group of settings")


def _limits(field: Any) -> list[str]:
    """What pydantic demands of a value, as in ["> 0"]."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
    limits = getattr(field, "metadata", ())
    found = [f"{sign} {getattr(each, name)}" for each in limits for name, sign in signs.items() if hasattr(each, name)]
    return [" and ".join(found)] if found else []


def nearest(word: str, options: Sequence[str], most: int = 3) -> list[str]:
    """The options that are spelled most like a word, the nearest first; those that hold it count as near."""
    return get_close_matches(word, options, n=most, cutoff=0.6) or [each for each in options if word in each][:most]


def nearest_setting(name: str, root: Any) -> str:
    """The settings nearest to a name that is none, as in "task.folder"; empty where none is like it."""
    names = [each.name for each in settings_of(root)]
    if "." not in name:
        names += [*GROUPS, "experiment"]
    siblings = [each for each in names if each.split(".")[0] == name.split(".", maxsplit=1)[0]]
    namesakes = [each for each in names if each.split(".")[-1] == name.rsplit(".", maxsplit=1)[-1]]
    near = namesakes[:2] or get_close_matches(name, siblings, 2, 0.75) or get_close_matches(name, names, 2, 0.75)
    return ", ".join(near)


def options_of(group: str) -> list[str]:
    """The files of a group, by the names that are typed."""
    if group == "experiment":
        return list(experiments())
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _text_of(group: str, name: str) -> str:
    file = experiments()[name] if group == "experiment" else CONFIGS / group / f"{name}.yaml"
    return file.read_text(encoding="utf-8")


def mentions(group: str, name: str, word: str) -> bool:
    """Whether a group's file has a word in it, as configs/task/sentences.yaml has tsv."""
    return word in re.findall(r"\w+", _text_of(group, name).lower())


def summary_of(experiment: str) -> str:
    """What an experiment's file says that it is, in one line."""
    comment = " ".join(re.findall(r"^# (?!@package)(.*)", _text_of("experiment", experiment), re.MULTILINE))
    sentence = re.split(r"(?<=[.;])\s", comment, maxsplit=1)[0]
    return textwrap.shorten(sentence.rstrip(".;"), WIDTH - 30, placeholder=" ...")


def command_help(document: str, command: str) -> str:
    """Help of a command, as in "python -m finetune": its docstring, groups of settings, experiments for a laptop."""
    names = options_of("experiment")
    laptop = [name for name in names if name.startswith(LAPTOP)]
    lines = [
        document.strip(),
        "",
        "Settings are typed as field=value, as in optim.epochs=5; run=runs/NAME takes those that a run was made with.",
        *_columns([(group, meaning) for group, meaning in (GROUPS | {GENERAL: "name, recipes, ..."}).items()]),
        f"  {command} --help optim lists the settings of a group with their values.",
        "",
        "Experiments that a laptop runs, typed as experiment=NAME:",
        *_columns([(name, summary_of(name)) for name in laptop]),
        f"  {command} --help experiment lists all {len(names)}.",
    ]
    return "\n".join(lines)


def topic_help(topic: str, root: type, values: Mapping[str, Any]) -> str:
    """Help on a group of settings, on one setting, or on all experiments, with a composed experiment's values."""
    if topic == "experiment":
        return "\n".join(_columns([(name, summary_of(name)) for name in options_of(topic)]))
    every = settings_of(root)
    if topic == GENERAL:
        found = [each for each in every if each.name.split(".")[0] not in GROUPS]
    else:
        found = [each for each in every if each.name == topic or each.name.startswith(f"{topic}.")]
    if not found:
        near = ", ".join(nearest(topic, [*GROUPS, GENERAL, "experiment"])) or nearest_setting(topic, root)
        raise UserError(f"--help {topic}: there is no such group or setting, but {near or ', '.join(GROUPS)}")
    lines = []
    if topic in GROUPS:
        lines.append(f"{topic}: {GROUPS[topic]}")
    if options_of(topic):
        files = f"{topic}=NAME takes all from configs/{topic}/NAME.yaml: {', '.join(options_of(topic))}."
        lines += textwrap.wrap(files, WIDTH)
    for kinds in dict.fromkeys(each.kinds for each in found):
        if kinds:
            lines += ["", *textwrap.wrap(f"Of task.kind={', '.join(kinds)}:", WIDTH)]
        for each in (each for each in found if each.kinds == kinds):
            meaning = f"{each.meaning} ({each.values})" if each.meaning else each.values
            lines.append(f"  {each.name}={_value(values, each.name)}")
            lines += textwrap.wrap(meaning, WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _value(values: Mapping[str, Any], name: str) -> str:
    """A setting's value as it would be typed; empty where the group in it is not there."""
    value: Any = values
    for part in name.split("."):
        value = value.get(part, "") if isinstance(value, Mapping) else ""
    if value == "???":
        return "(has no value yet: type one)"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return value if isinstance(value, str) else str(value).replace("'", "").replace(" ", "")


def _columns(pairs: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs) + 2
    return [f"  {name:{width}}{meaning}" for name, meaning in pairs]
