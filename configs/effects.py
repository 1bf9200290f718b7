"""Settings that the others leave without effect: they are refused, not ignored.

What a setting needs stands beside it, as `Needs` (configs/fields.py); here it is asked whether some row has that.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined

from configs.fields import Needs, default_of, kinds_in, needs_in, typed_fields
from configs.sweep_csv import read_table
from configs.training import Choice

if TYPE_CHECKING:
    from configs.data import Task
    from configs.schema import Experiment

TRAINED = ("optim", "augment", "regularizer")  # groups of settings that only training reads
BY_SPLIT = ("folders", "counts", "take", "subsets", "metrics", "titles")  # settings of a task: split -> value
OF_SPLITS = ("numbered", "objectnet")  # settings of a task: names of splits


@cache
def needs_of(root: Any, group: str = "") -> Mapping[str, Needs]:
    """What each setting needs that needs something, by its dotted name, or a group's where it is about all of it.

    The `root` is a dataclass or union of the schema, held by the setting `group`, as in "optim".
    """
    found: dict[str, Needs] = {}
    for kind in kinds_in(root):
        for name, annotation in typed_fields(kind).items():
            dotted = f"{group}.{name}" if group else name
            if needs := needs_in(annotation):
                found[dotted] = needs
            found |= needs_of(annotation, dotted)
    return found


def possible(config: "Experiment", group: str, field: str) -> set[Any]:
    """Values that a setting has in some row: the experiment's own, and those that its sweep gives it."""
    sweep, found = config.sweep, {getattr(getattr(config, group), field)}
    law = sweep.draw.get(group, {}).get(field)  # type: ignore[call-overload]  # names are those of groups
    found |= set(law.values) if isinstance(law, Choice) else set()
    found |= set(sweep.grid.get(group, {}).get(field, ()))  # type: ignore[call-overload]
    lines: Iterable[Any] = sweep.listed if sweep.file is None else read_table(sweep.file)
    return found | {line[group][field] for line in lines if field in line.get(group, {})}


def _has(config: "Experiment", needs: Needs) -> bool:
    """Whether some row has what a setting needs."""
    if needs.setting == "recipe":
        return not {*config.recipes, config.recipe}.isdisjoint(needs.values)
    group, _, field = needs.setting.partition(".")
    if needs.values:
        return not possible(config, group, field).isdisjoint(needs.values)
    return needs.setting in config.sweep.varied or bool(getattr(getattr(config, group), field))


def _is_set(config: "Experiment", name: str) -> bool:
    """Whether a setting has another value than its default; of one without a default, than null, 0 or nothing.

    Where an augmentation's kind is the sweep's business, or another sweep's, settings of all kinds have values
    (configs/augment/levels.yaml); where rows are imported, no file says how they were trained.
    """
    *groups, field = name.split(".")
    if name.startswith(TRAINED) and config.sweep.imported is not None:
        return False
    if groups == ["augment"] and ("augment.kind" in config.sweep.varied or config.sweep.best_of is not None):
        return False
    holder: Any = config
    for group in groups:
        holder = getattr(holder, group)
    if field not in holder.__dataclass_fields__:  # another kind of task has it
        return False
    default, value = default_of(type(holder), field), getattr(holder, field)
    return bool(value) if default is PydanticUndefined else bool(value != default)


def without_effect(config: "Experiment", typed: Iterable[str] = ()) -> str | None:
    """What is wrong with the first setting that was given and that the others leave without effect, if there is one.

    Settings count as given where their dotted names were typed, or where they do not have their default.
    """
    typed, root = list(typed), type(config)
    for name, needs in needs_of(root).items():  # type: ignore[arg-type]  # mypy takes the class for one of its objects
        given = any(f"{field}.".startswith(f"{name}.") for field in typed)
        if (given or (not needs.typed_only and _is_set(config, name))) and not _has(config, needs):
            return f"{name} needs {needs}: here it would have no effect"
    return of_no_split(config.task, typed)


def of_no_split(task: "Task", typed: Iterable[str]) -> str | None:
    """What was typed for a split that the task has not."""
    splits = (task.train, task.held_out, *task.reported)
    for field in typed:
        group, name, split, *_ = [*field.split("."), "", ""]
        if group != "task" or name not in (*BY_SPLIT, *OF_SPLITS):
            continue
        value = getattr(task, name, None) or ()
        named = [split] if split else [value] if isinstance(value, str) else value
        unknown = [each for each in named if each not in splits]
        if unknown:
            return f"task.{name} names the split {unknown[0]!r}, which the task has not: it has {', '.join(splits)}"
    return None
