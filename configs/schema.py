"""Every setting: its name, type and limits. Values stand in the yaml files beside this module.

`parse` is the only way from Hydra's answer to an `Experiment`; unknown names and values out of range die there.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from configs.data import KINDS, NEUTRAL, AnyTask, Task
from configs.errors import UserError
from configs.fields import (
    Count,
    Needs,
    NonNegative,
    Positive,
    Probability,
    closed,
    default_of,
    kinds_in,
    needs_in,
    typed_fields,
)
from configs.help import nearest, nearest_setting
from configs.registered import CONFIGS, read_table, register
from configs.stages import TIME, Analysis, Cluster, Paths, Plan, Share, Tracking
from configs.training import Augment, Choice, Compute, Model, Optim, Regularizer, Sweep

NAME = r"^[a-z0-9_]+(/[a-z0-9_]+)?$"
GROUP_OF_SETTINGS = "should be settings by name, as in {name: value}"
WANTED = {  # what a type or pattern of pydantic's asks for, in words that say what to type
    "tuple_type": "should be a list, as in [first,second]",
    "too_short": "should not be empty",
    "string_type": "should be a text, in quotes where it is true, false or null",
    "path_type": "should be a path, in quotes where it is a number",
    **dict.fromkeys(("dict_type", "dataclass_type", "model_attributes_type"), GROUP_OF_SETTINGS),
    NAME: "should be lower-case letters, digits and _, as in my_pets_2",
    TIME: "should be hours:minutes:seconds, as in 08:00:00",
}
SEARCHED = ("optim", "augment")  # groups that `sweep.best_of` takes from another experiment's best row
TRAINED = ("optim", "augment", "regularizer")  # groups of settings that only training reads
BY_SPLIT = ("folders", "counts", "take", "subsets", "metrics", "titles")  # settings of a task: split -> value
OF_SPLITS = ("numbered", "objectnet")  # settings of a task: names of splits

Single = Literal["best", "second_best"]  # recipes that choose a model; others average weights, or logits (Ensemble)
Average = Literal["uniform", "subset", "greedy", "greedy_random_order", "greedy_with_replacement"]
Fitted = Literal["learned", "learned_by_layer", "learned_by_tensor", "model_stock", "wise_ft"]
Ensemble = Literal["ensemble", "calibrated_ensemble", "greedy_ensemble", "ensemble_with_replacement"]
Recipe = Literal[Single, Average, Fitted, Ensemble]


@closed
class Learning:
    """How the coefficients of learned soups are found (Appendix I)."""

    lr: Positive  # AdamW, constant
    epochs: Count  # over the held-out split
    batch_size: Count  # images
    weight_decay: NonNegative
    place: Literal["stream", "host"]  # where ingredients are between steps: in their files, or in memory


@closed
class Cooking:
    """configs/cooking/*.yaml: what the recipes leave open."""

    # greedy with a model that changes nothing: Recipe 1 keeps it, the authors' script drops it
    ties: Literal["keep", "drop"]
    # fewer forward passes for the same decisions of greedy
    shortcut: Annotated[Literal["none", "hard_first", "speculative"], Needs("recipe", "greedy", typed_only=True)]
    ahead: Annotated[Count, Needs("cooking.shortcut", "speculative", typed_only=True)]  # candidates tried at once
    chunk: Annotated[Count, Needs("cooking.shortcut", "hard_first", typed_only=True)]  # images between two decisions
    significance: bool  # with hard_first: report paired z and McNemar p of each accepted model
    min_sigma: NonNegative  # with hard_first: accept only above this z; 0 is the paper's rule
    orders: Count  # how many greedy_random_order takes
    # at most, of greedy_with_replacement and ensemble_with_replacement
    rounds: Annotated[Count, Needs("recipe", "greedy_with_replacement", "ensemble_with_replacement", typed_only=True)]
    initialisation: bool  # whether row 0 is one of the models that recipes may choose
    # kinds of weights, as in ema_0.999, among which best, second_best and the oracle may choose any row's (Section
    # 3.3.2); empty: regularizer.ingredient alone, which soups and ensembles are made of
    individuals: tuple[str, ...] = ()
    rows: Annotated[tuple[int, ...], Needs("recipe", "subset", typed_only=True)]  # the subset
    # the soup that is interpolated with the initialisation
    of: Annotated[Recipe, Needs("recipe", "wise_ft", typed_only=True)]
    alpha: Annotated[Probability, Needs("recipe", "wise_ft", typed_only=True)]  # 0 is the initialisation, 1 the soup
    learned: Annotated[Learning, Needs("recipe", "learned", "learned_by_layer", "learned_by_tensor", typed_only=True)]

    @model_validator(mode="after")
    def settings_have_an_effect(self) -> "Cooking":
        """Paired statistics need the results of single images, which only hard_first asks for."""
        if (self.significance or self.min_sigma > 0) and self.shortcut != "hard_first":
            raise ValueError("significance and min_sigma compare single images: they need shortcut=hard_first")
        return self


IF_TRAINED = Needs("sweep.imported", None, typed_only=True)  # imported rows have their weights


@closed
class Experiment:
    """Everything that drives every stage; one experiment is one sweep on one task with one model."""

    name: Annotated[str, Field(pattern=NAME)]
    task: AnyTask
    model: Model
    optim: Annotated[Optim, IF_TRAINED]
    augment: Annotated[Augment, IF_TRAINED]
    regularizer: Annotated[Regularizer, IF_TRAINED]
    compute: Compute
    tracking: Tracking
    sweep: Sweep
    recipes: Annotated[tuple[Recipe, ...], Field(min_length=1)]
    recipe: Recipe | None = None  # make this one only
    share: Share = Field(default_factory=Share)
    cooking: Cooking
    analysis: Analysis
    cluster: Cluster
    plan: Plan
    paths: Paths
    # reproduce.py sends the jobs, and does not only print them
    submit: Annotated[bool, Needs("cluster.kind", "slurm")] = False
    # python -m soups.experiment.backbones: folders of rows, in the order in which they are added
    towers: tuple[Path, ...] = ()
    artefact: str | None = None  # python -m analysis: a table or figure of the paper, or all
    parts: tuple[str, ...] = ()  # experiments that this one is made of; it has no models of its own then
    replicates: tuple[int, ...] = ()  # repeat the whole experiment with these sweep seeds, under name/seed<n>

    @model_validator(mode="after")
    def what_is_named_is_there(self) -> "Experiment":
        """Rows, the soups' baseline, and the kinds of weights that single models are chosen among."""
        sweep, analysis = self.sweep, self.analysis
        if sweep.index is not None and sweep.index > sweep.size:
            raise ValueError(f"sweep.index={sweep.index} is past the last row, {sweep.size}")
        named = set().union(*analysis.sets.values()) if analysis.sets else set()
        if analysis.labels and len(analysis.labels) != sweep.size:
            raise ValueError(f"analysis.labels has {len(analysis.labels)} names for {sweep.size} rows")
        if named and (not analysis.labels or max(named) > sweep.size):
            raise ValueError(f"analysis.sets needs analysis.labels and rows up to {sweep.size}")
        if "best" not in self.recipes:
            raise ValueError("recipes must contain best: every interval is against the best individual model")
        if len(set(self.recipes)) < len(self.recipes):
            raise ValueError("recipes names one twice")
        kinds, made = self.cooking.individuals, self.regularizer.made
        unknown = [kind for kind in kinds if kind not in made]
        if unknown:
            raise ValueError(f"cooking.individuals: {unknown[0]} is not made; there are {', '.join(made)}")
        if kinds and self.regularizer.ingredient not in kinds:
            raise ValueError(f"cooking.individuals leaves out {self.regularizer.ingredient}, regularizer.ingredient")
        return self

    @model_validator(mode="after")
    def groups_fit_together(self) -> "Experiment":
        """Texts meet a model that reads, and what is set and would be ignored is an error."""
        task, model = self.task, self.model
        if task.is_text != model.is_reader:
            raise ValueError(
                f"task.kind={task.kind} has {'texts' if task.is_text else 'images'}, which model.kind={model.kind} "
                "does not take"
            )
        if task.is_text != (self.augment.kind == "none"):
            raise ValueError(f"augment=none is for texts, and for texts alone: got augment.kind={self.augment.kind}")
        if task.is_text and (self.optim.mixup or self.optim.cutmix):
            raise ValueError("mixup and CutMix mix pixels: with texts, optim.mixup=0 and optim.cutmix=0")
        if (self.optim.loss == "likelihood") != (model.head == "prompt"):
            raise ValueError("optim.loss=likelihood and model.head=prompt belong together: answers to prompts")
        if model.head == "prompt" and not task.answers:
            raise ValueError(f"{len(task.options)} task.options are more than a prompt has letters")
        resized, size = self.compute.resized, model.image_size
        if resized is not None and resized < size:
            raise ValueError(f"compute.resized={resized} is smaller than the {size} pixels of model.image_size")
        if problem := without_effect(self):
            raise ValueError(problem)
        return self


@closed
class OnlyTask:
    """A task without the rest of an experiment, as python -m tasks.check reads it."""

    task: AnyTask


register(Experiment)


@cache
def needs_of(root: Any, group: str = "") -> Mapping[str, Needs]:
    """What each setting needs that needs something, by its dotted name, or a group's where it is about all of it."""
    found: dict[str, Needs] = {}
    for kind in kinds_in(root):
        for name, annotation in typed_fields(kind).items():
            dotted = f"{group}.{name}" if group else name
            if needs := needs_in(annotation):
                found[dotted] = needs
            found |= needs_of(annotation, dotted)
    return found


def _possible(config: Experiment, group: str, field: str) -> set[Any]:
    """Values that a setting has in some row: the experiment's own, and those that its sweep gives it."""
    sweep, found = config.sweep, {getattr(getattr(config, group), field)}
    law = sweep.draw.get(group, {}).get(field)  # type: ignore[call-overload]  # names are those of groups
    found |= set(law.values) if isinstance(law, Choice) else set()
    found |= set(sweep.grid.get(group, {}).get(field, ()))  # type: ignore[call-overload]
    lines: Iterable[Any] = sweep.listed if sweep.file is None else read_table(sweep.file)
    return found | {line[group][field] for line in lines if field in line.get(group, {})}


def _has(config: Experiment, needs: Needs) -> bool:
    """Whether some row has what a setting needs (`Needs` stands beside it)."""
    if needs.setting == "recipe":
        return not {*config.recipes, config.recipe}.isdisjoint(needs.values)
    group, _, field = needs.setting.partition(".")
    if needs.values:
        return not _possible(config, group, field).isdisjoint(needs.values)
    return needs.setting in config.sweep.varied or bool(getattr(getattr(config, group), field))


def _is_set(config: Experiment, name: str) -> bool:
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


def without_effect(config: Experiment, typed: Iterable[str] = ()) -> str | None:
    """What is wrong with the first setting that was given and that the others leave without effect, if there is one.

    Settings count as given where their dotted names were typed, or where they do not have their default.
    """
    typed = list(typed)
    for name, needs in needs_of(Experiment).items():
        given = any(f"{field}.".startswith(f"{name}.") for field in typed)
        if (given or (not needs.typed_only and _is_set(config, name))) and not _has(config, needs):
            return f"{name} needs {needs}: here it would have no effect"
    return of_no_split(config.task, typed)


def of_no_split(task: Task, typed: Iterable[str]) -> str | None:
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


Root = TypeVar("Root")


def _explain(error: ValidationError, root: type) -> str:
    lines = []
    for problem in error.errors():
        places = list(problem["loc"])
        if len(places) > 1 and places[0] == "task" and places[1] in KINDS:
            del places[1]  # pydantic names the kind there, which nobody types
        where = ".".join(map(str, places))
        if problem["type"] == "unexpected_keyword_argument":
            near = nearest_setting(where, root)
            lines.append(f"{where}: there is no such setting" + (f"; near is {near}" if near else ""))
        elif not where or (problem["type"] == "value_error" and isinstance(problem["input"], dict)):
            lines.append(problem["msg"].removeprefix("Value error, "))  # about several settings, which it names
        else:
            got, wanted = problem["input"], problem["msg"]
            if problem["type"] == "union_tag_invalid":  # the kind of a task or of a distribution
                where, got, wanted = f"{where}.kind", got["kind"], f"Input should be {problem['ctx']['expected_tags']}"
            wanted = WANTED.get(problem.get("ctx", {}).get("pattern", problem["type"]), wanted)
            got = "null" if got is None else got
            options = re.findall(r"'([^']*)'", wanted) if wanted.startswith("Input should be '") else []
            near = f"; near is {close[0]}" if (close := nearest(str(got), options, 1)) else ""
            given = "" if isinstance(got, dict) else f", got {str(got)[:80]!r}"  # a group that lacks a setting
            lines.append(f"{where}: {wanted}{given}{near}")
    return "; ".join(lines)


def checked(root: type[Root], values: Any) -> Root:
    """Plain containers to a frozen dataclass; a `UserError` names the field that is wrong."""
    try:
        return TypeAdapter(root).validate_python(values)
    except ValidationError as error:
        raise UserError(f"bad config: {_explain(error, root)}") from None


def plain(cfg: DictConfig, remedy: str) -> Any:
    """Hydra's answer as plain containers; a `UserError` names a missing value and ends with the remedy."""
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        field, problem = error.full_key, str(error).splitlines()[0]
        if not isinstance(error, MissingMandatoryValue):
            problem, remedy = f"{field}: {problem}", "a setting that is no reference has no ${ in it"
        elif field and "." in field:
            remedy = f"this experiment leaves it to you: type {field}=..."
        raise UserError(f"bad config: {problem}; {remedy}") from None


def field_of(word: str) -> str:
    """The dotted name in an override of the command line."""
    return word.split("=", maxsplit=1)[0].lstrip("+~")


def fields_of(typed: Iterable[str]) -> list[str]:
    """The same of several."""
    return [field_of(word) for word in typed]


def parse_task(cfg: DictConfig, typed: Iterable[str]) -> AnyTask:
    """The task of Hydra's answer, whatever model and sweep stand beside it; raises as `parse`."""
    task = checked(OnlyTask, {"task": plain(cfg, "name one with task=, as in task=imagenet")["task"]}).task
    if problem := of_no_split(task, fields_of(typed)):
        raise UserError(f"bad config: {problem}")
    return task


def parse(cfg: DictConfig, typed: Iterable[str] = ()) -> Experiment:
    """Check Hydra's answer and freeze it; a `UserError` names what is wrong as in `optim.lr`.

    A field that is both typed on the command line and drawn by the sweep is an error: one of the two would be ignored.
    """
    config = checked(Experiment, plain(cfg, "an experiment sets it, e.g. experiment=demo"))
    fields = fields_of(typed)
    for field in fields:
        varied = next((name for name in config.sweep.varied if f"{field}.".startswith(f"{name}.")), None)
        if varied is not None:
            raise UserError(f"{field} is varied by the sweep{_freeing(config.sweep, varied)}")
        if config.sweep.best_of is not None and field.split(".")[0] in SEARCHED:
            raise UserError(
                f"{field} is that of the best row of {config.sweep.best_of}: type sweep.best_of=null to set it"
            )
    if problem := without_effect(config, fields):
        raise UserError(f"bad config: {problem}")
    return config


def _freeing(sweep: Sweep, varied: str) -> str:
    """What to type so that a varied field can be typed."""
    group, field = varied.split(".")
    if field in {**sweep.draw, **sweep.grid}.get(group, {}):  # type: ignore[call-overload]  # names are those of groups
        way = "draw" if sweep.draw else "grid"
        return f"; to fix it in every row, type '~sweep.{way}.{varied}' too"
    where = f"the column {varied} of {sweep.file}" if sweep.file is not None else "sweep.listed"
    return f", by {where}: change it there, or name a sweep of your own"


def load(experiment: str, *overrides: str) -> Experiment:
    """Compose and parse an experiment file, for tests and notebooks: `load("demo", "sweep.rows=2")`."""
    return parse(composed(f"experiment={experiment}", *overrides), overrides)


def composed(*words: str) -> DictConfig:
    """Hydra's answer to configs/config.yaml with these words."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(words))


def dump(config: Experiment) -> dict[str, Any]:
    """Plain JSON-able containers, the inverse of `checked`; with the settings of other kinds of tasks, neutral."""
    plain: dict[str, Any] = TypeAdapter(Experiment).dump_python(config, mode="json")
    return plain | {"task": NEUTRAL | plain["task"]}


def replicate(config: Experiment, sweep_seed: int) -> Experiment:
    """The same experiment with another sweep seed, in a run folder of its own."""
    values = dump(config)
    values["sweep"]["seed"] = sweep_seed
    return checked(Experiment, values | {"name": f"{config.name}/seed{sweep_seed}", "replicates": []})
