"""The settings of a task: its data, and which of them train, select and report."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.training import Count, Natural, closed

Metric = Literal["top1", "macro_f1", "worst_group", "matthews", "accuracy_and_f1"]  # eval/scores.py says what they are

TEXTS = ("glue", "sentences", "sentiment")  # kinds of tasks whose examples are texts


@closed
class Task:
    """configs/task/*.yaml: what is learned, what selects and what reports."""

    kind: Literal[
        "emoji",
        "image_folder",
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
    # split -> its folder of image_folder, or what the data call it, where that is not its name
    folders: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    num_classes: Annotated[int, Field(ge=2)]  # the data must have so many
    counts: dict[str, int] | None = dataclasses.field(default=None, hash=False)  # split -> how many images its folder
    # must have, train's before held-out is taken from it; null: not checked
    names: str = "folder"  # class names: the data's own, of image_folder those of the class folders; imagenet
    # (open_clip's); or a file with one a line
    label: str = "label"  # of parquet and sentences: the column of class ids; of sentences also of names of `options`
    subset: Literal["mrpc", "rte", "cola", "sst2"] | None = None  # of glue: which of its tasks
    template: str | None = None  # of texts: what a network reads, with columns in braces, as in "sentence: {sentence}"
    options: tuple[str, ...] = ()  # of texts: what the classes are called, in the order of their ids
    take: dict[str, Count] | None = dataclasses.field(default=None, hash=False)  # of texts: split -> only so many
    # of image_folder: split -> how many of train's classes it has; such a split is reported over these classes alone
    subsets: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    numbered: tuple[str, ...] = ()  # of image_folder: splits whose class folders are called 0, 1, ...
    objectnet: str | None = None  # of image_folder: the split in ObjectNet's layout, with its mappings beside images
    objectnet_border: bool = False  # cut the 2 pixels at its images' edges, as its authors ask and the paper's did not
    # what -> file: more answers that count as right in the test split (ReaL, multilabel)
    annotations: dict[str, Path] = dataclasses.field(default_factory=dict, hash=False)
    held_out_per_class: Count | None = None  # held-out is so many images of each class of train
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None  # held-out is this share of each class of train
    held_out_index: Path | None = None  # of image_folder: the authors' npy, over train in the order of ImageFolder
    train: str
    held_out: str  # selects: greedy order, best individual, regularisation
    test: str  # reports
    shifts: tuple[str, ...]  # report; their unweighted mean is the "shift mean" (Section 3.1)
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict, hash=False)  # how a split is scored; else top1
    proxy_for: str | None = None  # the paper's data set in whose place it stands; named wherever its numbers are
    bootstrap_unit: Literal["class", "image"] = "image"  # what intervals resample; class where images share concepts
    classes: Annotated[int | None, Field(ge=2)] = None  # only the first n classes; for tests
    parts: Annotated[int, Field(ge=1)] = 1  # classes are dealt out to so many tasks (Appendix E in small),
    part: Natural = 0  # and this is the one with every parts-th class from this one on

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
        return self

    @model_validator(mode="after")
    def folder_settings_are_of_folders(self) -> "Task":
        """What only folders of images have is an error elsewhere, not ignored."""
        folders_only = {
            "held_out_index": self.held_out_index,
            "subsets": self.subsets,
            "numbered": self.numbered,
            "objectnet": self.objectnet,
        }
        useless = [name for name, value in folders_only.items() if value]
        if useless and self.kind != "image_folder":
            raise ValueError(f"task.{useless[0]} is for task.kind=image_folder, and would be ignored")
        return self

    @model_validator(mode="after")
    def texts_have_words(self) -> "Task":
        """What a text is made of and what its classes are called, of texts and of nothing else."""
        words = {"subset": self.subset, "template": self.template, "options": self.options, "take": self.take}
        if self.kind not in TEXTS:
            useless = [name for name, value in words.items() if value]
            if useless:
                raise ValueError(f"task.{useless[0]} is for texts ({', '.join(TEXTS)}), and would be ignored")
            return self
        if (self.kind == "glue") != (self.subset is not None):
            raise ValueError("task.kind=glue and task.subset (mrpc, rte, cola, sst2) belong together")
        if not self.template or len(self.options) != self.num_classes:
            raise ValueError(
                f"texts need task.template and task.num_classes={self.num_classes} task.options, got {self.options}"
            )
        return self

    @property
    def is_text(self) -> bool:
        """Whether examples are texts, not images."""
        return self.kind in TEXTS

    @property
    def size(self) -> int:
        """How many classes there are."""
        ids = range(self.part, self.num_classes, self.parts)
        return min(len(ids), self.classes or len(ids))

    @property
    def reported(self) -> tuple[str, ...]:
        """The test split and the shifts, in the order of a table's columns."""
        return (self.test, *self.shifts)
