"""Settings of what a row trains: network, optimiser, augmentation, regularisation, and the sweep that varies them.

The comment beside a setting, or in the lines above it, is what --help prints.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from configs.data import KINDS, ImageFiles, Parquet
from configs.fields import Count, Fraction, Natural, Needs, NonNegative, Positive, Probability, closed
from configs.registered import read_table

Embedded = Literal["emoji_clip", "imagenet_lite0", "minilm"]  # from files of the project or of a package
Prompted = Literal["masked_lm", "seq2seq_lm"]  # language models that answer a prompt, by transformers
EMBEDDED, PROMPTED = get_args(Embedded), get_args(Prompted)
READERS = ("minilm", "text_encoder", *PROMPTED)  # kinds of models that read texts
SEERS = ("emoji_clip", "imagenet_lite0", "open_clip", "timm", "transformers")  # kinds that see images
FROM_FILES = ("emoji_clip", *SEERS[2:], *READERS)  # kinds whose weights can be a local file
HEADS = ("linear_probe", "zero_shot", "random")  # where a head is put on the network
CROPPED = ("minimal", "medium", "rand", "auto")  # augmentations that are one random crop, and more
IMAGES, IMAGES_IF_TYPED = Needs("model.kind", *SEERS), Needs("model.kind", *SEERS, typed_only=True)
CROPS, RAND = Needs("augment.kind", *CROPPED), Needs("augment.kind", "rand")
PHOTOGRAPHS = Needs("task.kind", *(kind for kind, each in KINDS.items() if issubclass(each, ImageFiles | Parquet)))
RESIZED = Needs("compute.resized", typed_only=True)
SMALLEST_FACTORED = 32  # with optim.kind=adafactor narrower matrices keep whole second moments, as in Big Vision

Group = Literal["task", "model", "optim", "augment", "regularizer"]  # groups that a sweep may vary


@closed
class Model:
    """configs/model/*.yaml: a pretrained image tower or encoder of texts with the head that is put on it, or a
    language model that answers prompts.
    """

    kind: Literal[Embedded, "open_clip", "timm", "transformers", "text_encoder", Prompted]
    name: str | None = None  # the library's name of it, transformers' for the last four; null for the embedded kinds
    pretrained: str | None = None  # which of the weights that open_clip knows for `name`
    # a local file or folder, in place of the library's download
    weights: Annotated[Path | None, Needs("model.kind", *FROM_FILES)] = None
    proxy_for: str | None = None  # the paper's model in whose place it stands; named wherever its numbers are
    image_size: Annotated[Count, IMAGES_IF_TYPED]  # pixels, square, of training crops
    # tokens of a text; of a longer one the longest field is shortened
    max_length: Annotated[int, Field(ge=16), Needs("model.kind", *READERS)] = 128
    eval_size: Annotated[Count | None, IMAGES] = None  # pixels, square, at evaluation; null: image_size
    # to which an image is resized before the centre crop; null: eval_size
    eval_resize: Annotated[Count | None, IMAGES] = None
    squash: Annotated[bool, IMAGES] = False  # at evaluation resize both sides, not the shorter one
    # features have unit norm before the head, as the authors' wrapper around CLIP has it
    normalize: Annotated[bool, Needs("model.head", *HEADS, typed_only=True)]
    # the initialisation of the classifier (Section 3.1); prompt: there is none, a language model answers (Appendix J.5)
    head: Literal["linear_probe", "zero_shot", "random", "prompt"]
    # prompts of the zero-shot model: CLIP's 80, those for icons, for opinions, or the class name alone; null: none, for
    # towers without a text encoder
    templates: Literal["openai", "emoji", "sentiment", "name"] | None = None
    head_of: str | None = None  # a run in paths.runs: a row starts with the head of that run's row 0, not with its own
    train_head: Annotated[bool, Needs("model.head", *HEADS)] = True  # false: the head stays as initialised (Appendix E)
    # with emoji_clip: the stem and this many stages get no gradient
    frozen_stages: Annotated[int, Field(ge=0, le=7)] = 0
    # batch norms keep the pretrained statistics, in every ingredient the same
    frozen_batch_norm: Annotated[bool, IMAGES] = True
    # loss of the linear probe; bce is a binary one for each class, for rows that are trained with optim.loss=bce
    # (Appendix J.2.3)
    probe_loss: Literal["softmax", "bce"] = "softmax"
    # inverse regularisation of the linear probe; the best on held-out is taken
    probe_c: Annotated[tuple[Positive, ...], Needs("model.head", "linear_probe", typed_only=True)]

    @model_validator(mode="after")
    def names_what_its_library_needs(self) -> "Model":
        """A library's model has a name; the embedded ones have none; only dual encoders have a zero-shot head."""
        if (self.name is None) != (self.kind in EMBEDDED):
            raise ValueError(f"model.kind={self.kind} {'has no name' if self.name else 'needs model.name'}")
        if self.frozen_stages and self.kind != "emoji_clip":
            raise ValueError("model.frozen_stages is for model.kind=emoji_clip, the embedded model")
        if self.head == "zero_shot" and self.templates is None:
            raise ValueError("model.head=zero_shot needs prompts: model.templates=openai, emoji, sentiment or name")
        if (self.head == "prompt") != (self.kind in PROMPTED) or (self.head == "prompt" and self.templates):
            raise ValueError(f"model.head=prompt and templates=null are for model.kind={' and '.join(PROMPTED)}")
        if self.probe_loss != "softmax" and self.head != "linear_probe":
            raise ValueError(f"model.probe_loss is for model.head=linear_probe, and would be ignored by {self.head}")
        if self.pretrained is not None and self.kind != "open_clip":
            raise ValueError("model.pretrained is for open_clip, whose names do not say which weights")
        return self

    @property
    def is_reader(self) -> bool:
        """Whether it reads texts, not images."""
        return self.kind in READERS

    @property
    def evaluated_at(self) -> int:
        """Pixels, square, of what the network sees at evaluation."""
        return self.eval_size or self.image_size


@closed
class Optim:
    """configs/optim/*.yaml"""

    kind: Literal["adamw", "adam", "rmsprop", "sgd", "adafactor"] = "adamw"
    lr: Positive  # peak, per optimizer step
    weight_decay: NonNegative  # decoupled in adamw and adafactor, added to the gradient in the others
    # weight_decay shrinks all parameters but biases and norms, or all of them, as the authors' script does
    decay: Annotated[Literal["weights", "all"], Needs("optim.weight_decay", typed_only=True)] = "weights"
    momentum: Annotated[float, Field(ge=0, lt=1), Needs("optim.kind", "sgd", "rmsprop", "adafactor")] = 0.9
    schedule: Literal["cosine", "constant", "linear", "cosine_restarts"] = "cosine"  # after the warm-up
    cycles: Annotated[Count, Needs("optim.schedule", "cosine_restarts")] = 1  # how many the schedule has
    epochs: Annotated[Count, Needs("optim.steps", None, typed_only=True)]
    steps: Count | None = None  # how long it trains, in place of epochs
    batch_size: Annotated[int, Field(ge=2, multiple_of=2)]  # images per step over all GPUs; even, for mixup's pairs
    warmup_steps: Natural  # linear from lr / warmup_steps
    clip_norm: Positive | None  # largest norm of the whole gradient; null: not clipped
    # cross-entropy; bce: a binary one for each class; likelihood, for prompts: that of the answer's tokens over the
    # whole vocabulary
    loss: Literal["softmax", "bce", "likelihood"] = "softmax"
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Needs("optim.loss", "softmax", "bce")]
    mixup: NonNegative  # alpha of the Beta distribution; 0 is off
    cutmix: NonNegative = 0.0  # alpha; 0 is off; with both on, each batch takes one of them by a fair coin
    seed: Natural | None = None  # names data order and augmentation; null: each row has its own
    evaluate_every: Natural = 0  # steps between evaluations on held-out during training; 0: never
    keep: Literal["last", "best"] = "last"  # which weights a row ends with: the last, or the best evaluated ones

    @model_validator(mode="after")
    def best_has_evaluations(self) -> "Optim":
        """A best checkpoint needs evaluations to be the best of."""
        if self.keep == "best" and self.evaluate_every == 0:
            raise ValueError("optim.keep=best needs optim.evaluate_every")
        return self


@closed
class Augment:
    """configs/augment/*.yaml"""

    kind: Literal["minimal", "medium", "rand", "auto", "stochastic", "none"]  # none: for texts
    # smallest share of the image that a random crop keeps; null: 0.9 for minimal (Appendix J.2.1), 0.08 for the others,
    # timm's; stochastic has its own in augment.among
    crop: Annotated[Fraction | None, CROPS] = None
    aspect: Annotated[Fraction, CROPS] = 0.75  # narrowest crop, width to height; the widest is its inverse
    flip: Annotated[Probability, Needs("augment.kind", "medium", "rand", "auto")] = 0.5  # horizontal
    # brightness, contrast and saturation change by up to this share
    color_jitter: Annotated[NonNegative, Needs("augment.kind", "medium")] = 0.0
    magnitude: Annotated[int, Field(ge=0, le=30), RAND] = 0  # RandAugment's M
    layers: Annotated[int, Field(ge=0, le=8), RAND] = 0  # RandAugment's N
    magnitude_max: Annotated[int, Field(ge=1, le=30), RAND] = 10  # M acts up to this; 10 is timm's own limit
    increasing: Annotated[bool, RAND] = True  # timm's inc1, where every operation is stronger at a larger M
    # colour of what comes from beyond the image's edges; mean: the one that the model subtracts, as in timm
    fill: Annotated[Literal["white", "mean"], Needs("augment.kind", "rand", "auto")] = "white"
    # fix-aug (Table L.2): the last epochs see crops of 90 % and more, nothing else
    last_epochs_minimal: Annotated[Natural, Needs("augment.kind", *CROPPED, "stochastic")] = 0
    among: tuple["Augment", ...] = ()  # stochastic chooses from these for each sample, all equally likely (Table L.1)

    @model_validator(mode="after")
    def stochastic_has_a_choice(self) -> "Augment":
        """Only stochastic chooses, and it has something to choose from."""
        if (self.kind == "stochastic") != bool(self.among):
            raise ValueError("augment.among and augment.kind=stochastic belong together")
        return self


@closed
class Swa:
    """Stochastic weight averaging (Izmailov et al. 2018; Appendix L.3)."""

    start: Annotated[float, Field(ge=0, lt=1)]  # share of the training after which it averages
    every: Count  # steps between two models of the average


@closed
class Sam:
    """Sharpness-aware minimisation (Foret et al. 2021; Appendix L.2)."""

    rho: Positive  # length of the perturbation, over all parameters
    synchronised: bool  # one perturbation of the mean gradient over all processes, or each process its own


@closed
class Distill:
    """Distillation from an ensemble (Table L.1)."""

    rows: Annotated[tuple[Count, ...], Field(min_length=1)]  # the teachers, rows of this sweep that are trained before
    temperature: Positive = 1.0  # divides the logits of teachers and student
    weight: Probability = 1.0  # the teachers' part of the loss; the labels have the rest


@closed
class Regularizer:
    """configs/regularizer/*.yaml: Appendix L, and the ViT-G protocol's EMAs."""

    ema: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()  # decays per step, each of them kept
    # decays start low: after t steps at most (1 + t) / (10 + t), TensorFlow's num_updates
    ema_ramp: Annotated[bool, Needs("regularizer.ema")] = False
    swa: Swa | None = None
    sam: Sam | None = None
    distill: Distill | None = None
    ingredient: str = "raw"  # which weights the recipes get: raw, swa, or ema_<decay> as in ema_0.999

    @model_validator(mode="after")
    def ingredient_is_made(self) -> "Regularizer":
        """The recipes get weights that exist."""
        if self.ingredient not in self.made:
            raise ValueError(f"regularizer.ingredient={self.ingredient} is not made; there are {', '.join(self.made)}")
        return self

    @property
    def made(self) -> tuple[str, ...]:
        """The kinds of weights that a row leaves."""
        return ("raw", *(["swa"] if self.swa else []), *(f"ema_{decay}" for decay in self.ema))


def arithmetic(precision: str, *, tf32: bool) -> str:
    """What forward passes are computed in, as it names their results: a precision, or tf32 in place of fp32.

    >>> arithmetic("fp32", tf32=True), arithmetic("bf16", tf32=True)
    ('tf32', 'bf16')
    """
    return "tf32" if tf32 and precision == "fp32" else precision


@closed
class Compute:
    """configs/compute/*.yaml: how a row is computed. Its weights depend on the precision and on how images are read."""

    precision: Literal["fp32", "bf16", "fp16"]  # in forward passes; weights and optimiser are float32
    eval_precision: Literal["fp32", "bf16", "fp16"] | None = None  # at evaluation; null: `precision`
    micro_batch: Count | None  # images a forward pass on one process; null: all of the process's share at once
    strategy: Literal["ddp", "fsdp"]  # with several processes: whole copies, or sharded parameters (FSDP2)
    compile: bool  # torch.compile
    channels_last: Annotated[bool, IMAGES_IF_TYPED]  # memory format of images and convolutions
    gradient_checkpointing: bool  # forward passes of blocks are done again in the backward pass, to save memory
    eval_batch: Count | None  # images a forward pass at evaluation; null: as many as fit into the GPU's memory
    # a folder for uint8 copies of decoded images under fixed transforms; null: decode each time
    decoded: Annotated[Path | None, IMAGES_IF_TYPED]
    # processes that decode and augment, for each training process; 0: in the process itself
    loader_workers: Annotated[Natural, IMAGES_IF_TYPED]
    save_every: Natural  # steps between two states on disk; 0: at the end of each epoch only
    # reads training images; PyTorch resizes what simplejpeg decodes
    decoder: Annotated[Literal["pillow", "simplejpeg"], PHOTOGRAPHS] = "pillow"
    # pixels of the shorter side of copies that training reads, made once; null: none
    resized: Annotated[Count | None, PHOTOGRAPHS] = None
    resized_quality: Annotated[int, Field(ge=1, le=100), RESIZED] = 90  # JPEG quality of these copies
    resized_to: Annotated[Path, RESIZED] = Path("runs/resized")  # a folder for these copies, of all data sets
    tf32: bool = False  # on GPUs: products and convolutions of float32 with 10 bits of mantissa, which is faster
    deterministic: bool = False  # on GPUs: the same bits each time, by slower kernels; without, sums change their order

    @property
    def evaluates_in(self) -> Literal["fp32", "bf16", "fp16"]:
        """The precision of evaluation's forward passes."""
        return self.eval_precision or self.precision


@closed
class LogUniform:
    """10 to the power of a uniform exponent in [low, high)."""

    kind: Literal["log10_uniform"]
    low: float
    high: float


@closed
class ZeroOrUniform:
    """0 with probability `zero`, else uniform in [low, high)."""

    kind: Literal["zero_or_uniform"]
    zero: Probability
    low: float
    high: float


@closed
class Integers:
    """Uniform over low, low + 1, ..., high."""

    kind: Literal["integers"]
    low: int
    high: int


@closed
class Choice:
    """Uniform over a list; a value that stands there twice is twice as likely."""

    kind: Literal["choice"]
    values: Annotated[tuple[int | float | str, ...], Field(min_length=1)]


AnyLaw = LogUniform | ZeroOrUniform | Integers | Choice


def _ordered(law: AnyLaw) -> AnyLaw:
    if not isinstance(law, Choice) and law.low > law.high:
        raise ValueError(f"low={law.low:g} is above high={law.high:g}")
    return law


Distribution = Annotated[AnyLaw, Field(discriminator="kind"), AfterValidator(_ordered)]


@closed
class Sweep:
    """configs/sweep/*.yaml: row 0 is the initialisation, the others are fine-tuned.

    Rows differ by what is listed, in a file or here, times a grid, or by draws, or by their random stream alone.
    """

    rows: Count | None = None  # how many are drawn or in the file; null for lists and grids, which have their own
    seed: int = 0
    draw: dict[Group, dict[str, Distribution]] = Field(default_factory=dict)  # group -> field -> its distribution
    listed: tuple[dict[Group, dict[str, Any]], ...] = ()  # for each row, group -> field -> value
    grid: dict[Group, dict[str, tuple[Any, ...]]] = Field(default_factory=dict)  # all combinations, the last fastest
    file: Path | None = None  # a csv in place of `listed`: a row a line, columns named as in optim.lr
    best_of: Path | None = None  # the folder of another experiment's run: optim and augment are those of its best row
    index: Natural | None = None  # train this row only, as an array job does
    # a folder with model_<row>.pt: rows are not trained but are the authors' released ones
    imported: Path | None = None

    @model_validator(mode="after")
    def rows_come_from_one_place(self) -> "Sweep":
        """Draws and lists do not mix, and something says how many rows there are."""
        if (self.listed or self.grid or self.file) and self.draw:
            raise ValueError("a sweep draws its rows or lists them (listed, grid, file), not both: type '~sweep.draw'")
        if self.listed and self.file:
            raise ValueError("sweep.listed and sweep.file exclude each other")
        if (self.rows is None) != bool(self.listed or self.grid):
            raise ValueError("sweep.rows says how many rows are drawn or in the file; with listed and grid it is null")
        return self

    @property
    def size(self) -> int:
        """How many fine-tuned rows there are."""
        if self.rows is not None:
            return self.rows
        combinations = math.prod(len(values) for fields in self.grid.values() for values in fields.values())
        return max(1, len(self.listed)) * combinations

    @property
    def varied(self) -> set[str]:
        """Dotted names of the fields that the rows have values of their own for, as in optim.lr.

        Raises:
            UserError: the sweep's file is missing or damaged.
        """
        lines = read_table(self.file) if self.file is not None else self.listed
        groups = [*lines, self.grid, self.draw]
        return {f"{group}.{field}" for fields_of in groups for group, fields in fields_of.items() for field in fields}
