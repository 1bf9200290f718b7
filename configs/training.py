"""Settings of what a row trains: network, optimiser, augmentation, regularisation, and the sweep that varies them."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from configs.tables import read_table

closed = dataclass(config=ConfigDict(extra="forbid", frozen=True), kw_only=True)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


def default_of(kind: type, setting: str) -> Any:
    """A setting's default; `pydantic_core.PydanticUndefined` where it has none."""
    return kind.__pydantic_fields__[setting].get_default(call_default_factory=True)  # type: ignore[attr-defined]


EMBEDDED = ("emoji_clip", "imagenet_lite0", "minilm")  # from files of the project or of a package
PROMPTED = ("masked_lm", "seq2seq_lm")  # language models that answer a prompt, by transformers
READERS = ("minilm", "text_encoder", *PROMPTED)  # kinds of models that read texts
SMALLEST_FACTORED = 32  # of optim.kind=adafactor: narrower matrices keep whole second moments, as in Big Vision

Group = Literal["task", "model", "optim", "augment", "regularizer"]  # what a sweep may vary


@closed
class Model:
    """configs/model/*.yaml: a pretrained image tower or encoder of texts with the head that is put on it, or a
    language model that answers prompts.
    """

    kind: Literal[
        "emoji_clip",
        "imagenet_lite0",
        "minilm",
        "open_clip",
        "timm",
        "transformers",
        "text_encoder",
        "masked_lm",
        "seq2seq_lm",
    ]
    name: str | None = None  # as the library calls it, transformers for the last four; null for the embedded kinds
    pretrained: str | None = None  # of open_clip: which of the weights that it knows for `name`
    weights: Path | None = None  # a local file or folder, in place of the library's download
    proxy_for: str | None = None  # the paper's model in whose place it stands; named wherever its numbers are
    image_size: Count  # pixels, square, of training crops
    max_length: Annotated[int, Field(ge=16)] = 128  # tokens of a text, of which the longest field is shortened
    eval_size: Count | None = None  # pixels, square, at evaluation; null: image_size
    eval_resize: Count | None = None  # to which an image is resized before the centre crop; null: eval_size
    squash: bool = False  # at evaluation: resize both sides, not the shorter one
    normalize: bool  # features have unit norm before the head, as the authors' wrapper around CLIP has it
    # the initialisation of the classifier (Section 3.1); prompt: there is none, a language model answers (Appendix J.5)
    head: Literal["linear_probe", "zero_shot", "random", "prompt"]
    templates: Literal["openai", "emoji", "sentiment", "name"] | None = None  # prompts of the zero-shot model: CLIP's
    # 80, icons', of opinions, the class name alone; null: there is none, as of towers without text
    head_of: str | None = None  # a run in paths.runs: a row starts with the head of that run's row 0, not of its own
    train_head: bool = True  # false: the head stays as it was initialised (Appendix E)
    frozen_stages: Annotated[int, Field(ge=0, le=7)] = 0  # of emoji_clip: stem and this many stages get no gradient
    frozen_batch_norm: bool = True  # batch norms keep the pretrained statistics, in every ingredient the same
    probe_loss: Literal["softmax", "bce"] = (
        "softmax"  # of the linear probe; bce is a binary one for each class, for rows
    )
    # that are trained with optim.loss=bce (Appendix J.2.3)
    probe_c: tuple[Positive, ...]  # inverse regularisation of the linear probe; the best on held-out is taken

    @model_validator(mode="after")
    def names_what_its_library_needs(self) -> "Model":
        """A library's model has a name; the embedded ones have none; only dual encoders have a zero-shot head."""
        if (self.name is None) != (self.kind in EMBEDDED):
            raise ValueError(f"model.kind={self.kind} {'has no name' if self.name else 'needs model.name'}")
        if self.frozen_stages and self.kind != "emoji_clip":
            raise ValueError("model.frozen_stages is for the embedded model")
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
    decay: Literal["weights", "all"] = "weights"  # what weight_decay shrinks: all but biases and norms, or all
    # parameters, as the authors' script does
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of sgd, rmsprop and adafactor
    schedule: Literal["cosine", "constant", "linear", "cosine_restarts"] = "cosine"  # after the warm-up
    cycles: Count = 1  # of cosine_restarts
    epochs: Count
    steps: Count | None = None  # how long it trains, in place of epochs
    batch_size: Annotated[int, Field(ge=2, multiple_of=2)]  # images per step over all GPUs; even, for mixup's pairs
    warmup_steps: Natural  # linear from lr / warmup_steps
    clip_norm: Positive | None  # of the whole gradient; null: not clipped
    loss: Literal["softmax", "bce", "likelihood"] = "softmax"  # cross-entropy, a binary one for each class, or that of
    # the answer's tokens over the whole vocabulary, of prompts
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    mixup: NonNegative  # alpha of the Beta distribution; 0 is off
    cutmix: NonNegative = 0.0  # alpha; 0 is off; with both on, each batch takes one of them by a fair coin
    seed: Natural | None = None  # names data order and augmentation; null: each row has its own
    evaluate_every: Natural = 0  # steps between looks at held-out during training; 0: never
    keep: Literal["last", "best"] = "last"  # which weights a row ends with: the last, or the best looked at

    @model_validator(mode="after")
    def best_is_looked_for(self) -> "Optim":
        """A best checkpoint needs evaluations to be the best of."""
        if self.keep == "best" and self.evaluate_every == 0:
            raise ValueError("optim.keep=best needs optim.evaluate_every")
        return self


@closed
class Augment:
    """configs/augment/*.yaml"""

    kind: Literal["minimal", "medium", "rand", "auto", "stochastic", "none"]  # none: of texts
    crop: Annotated[float, Field(gt=0, le=1)] | None = None  # smallest share of the image that a random crop keeps;
    # null: 0.9 of minimal (Appendix J.2.1), 0.08 of the others, timm's
    aspect: Annotated[float, Field(gt=0, le=1)] = 0.75  # narrowest crop, width to height; the widest is its inverse
    flip: Probability = 0.5  # horizontal; of all kinds but minimal
    color_jitter: NonNegative = 0.0  # of medium: brightness, contrast and saturation change by up to this share
    magnitude: Annotated[int, Field(ge=0, le=30)] = 0  # of rand: RandAugment's M
    layers: Annotated[int, Field(ge=0, le=8)] = 0  # of rand: RandAugment's N
    magnitude_max: Annotated[int, Field(ge=1, le=30)] = 10  # of rand: M acts up to this; 10 is timm's own limit
    increasing: bool = True  # of rand: timm's inc1, where every operation is stronger at a larger M
    fill: Literal["white", "mean"] = "white"  # of rand and auto: what comes from beyond the image's edges; mean: the
    # colour that the model subtracts, as in timm
    last_epochs_minimal: Natural = 0  # fix-aug (Table L.2): the last epochs see crops of 90 % and more, nothing else
    among: tuple["Augment", ...] = ()  # of stochastic: each sample gets one of these, all equally likely (Table L.1)

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

    rows: Annotated[tuple[Count, ...], Field(min_length=1)]  # of this sweep, trained before: the teachers
    temperature: Positive = 1.0  # of teachers and student
    weight: Probability = 1.0  # of the teachers; the labels have the rest


@closed
class Regularizer:
    """configs/regularizer/*.yaml: Appendix L, and the ViT-G protocol's EMAs."""

    ema: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()  # decays per step, each of them kept
    ema_ramp: bool = False  # decays start low: after t steps at most (1 + t) / (10 + t), TensorFlow's num_updates
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

    precision: Literal["fp32", "bf16", "fp16"]  # of forward passes; weights and optimiser are float32
    eval_precision: Literal["fp32", "bf16", "fp16"] | None = None  # of evaluation; null: `precision`
    micro_batch: Count | None  # images a forward pass on one process; null: all of the process's share at once
    strategy: Literal["ddp", "fsdp"]  # with several processes: whole copies, or sharded parameters (FSDP2)
    compile: bool  # torch.compile
    channels_last: bool  # memory format of images and convolutions
    gradient_checkpointing: bool  # forward passes of blocks are done again in the backward pass, to save memory
    eval_batch: Count | None  # images a forward pass at evaluation; null: as many as fit into the GPU's memory
    decoded: Path | None  # a folder for uint8 copies of decoded images under fixed transforms; null: decode each time
    loader_workers: Natural  # processes that decode and augment, for each training process; 0: in the process itself
    save_every: Natural  # steps between two states on disk; 0: at the end of each epoch only
    decoder: Literal["pillow", "simplejpeg"] = "pillow"  # of training images; PyTorch resizes what simplejpeg decodes
    resized: Count | None = None  # pixels of the shorter side of copies that training reads, made once; null: none
    resized_quality: Annotated[int, Field(ge=1, le=100)] = 90  # JPEG quality of these copies
    resized_to: Path = Path("runs/resized")  # a folder for these copies, of all data sets
    tf32: bool = False  # on GPUs: products and convolutions of float32 with 10 bits of mantissa, which is faster
    deterministic: bool = False  # on GPUs: the same bits each time, by slower kernels; without, sums change their order

    @property
    def evaluates_in(self) -> Literal["fp32", "bf16", "fp16"]:
        """The precision of evaluation's forward passes."""
        return self.eval_precision or self.precision


Ends = TypeVar("Ends", "LogUniform", "ZeroOrUniform", "Integers")


def _ordered(law: Ends) -> Ends:
    if law.low > law.high:
        raise ValueError(f"low={law.low:g} is above high={law.high:g}")
    return law


@closed
class LogUniform:
    """10 to the power of a uniform exponent in [low, high)."""

    kind: Literal["log10_uniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def ends_are_in_order(self) -> "LogUniform":
        """From low to high."""
        return _ordered(self)


@closed
class ZeroOrUniform:
    """0 with probability `zero`, else uniform in [low, high)."""

    kind: Literal["zero_or_uniform"]
    zero: Probability
    low: float
    high: float

    @model_validator(mode="after")
    def ends_are_in_order(self) -> "ZeroOrUniform":
        """From low to high."""
        return _ordered(self)


@closed
class Integers:
    """Uniform over low, low + 1, ..., high."""

    kind: Literal["integers"]
    low: int
    high: int

    @model_validator(mode="after")
    def ends_are_in_order(self) -> "Integers":
        """From low to high."""
        return _ordered(self)


@closed
class Choice:
    """Uniform over a list; a value that stands there twice is twice as likely."""

    kind: Literal["choice"]
    values: Annotated[tuple[int | float | str, ...], Field(min_length=1)]


Distribution = Annotated[LogUniform | ZeroOrUniform | Integers | Choice, Field(discriminator="kind")]


@closed
class Sweep:
    """configs/sweep/*.yaml: row 0 is the initialisation, the others are fine-tuned.

    Rows differ by what is listed, in a file or here, times a grid, or by draws, or by their random stream alone.
    """

    rows: Count | None = None  # how many are drawn; of lists and grids, how many there are is theirs
    seed: int = 0
    draw: dict[Group, dict[str, Distribution]] = Field(default_factory=dict)  # group -> field -> its distribution
    listed: tuple[dict[Group, dict[str, Any]], ...] = ()  # for each row, group -> field -> value
    grid: dict[Group, dict[str, tuple[Any, ...]]] = Field(default_factory=dict)  # all combinations, the last fastest
    file: Path | None = None  # a csv in place of `listed`: a row a line, columns named as in optim.lr
    best_of: Path | None = None  # the folder of another experiment's run: optim and augment are those of its best row
    index: Natural | None = None  # train this row only, as an array job does
    imported: Path | None = (
        None  # a folder with model_<row>.pt: rows are not trained but are the authors' released ones
    )

    @model_validator(mode="after")
    def rows_come_from_one_place(self) -> "Sweep":
        """Draws and lists do not mix, and something says how many rows there are."""
        if (self.listed or self.grid or self.file) and self.draw:
            raise ValueError("a sweep draws its rows or lists them (listed, grid, file), not both")
        if self.listed and self.file:
            raise ValueError("sweep.listed and sweep.file exclude each other")
        if (self.rows is None) != bool(self.listed or self.grid):
            raise ValueError("sweep.rows says how many rows are drawn or in the file; of listed and grid it is null")
        return self

    @property
    def size(self) -> int:
        """How many fine-tuned rows there are."""
        if self.rows is not None:
            return self.rows
        combinations = 1
        for fields in self.grid.values():
            for values in fields.values():
                combinations *= len(values)
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
