"""Settings that the others leave without effect: they are refused, not ignored."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined

from configs.tables import read_table
from configs.training import Choice, default_of

if TYPE_CHECKING:
    from configs.data import Task
    from configs.schema import Experiment


@dataclass(frozen=True)
class Rule:
    """What some settings need to have an effect."""

    settings: tuple[str, ...]  # dotted
    needs: str  # for the message
    holds: Callable[["Experiment"], bool]
    typed_only: bool = (
        False  # their values in the yaml files are neutral in no way, so that only typing them is an error
    )


def possible(config: "Experiment", group: str, field: str) -> set[Any]:
    """Values that a setting has in some row: the experiment's own, and those that its sweep gives it."""
    sweep, found = config.sweep, {getattr(getattr(config, group), field)}
    law = sweep.draw.get(group, {}).get(field)  # type: ignore[call-overload]  # of names of groups
    found |= set(law.values) if isinstance(law, Choice) else set()
    found |= set(sweep.grid.get(group, {}).get(field, ()))  # type: ignore[call-overload]
    lines: Iterable[Any] = sweep.listed if sweep.file is None else read_table(sweep.file)
    return found | {line[group][field] for line in lines if field in line.get(group, {})}


def _some(group: str, field: str, *values: Any) -> Callable[["Experiment"], bool]:
    return lambda config: not possible(config, group, field).isdisjoint(values)


def _cooks(*recipes: str) -> Callable[["Experiment"], bool]:
    return lambda config: not {*config.recipes, config.recipe}.isdisjoint(recipes)


def _varies(group: str, field: str) -> Callable[["Experiment"], bool]:
    """Whether a setting is on: not null, empty or 0, in some row."""
    return lambda config: f"{group}.{field}" in config.sweep.varied or bool(getattr(getattr(config, group), field))


GREEDY = ("greedy", "greedy_random_order", "greedy_ensemble")
TRAINED = ("optim", "augment", "regularizer")  # groups of settings that only training reads

RULES = (
    # The network.
    Rule(("model.max_length",), "a model that reads texts", lambda c: c.model.is_reader),
    Rule(
        ("model.eval_size", "model.eval_resize", "model.squash", "model.frozen_batch_norm"),
        "a model of images",
        lambda c: not c.model.is_reader,
    ),
    Rule(
        ("model.image_size", "compute.channels_last", "compute.decoded", "compute.loader_workers"),
        "a model of images",
        lambda c: not c.model.is_reader,
        typed_only=True,
    ),
    Rule(
        ("compute.decoder", "compute.resized"),
        "images in files or tables",
        lambda c: not c.model.is_reader and c.task.kind not in ("emoji", "cifar10", "cifar100"),
    ),
    Rule(
        ("compute.resized_quality", "compute.resized_to"),
        "compute.resized",
        lambda c: c.compute.resized is not None,
        typed_only=True,
    ),
    Rule(("model.train_head",), "a head, which model.head=prompt has not", lambda c: c.model.head != "prompt"),
    Rule(
        ("model.normalize",),
        "a head, which model.head=prompt has not",
        lambda c: c.model.head != "prompt",
        typed_only=True,
    ),
    Rule(("model.probe_c",), "model.head=linear_probe", lambda c: c.model.head == "linear_probe", typed_only=True),
    Rule(("model.weights",), "another model.kind than imagenet_lite0", lambda c: c.model.kind != "imagenet_lite0"),
    Rule(("task.asked",), "model.head=prompt", lambda c: c.model.head == "prompt", typed_only=True),
    # The optimiser.
    Rule(("optim.momentum",), "optim.kind=sgd or rmsprop", _some("optim", "kind", "sgd", "rmsprop")),
    Rule(("optim.cycles",), "optim.schedule=cosine_restarts", _some("optim", "schedule", "cosine_restarts")),
    Rule(("optim.decay",), "optim.weight_decay above 0", _varies("optim", "weight_decay"), typed_only=True),
    Rule(("optim.epochs",), "optim.steps=null", lambda c: None in possible(c, "optim", "steps"), typed_only=True),
    Rule(
        ("optim.label_smoothing",),
        "optim.loss=softmax or bce",
        lambda c: possible(c, "optim", "loss") != {"likelihood"},
    ),
    # The augmentation.
    Rule(
        ("augment.crop", "augment.aspect"),
        "augment.kind=minimal, medium, rand or auto (of stochastic: in augment.among)",
        _some("augment", "kind", "minimal", "medium", "rand", "auto"),
    ),
    Rule(("augment.flip",), "augment.kind=medium, rand or auto", _some("augment", "kind", "medium", "rand", "auto")),
    Rule(("augment.color_jitter",), "augment.kind=medium", _some("augment", "kind", "medium")),
    Rule(
        ("augment.magnitude", "augment.layers", "augment.magnitude_max", "augment.increasing"),
        "augment.kind=rand",
        _some("augment", "kind", "rand"),
    ),
    Rule(("augment.fill",), "augment.kind=rand or auto", _some("augment", "kind", "rand", "auto")),
    Rule(
        ("augment.last_epochs_minimal",),
        "an augmentation of images",
        lambda c: possible(c, "augment", "kind") != {"none"},
    ),
    # Averages, recipes and the rest.
    Rule(("regularizer.ema_ramp",), "regularizer.ema", _varies("regularizer", "ema")),
    Rule(("tracking.entity", "tracking.mode"), "tracking.kind=wandb", lambda c: c.tracking.kind == "wandb"),
    Rule(("cluster.restarts", "submit"), "cluster.kind=slurm", lambda c: c.cluster.kind == "slurm"),
    Rule(("cooking.rows",), "recipe=subset", _cooks("subset"), typed_only=True),
    Rule(("cooking.of", "cooking.alpha"), "recipe=wise_ft", _cooks("wise_ft"), typed_only=True),
    Rule(
        ("cooking.rounds",),
        "recipe=greedy_with_replacement or ensemble_with_replacement",
        _cooks("greedy_with_replacement", "ensemble_with_replacement"),
        typed_only=True,
    ),
    Rule(
        ("cooking.learned",),
        "a learned recipe",
        _cooks("learned", "learned_by_layer", "learned_by_tensor"),
        typed_only=True,
    ),
    Rule(
        ("cooking.shortcut",),
        "recipe=greedy",
        _cooks("greedy"),
        typed_only=True,
    ),
    Rule(
        ("cooking.ahead",),
        "cooking.shortcut=speculative",
        lambda c: c.cooking.shortcut == "speculative",
        typed_only=True,
    ),
    Rule(
        ("cooking.chunk",), "cooking.shortcut=hard_first", lambda c: c.cooking.shortcut == "hard_first", typed_only=True
    ),
    Rule(
        TRAINED,
        "rows that are trained: sweep.imported has the weights",
        lambda c: c.sweep.imported is None,
        typed_only=True,
    ),
)
BY_SPLIT = ("folders", "counts", "take", "subsets", "metrics", "titles")  # of a task: split -> value
OF_SPLITS = ("numbered", "objectnet")  # of a task: names of splits


def _is_set(config: "Experiment", name: str) -> bool:
    """Whether a setting has another value than its default; of one without a default, than null, 0 or nothing.

    Of an augmentation whose kind is the sweep's business, or another sweep's, all kinds have their settings
    (configs/augment/levels.yaml); of rows that are imported, no file says how they were trained.
    """
    group, _, field = name.rpartition(".")
    if group in TRAINED and config.sweep.imported is not None:
        return False
    if group == "augment" and ("augment.kind" in config.sweep.varied or config.sweep.best_of is not None):
        return False
    holder = getattr(config, group) if group else config
    default, value = default_of(type(holder), field), getattr(holder, field)
    return bool(value) if default is PydanticUndefined else bool(value != default)


def without_effect(config: "Experiment", typed: Iterable[str] = ()) -> str | None:
    """What is wrong with the first setting that was given and that the others leave without effect, if there is one.

    Args:
        config: of the experiment.
        typed: dotted names of the command line; others count as given where they do not have their default.
    """
    typed = list(typed)
    for rule in RULES:
        for name in rule.settings:
            given = any(f"{field}.".startswith(f"{name}.") for field in typed)
            if not given and not rule.typed_only:
                given = _is_set(config, name)
            if given and not rule.holds(config):
                return f"{name} needs {rule.needs}: here it would have no effect"
    return of_no_split(config.task, typed)


def of_no_split(task: "Task", typed: Iterable[str]) -> str | None:
    """What was typed for a split that the task has not."""
    splits = (task.train, task.held_out, *task.reported)
    for field in typed:
        group, name, *key = [*field.split("."), ""][:3] if "." in field else (field, "")
        key = [split for split in key if split]
        if group != "task" or name not in (*BY_SPLIT, *OF_SPLITS):
            continue
        named = getattr(task, name, None) or ()
        named = [named] if isinstance(named, str) else named
        unknown = [split for split in (key or named) if split not in splits]
        if unknown:
            return f"task.{name} names the split {unknown[0]!r}, which the task has not: it has {', '.join(splits)}"
    return None
