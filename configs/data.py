"""The settings of a task: its data, and which of them train, select and report. Each kind lists its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from pydantic import BeforeValidator, Field, field_validator, model_validator

from configs.fields import Count, Natural, Needs, Probability, closed
from configs.registered import neutral
from soups.scoring import Metric

Annotation = Literal["real", "multilabel"]
Protocol = Literal["apart", "paper"]


def lettered(options: Sequence[str], order: Sequence[int] = ()) -> tuple[str, ...]:
    """Each option with the letter of its place in an order, which is their own where none is given.

    None where there are more options than letters.

    >>> lettered(["unacceptable", "acceptable"], order=[1, 0])
    ('B) unacceptable', 'A) acceptable')
    """
    if len(options) > len(ascii_uppercase):
        return ()
    letters = dict(zip(order or range(len(options)), ascii_uppercase, strict=False))
    return tuple(f"{letters[place]}) {option}" for place, option in enumerate(options))


class Unset:
    """What code that takes any task reads where the task's kind has no such setting.

    It is no dataclass, so these are no settings; but a kind that has one by this name without a default says Field().
    """

    is_text: ClassVar[bool] = False  # whether examples are texts, not images
    noun: ClassVar[str] = "images"  # for examples in messages
    names: str = "folder"
    folders: Mapping[str, str] = MappingProxyType({})
    counts: Mapping[str, int] | None = None
    annotations: Mapping[Annotation, Path] = MappingProxyType({})
    listings: Path | None = None
    held_out_per_class: int | None = None
    held_out_share: float | None = None
    held_out_index: Path | None = None
    template: str = ""
    options: tuple[str, ...] = ()
    subset: str | None = None
    protocol: Protocol = "apart"


@closed
class Task(Unset):
    """What every kind of task has: its data, and the splits that train, select and report."""

    kind: str  # how the data lie on the disk
    # the data as they are distributed; image_folder: <folder>/<split>/<class>/<image>; parquet and glue: a folder, or a
    # name on Hugging Face's hub; sentences: <folder>/<split>.tsv
    folder: Path
    num_classes: Annotated[int, Field(ge=2)]  # the data must have so many
    # the share of a split that may stand in train or held-out too, by content; 0 refuses a single one
    overlap_allowed: Probability = 0
    train: str
    held_out: str  # selects: greedy order, best individual, regularisation
    test: str  # reports
    shifts: tuple[str, ...]  # report; their unweighted mean is the "shift mean" (Section 3.1)
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict, hash=False)  # how a split is scored; else top1
    title: str | None = None  # the benchmark's name in tables and figures; null: its folder's name
    # split -> what tables and figures call it; others have their role (Train, Held-out, Test), shifts their name
    titles: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    proxy_for: str | None = None  # the paper's data set in whose place it stands; named wherever its numbers are
    bootstrap_unit: Literal["class", "image"] = "image"  # intervals resample these; class where images share concepts
    classes: Annotated[int | None, Field(ge=2)] = None  # only the first n classes; for tests
    parts: Count = 1  # classes are dealt out to so many tasks (Appendix E in small)
    part: Natural = 0  # which of them this is: the one with every parts-th class from this one on

    @model_validator(mode="after")
    def selects_and_reports_apart(self) -> "Task":
        """The held-out split never reports and the reporting splits never select or train."""
        splits = [self.train, self.held_out, self.test, *self.shifts]
        twice = sorted({s for s in splits if splits.count(s) > 1})
        if twice:
            raise ValueError(f"each split has one role (train, held_out, test or shift), but {twice} has two")
        if self.part >= self.parts:
            raise ValueError(f"task.part={self.part} is not one of task.parts={self.parts}, counted from 0")
        if self.classes is not None and self.classes > len(range(self.part, self.num_classes, self.parts)):
            raise ValueError(f"task.classes={self.classes} is more than there are")
        return self

    @property
    def ids(self) -> range:
        """The classes of the data that the task is about."""
        return range(self.part, self.num_classes, self.parts)[: self.classes]

    @property
    def size(self) -> int:
        """How many classes there are."""
        return len(self.ids)

    @property
    def answers(self) -> tuple[str, ...]:
        """What a language model that is asked by a prompt is to say, by class; nothing for images."""
        return ()

    @property
    def name(self) -> str:
        """What tables and figures call the benchmark, and by which protocol where that is not this project's."""
        name = self.title or self.folder.name
        return name if self.protocol == "apart" else f"{name} (selected on the reported split)"

    def split_title(self, split: str) -> str:
        """What tables and figures call a split."""
        roles = {self.train: "Train", self.held_out: "Held-out", self.test: "Test"}
        spelled = split.replace("_", " ")  # for the user's data, beside titles that are spelled as words
        title = self.titles.get(split) or roles.get(split) or spelled[:1].upper() + spelled[1:]
        return f"{title} (selected on it)" if self.protocol == "paper" and split == self.test else title

    @property
    def reported(self) -> tuple[str, ...]:
        """The test split and the shifts, in the order of a table's columns."""
        return (self.test, *self.shifts)


@closed
class Counted(Task):
    """Tasks whose data are not this repository's, and may be incomplete."""

    # split -> how many images its folder must have, train's before held-out is taken from it; null: not checked
    counts: dict[str, int] | None = dataclasses.field(default=None, hash=False)


@closed
class Cut(Counted):
    """Tasks whose held-out split may be a part of train."""

    # split -> its folder (image_folder), or what the data call it, where that is not its name
    folders: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    held_out_per_class: Count | None = None  # held-out is so many images of each class of train
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None  # held-out is about this share of train

    @model_validator(mode="after")
    def held_out_comes_from_one_place(self) -> "Cut":
        """Held-out is a folder of its own, drawn from train, or listed."""
        rules = [self.held_out_per_class, self.held_out_share, self.held_out_index, self.folders.get(self.held_out)]
        if sum(rule is not None for rule in rules) > 1:
            raise ValueError(
                "held_out_per_class, held_out_share, held_out_index and a folder for held-out in task.folders exclude "
                "each other"
            )
        if self.protocol == "paper" and any(rule is not None for rule in rules):
            given = [name for name in ("held_out_share", "held_out_per_class") if getattr(self, name) is not None]
            remedy = f"task.{given[0]}=null" if given else f"'~task.folders.{self.held_out}'"
            raise ValueError(f"task.protocol=paper selects on the whole test split: type {remedy} too")
        return self


@closed
class Images(Task):
    """Tasks of images."""

    # class names: the data's, which are those of the class folders for image_folder; imagenet (open_clip's); or a file
    # with one a line
    names: str = "folder"


@closed
class ImageFiles(Cut, Images):
    """Tasks with a file for each image."""

    # a folder that keeps the lists of files, which are made once and not by every task; null: not kept
    listings: Path | None = None
    # more answers that count as right in the test split: real (Beyer et al. 2020), whose accuracy is the mean over
    # images, and multilabel (Shankar et al. 2020), the mean over classes; a file each, null: no such column
    annotations: dict[Annotation, Path] = dataclasses.field(default_factory=dict, hash=False)

    @field_validator("annotations", mode="before")
    @classmethod
    def null_is_no_column(cls, files: dict[str, Any]) -> dict[str, Any]:
        """An experiment's file can be left out on the command line."""
        return {name: file for name, file in files.items() if file is not None}


@closed
class Texts(Counted):
    """Tasks whose examples are texts."""

    is_text: ClassVar[bool] = True
    noun: ClassVar[str] = "texts"
    template: str = Field(min_length=1)  # a network reads this, with columns in braces: "sentence: {sentence}"
    options: tuple[str, ...] = Field()  # names of the classes, in the order of their ids
    # class ids in the order in which a prompt lists the options, as A), B), ...; empty: the order of the ids
    asked: Annotated[tuple[Natural, ...], Needs("model.head", "prompt", typed_only=True)] = ()
    take: dict[str, Count] | None = dataclasses.field(default=None, hash=False)  # split -> only so many

    @model_validator(mode="after")
    def classes_have_words(self) -> "Texts":
        """Each class is called by one name, which no other has."""
        if self.asked and sorted(self.asked) != list(range(self.num_classes)):
            raise ValueError(f"task.asked={list(self.asked)}: not each class id below {self.num_classes} once")
        if len(self.options) != self.num_classes:
            raise ValueError(f"texts need task.num_classes={self.num_classes} task.options, got {self.options}")
        twice = [option for option in self.options if self.options.count(option) > 1]
        if twice:
            raise ValueError(f"task.options has {twice[0]!r} for two classes")
        ids = {str(label): label for label in range(self.num_classes)}
        for label, option in enumerate(self.options):
            if ids.get(option, label) != label:
                raise ValueError(f"task.options calls class {label} {option!r}, which is also the id of another class")
        return self

    @property
    def answers(self) -> tuple[str, ...]:
        """What a language model that is asked by a prompt is to say, by class: "B) unacceptable", "A) acceptable"."""
        places = list(self.ids)
        order = [places.index(label) for label in self.asked or places if label in places]
        return lettered([self.options[label] for label in places], order)


@closed
class Emoji(Images):
    """The embedded benchmark (tasks/emoji)."""

    kind: Literal["emoji"]
    fold: Annotated[int, Field(ge=0, le=4)] = 0  # how its drawings are dealt to train, held-out and test


@closed
class ImageFolder(ImageFiles):
    """Images in a folder for each class (tasks/image_folder.py)."""

    kind: Literal["image_folder"]
    # split -> how many of train's classes it has; such a split is reported over these classes alone
    subsets: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    numbered: tuple[str, ...] = ()  # splits whose class folders are called 0, 1, ...
    objectnet: str | None = None  # the split in ObjectNet's layout, with its mappings beside images
    objectnet_border: bool = False  # cut the 2 pixels at its images' edges, as its authors ask and the paper's did not
    held_out_index: Path | None = None  # the authors' npy, over train in the order of ImageFolder

    @model_validator(mode="after")
    def borders_are_of_a_split(self) -> "ImageFolder":
        """Only images of ObjectNet have borders."""
        if self.objectnet_border and self.objectnet is None:
            raise ValueError("task.objectnet_border needs task.objectnet, the split whose borders are cut")
        return self


@closed
class ImageTable(ImageFiles):
    """Images that a csv or tsv lists (tasks/image_lists.py)."""

    kind: Literal["image_table"]
    label: str = "label"  # column of class names
    table: Path | None = None  # a csv or tsv within `folder` with all splits; null: one file for each
    path_column: str = "path"  # the column of paths, which are relative to `folder`
    split_column: str = "split"  # with `table`: the column that says which split a line belongs to

    @model_validator(mode="after")
    def column_is_of_a_table(self) -> "ImageTable":
        """A file for each split needs no column that says which split it is."""
        if self.split_column != "split" and self.table is None:
            raise ValueError("task.split_column needs task.table=FILE, the table that has that column")
        return self


@closed
class Cifar(Cut, Images):
    """CIFAR-10 and CIFAR-100 (tasks/cifar.py)."""

    kind: Literal["cifar10", "cifar100"]


@closed
class ListedImages(ImageFiles):
    """Published data sets whose own files list their images (tasks/image_lists.py)."""

    kind: Literal["dtd", "food101", "sun397", "cars", "fmow", "iwildcam"]


@closed
class Parquet(Cut, Images):
    """Images in parquet files (tasks/parquet.py)."""

    kind: Literal["parquet"]
    label: str = "label"  # column of class ids


@closed
class Glue(Cut, Texts):
    """GLUE's tasks of one or two sentences (tasks/texts.py)."""

    kind: Literal["glue"]
    subset: Literal["mrpc", "rte", "cola", "sst2"] = Field()  # which of its tasks
    # apart: what selects is not reported; paper: held-out is the whole test split, as the paper seems to have it, and
    # this is said wherever its numbers stand
    protocol: Protocol = "apart"


@closed
class Sentences(Cut, Texts):
    """The user's texts in tsv files (tasks/texts.py)."""

    kind: Literal["sentences"]
    label: str = "label"  # column of class ids or names of `options`


@closed
class Sentiment(Texts):
    """The embedded text benchmark (tasks/sentiment)."""

    kind: Literal["sentiment"]


OneKind = Emoji | ImageFolder | ImageTable | Cifar | ListedImages | Parquet | Glue | Sentences | Sentiment
KINDS: dict[str, type[Task]] = {
    kind: each for each in get_args(OneKind) for kind in get_args(get_type_hints(each)["kind"])
}


NEUTRAL = neutral(OneKind)  # every setting of every kind


def kinds_with(setting: str) -> tuple[str, ...]:
    """The kinds of tasks that have a setting; none of a name that is no setting."""
    return tuple(kind for kind, each in KINDS.items() if setting in each.__dataclass_fields__)  # type: ignore[attr-defined]


def _of_its_kind(values: Any) -> Any:
    """The settings of a task without those of other kinds, which Hydra and a run's config.json have at neutral values.

    Raises:
        ValueError: one of another kind has a value, which would be ignored.
    """
    if not isinstance(values, Mapping) or values.get("kind") not in KINDS:
        return values
    kept = {}
    for name, value in values.items():
        kinds = kinds_with(name)
        if values["kind"] in kinds or not kinds:  # the second is refused as unknown
            kept[name] = value
            continue
        given = {key: each for key, each in value.items() if each is not None} if isinstance(value, Mapping) else value
        if given != NEUTRAL[name]:
            raise ValueError(f"task.{name} is for task.kind={', '.join(kinds)}, not for {values['kind']}")
    return kept


AnyTask = Annotated[OneKind, Field(discriminator="kind"), BeforeValidator(_of_its_kind)]
