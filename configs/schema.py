"""Every setting: its name, type and limits. Values stand in the yaml files beside this module.

`parse` is the only way from Hydra's answer to an `Experiment`; unknown names and values out of range die there.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from configs.data import KINDS, NEUTRAL, AnyTask
from configs.effects import of_no_split, without_effect
from configs.errors import UserError
from configs.fields import Count, Needs, NonNegative, Positive, Probability, closed
from configs.figures import Analysis
from configs.help import nearest, nearest_setting
from configs.machines import Cluster, Plan, Share
from configs.registered import CONFIGS, register
from configs.training import Augment, Compute, Model, Optim, Regularizer, Sweep

SEARCHED = ("optim", "augment")  # groups that `sweep.best_of` takes from another experiment's best row

Single = Literal["best", "second_best"]  # recipes that choose a model; others average weights, or logits (Ensemble)
Average = Literal["uniform", "subset", "greedy", "greedy_random_order", "greedy_with_replacement"]
Fitted = Literal["learned", "learned_by_layer", "learned_by_tensor", "model_stock", "wise_ft"]
Ensemble = Literal["ensemble", "calibrated_ensemble", "greedy_ensemble", "ensemble_with_replacement"]
Recipe = Literal[Single, Average, Fitted, Ensemble]


@closed
class Paths:
    """Where things are written."""

    runs: Path = Path("runs")  # run folders: runs/<name>/...
    results: Path | None = None  # also copy tables and scores here (results/measured holds the committed ones)


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


@closed
class Tracking:
    """configs/tracking/*.yaml: where metrics go beside metrics.jsonl."""

    kind: Literal["none", "wandb"]
    every: Count  # steps between two points of the loss curve
    project: str | None = None  # the project on W&B
    entity: Annotated[str | None, Needs("tracking.kind", "wandb")] = None  # user or team
    # offline: `wandb sync` sends it later
    mode: Annotated[Literal["online", "offline"], Needs("tracking.kind", "wandb")] = "online"

    @model_validator(mode="after")
    def wandb_has_a_project(self) -> "Tracking":
        """W&B sorts runs by project."""
        if (self.kind == "wandb") != (self.project is not None):
            raise ValueError("tracking.kind=wandb and tracking.project belong together")
        return self


IF_TRAINED = Needs("sweep.imported", None, typed_only=True)  # imported rows have their weights


@closed
class Experiment:
    """Everything that drives every stage; one experiment is one sweep on one task with one model."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)?$")]
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
    def index_is_a_row(self) -> "Experiment":
        """`sweep.index` names a row that exists, and the soups' baseline is there."""
        if self.sweep.index is not None and self.sweep.index > self.sweep.size:
            raise ValueError(f"sweep.index={self.sweep.index} is past the last row, {self.sweep.size}")
        named = set().union(*self.analysis.sets.values()) if self.analysis.sets else set()
        if self.analysis.labels and len(self.analysis.labels) != self.sweep.size:
            raise ValueError(f"analysis.labels has {len(self.analysis.labels)} names for {self.sweep.size} rows")
        if named and (not self.analysis.labels or max(named) > self.sweep.size):
            raise ValueError(f"analysis.sets needs analysis.labels and rows up to {self.sweep.size}")
        if "best" not in self.recipes:
            raise ValueError("recipes must contain best: every interval is against the best individual model")
        return self

    @model_validator(mode="after")
    def individuals_are_made(self) -> "Experiment":
        """Single models are chosen among weights that rows leave, those that soups are made of among them."""
        kinds, made = self.cooking.individuals, self.regularizer.made
        unknown = [kind for kind in kinds if kind not in made]
        if unknown:
            raise ValueError(f"cooking.individuals: {unknown[0]} is not made; there are {', '.join(made)}")
        if kinds and self.regularizer.ingredient not in kinds:
            raise ValueError(f"cooking.individuals leaves out {self.regularizer.ingredient}, regularizer.ingredient")
        return self

    @model_validator(mode="after")
    def texts_and_images_do_not_mix(self) -> "Experiment":
        """Texts meet a model that reads, and none of what is done to images."""
        if self.task.is_text != self.model.is_reader:
            raise ValueError(
                f"task.kind={self.task.kind} has {'texts' if self.task.is_text else 'images'}, which "
                f"model.kind={self.model.kind} does not take"
            )
        if self.task.is_text != (self.augment.kind == "none"):
            raise ValueError(f"augment=none is for texts, and for texts alone: got augment.kind={self.augment.kind}")
        if self.task.is_text and (self.optim.mixup or self.optim.cutmix):
            raise ValueError("mixup and CutMix mix pixels: with texts, optim.mixup=0 and optim.cutmix=0")
        if (self.optim.loss == "likelihood") != (self.model.head == "prompt"):
            raise ValueError("optim.loss=likelihood and model.head=prompt belong together: answers to prompts")
        if self.model.head == "prompt" and not self.task.answers:
            raise ValueError(f"{len(self.task.options)} task.options are more than a prompt has letters")
        return self

    @model_validator(mode="after")
    def copies_are_large_enough(self) -> "Experiment":
        """Training images are not enlarged from copies that were made too small."""
        resized, size = self.compute.resized, self.model.image_size
        if resized is not None and resized < size:
            raise ValueError(f"compute.resized={resized} is smaller than the {size} pixels of model.image_size")
        return self

    @model_validator(mode="after")
    def settings_have_an_effect(self) -> "Experiment":
        """What is set and would be ignored is an error."""
        problem = without_effect(self)
        if problem:
            raise ValueError(problem)
        return self


@closed
class OnlyTask:
    """A task without the rest of an experiment, as python -m tasks.check reads it."""

    task: AnyTask


register(Experiment)

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
        field = error.full_key
        if isinstance(error, MissingMandatoryValue) and field and "." in field:
            remedy = f"this experiment leaves it to you: type {field}=..."
        raise UserError(f"bad config: {str(error).splitlines()[0]}; {remedy}") from None


def field_of(word: str) -> str:
    """The dotted name in an override of the command line."""
    return word.split("=", maxsplit=1)[0].lstrip("+~")


def fields_of(typed: Iterable[str]) -> list[str]:
    """The dotted names in overrides of the command line."""
    return [field_of(word) for word in typed]


def parse_task(cfg: DictConfig, typed: Iterable[str]) -> AnyTask:
    """The task of Hydra's answer, whatever model and sweep stand beside it; raises as `parse`."""
    task = checked(OnlyTask, {"task": plain(cfg, "name one with task=, as in task=imagenet")["task"]}).task
    problem = of_no_split(task, fields_of(typed))
    if problem:
        raise UserError(f"bad config: {problem}")
    return task


def parse(cfg: DictConfig, typed: Iterable[str] = ()) -> Experiment:
    """Check Hydra's answer and freeze it.

    A field that is both typed on the command line and drawn by the sweep is an error: one of the two would be ignored.

    Raises:
        UserError: an unknown key, a missing value, a wrong type or a value out of range, named as in `optim.lr`; a
            field typed and drawn.
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
    problem = without_effect(config, fields)
    if problem:
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
