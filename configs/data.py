"""The settings of a task: its data, and which of them train, select and report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from configs.training import Count, Natural, closed, default_of
from soups.scoring import Metric

Annotation = Literal["real", "multilabel"]

# kinds with a file for each image
FILES = ("image_folder", "image_table", "dtd", "food101", "sun397", "cars", "fmow", "iwildcam")
TEXTS = ("glue", "sentences", "sentiment")  # kinds of tasks whose examples are texts


IMAGES = ("emoji", "cifar10", "cifar100", "parquet", *FILES)
CUT = (*IMAGES[1:], "glue", "sentences")  # kinds of which held-out may be a part of train
KINDS_OF = {  # setting -> the kinds that it is for; settings that are not here are for all
    "fold": ("emoji",),
    "folders": CUT,
    "counts": (*CUT, "sentiment"),
    "names": IMAGES,
    "label": ("image_table", "parquet", "sentences"),
    "table": ("image_table",),
    "path_column": ("image_table",),
    "split_column": ("image_table",),
    "subset": ("glue",),
    "template": TEXTS,
    "options": TEXTS,
    "asked": TEXTS,
    "take": TEXTS,
    "subsets": ("image_folder",),
    "numbered": ("image_folder",),
    "objectnet": ("image_folder",),
    "objectnet_border": ("image_folder",),
    "annotations": FILES,
    "held_out_per_class": CUT,
    "held_out_share": CUT,
    "held_out_index": ("image_folder",),
    "listings": FILES,
    "protocol": ("glue",),
}


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


@closed
class Task:
    """configs/task/*.yaml: what is learned, what selects and what reports."""

    kind: Literal[
        "emoji",
        "image_folder",
        "image_table",
        "cifar10",
        "cifar100",
        "dtd",
        "food101",
        "sun397",
        "cars",
        "fmow",
        "iwildcam",
        "parquet",
        "glue",
        "sentences",
        "sentiment",
    ]
    folder: Path  # the data as they are distributed; of image_folder: <folder>/<split>/<class>/<image>;
    # of parquet and glue: a folder, or a name on Hugging Face's hub; of sentences: <folder>/<split>.tsv
    fold: Annotated[int, Field(ge=0, le=4)] = 0  # of emoji: how its drawings are dealt to train, held-out and test
    # split -> its folder of image_folder, or what the data call it, where that is not its name
    folders: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    num_classes: Annotated[int, Field(ge=2)]  # the data must have so many
    counts: dict[str, int] | None = dataclasses.field(default=None, hash=False)  # split -> how many images its folder
    # must have, train's before held-out is taken from it; null: not checked
    names: str = "folder"  # class names: the data's own, of image_folder those of the class folders; imagenet
    # (open_clip's); or a file with one a line
    label: str = "label"  # column of class ids (parquet, sentences, image_table), or of names of `options` (sentences)
    # or of classes (image_table)
    table: Path | None = None  # of image_table: a csv or tsv within `folder` with all splits; null: one file for each
    path_column: str = "path"  # of image_table: the column of paths, which are relative to `folder`
    split_column: str = "split"  # of image_table with `table`: the column that says which split a line is of
    subset: Literal["mrpc", "rte", "cola", "sst2"] | None = None  # of glue: which of its tasks
    template: str | None = None  # of texts: what a network reads, with columns in braces, as in "sentence: {sentence}"
    options: tuple[str, ...] = ()  # of texts: what the classes are called, in the order of their ids
    asked: tuple[Natural, ...] = ()  # of texts: class ids in the order in which a prompt lists the options, as A), B),
    # ...; empty: the order of the ids
    take: dict[str, Count] | None = dataclasses.field(default=None, hash=False)  # of texts: split -> only so many
    # of image_folder: split -> how many of train's classes it has; such a split is reported over these classes alone
    subsets: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    numbered: tuple[str, ...] = ()  # of image_folder: splits whose class folders are called 0, 1, ...
    objectnet: str | None = None  # of image_folder: the split in ObjectNet's layout, with its mappings beside images
    objectnet_border: bool = False  # cut the 2 pixels at its images' edges, as its authors ask and the paper's did not
    # more answers that count as right in the test split: real (Beyer et al. 2020), whose accuracy is the mean over
    # images, and multilabel (Shankar et al. 2020), the mean over classes; a file each, null: no such column
    annotations: dict[Annotation, Path] = dataclasses.field(default_factory=dict, hash=False)
    held_out_per_class: Count | None = None  # held-out is so many images of each class of train
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None  # held-out is about this share of train
    held_out_index: Path | None = None  # of image_folder: the authors' npy, over train in the order of ImageFolder
    protocol: Literal["apart", "paper"] = "apart"  # of glue: what selects is not reported; or held-out is the whole
    # test split, as the paper seems to have it, which says so wherever its numbers stand
    # the share of a split that may stand in train or held-out too, by content; 0 refuses a single one
    overlap_allowed: Annotated[float, Field(ge=0, le=1)] = 0
    train: str
    held_out: str  # selects: greedy order, best individual, regularisation
    test: str  # reports
    shifts: tuple[str, ...]  # report; their unweighted mean is the "shift mean" (Section 3.1)
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict, hash=False)  # how a split is scored; else top1
    title: str | None = None  # what tables and figures call the benchmark; null: as its folder is called
    # split -> what tables and figures call it; others have their role (Train, Held-out, Test), shifts their name
    titles: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    proxy_for: str | None = None  # the paper's data set in whose place it stands; named wherever its numbers are
    bootstrap_unit: Literal["class", "image"] = "image"  # what intervals resample; class where images share concepts
    listings: Path | None = None  # of kinds with a file for each image: a folder that keeps the lists of files, which
    # are made once and not by every task; null: not kept
    classes: Annotated[int | None, Field(ge=2)] = None  # only the first n classes; for tests
    parts: Annotated[int, Field(ge=1)] = 1  # classes are dealt out to so many tasks (Appendix E in small),
    part: Natural = 0  # and this is the one with every parts-th class from this one on

    @field_validator("annotations", mode="before")
    @classmethod
    def null_is_no_column(cls, files: dict[str, Any]) -> dict[str, Any]:
        """An experiment's file can be left out on the command line."""
        return {name: file for name, file in files.items() if file is not None}

    @model_validator(mode="after")
    def selects_and_reports_apart(self) -> "Task":
        """The held-out split never reports and the reporting splits never select or train."""
        splits = [self.train, self.held_out, self.test, *self.shifts]
        twice = sorted({s for s in splits if splits.count(s) > 1})
        if twice:
            raise ValueError(f"each split has one role (train, held_out, test or shift), but {twice} has two")
        if self.part >= self.parts:
            raise ValueError(f"task.part={self.part} is not one of task.parts={self.parts}, counted from 0")
        return self

    @model_validator(mode="after")
    def held_out_comes_from_one_place(self) -> "Task":
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

    @model_validator(mode="after")
    def settings_are_of_this_kind(self) -> "Task":
        """What only other kinds of tasks have is an error, not ignored."""
        for name, kinds in KINDS_OF.items():
            if self.kind not in kinds and getattr(self, name) != default_of(type(self), name):
                raise ValueError(f"task.{name} is for task.kind={', '.join(kinds)}, not for {self.kind}")
        if self.split_column != "split" and self.table is None:
            raise ValueError("task.split_column needs task.table=FILE, the table that has that column")
        if self.objectnet_border and self.objectnet is None:
            raise ValueError("task.objectnet_border needs task.objectnet, the split whose borders are cut")
        if self.classes is not None and self.classes > len(range(self.part, self.num_classes, self.parts)):
            raise ValueError(f"task.classes={self.classes} is more than there are")
        return self

    @model_validator(mode="after")
    def texts_have_words(self) -> "Task":
        """What a text is made of, and what its classes are called, each of them by one name."""
        if self.kind not in TEXTS:
            return self
        if (self.kind == "glue") != (self.subset is not None):
            raise ValueError("task.kind=glue and task.subset (mrpc, rte, cola, sst2) belong together")
        if self.asked and sorted(self.asked) != list(range(self.num_classes)):
            raise ValueError(f"task.asked={list(self.asked)}: not each class id below {self.num_classes} once")
        if not self.template or len(self.options) != self.num_classes:
            raise ValueError(
                f"texts need task.template and task.num_classes={self.num_classes} task.options, got {self.options}"
            )
        twice = [option for option in self.options if self.options.count(option) > 1]
        if twice:
            raise ValueError(f"task.options has {twice[0]!r} for two classes")
        ids = {str(label): label for label in range(self.num_classes)}
        for label, option in enumerate(self.options):
            if ids.get(option, label) != label:
                raise ValueError(f"task.options calls class {label} {option!r}, which is also the id of another class")
        return self

    @property
    def is_text(self) -> bool:
        """Whether examples are texts, not images."""
        return self.kind in TEXTS

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
        """What a language model that is asked by a prompt is to say, by class: "B) unacceptable", "A) acceptable"."""
        places = list(self.ids) if self.options else []
        order = [places.index(label) for label in self.asked or places if label in places]
        return lettered([self.options[label] for label in places], order)

    @property
    def name(self) -> str:
        """What tables and figures call the benchmark, and by which protocol where that is not this project's."""
        name = self.title or self.folder.name
        return name if self.protocol == "apart" else f"{name} (selected on the reported split)"

    def split_title(self, split: str) -> str:
        """What tables and figures call a split."""
        roles = {self.train: "Train", self.held_out: "Held-out", self.test: "Test"}
        spelled = split.replace("_", " ")  # of your own data, beside titles that are spelled as words
        title = self.titles.get(split) or roles.get(split) or spelled[:1].upper() + spelled[1:]
        return f"{title} (selected on it)" if self.protocol == "paper" and split == self.test else title

    @property
    def reported(self) -> tuple[str, ...]:
        """The test split and the shifts, in the order of a table's columns."""
        return (self.test, *self.shifts)
