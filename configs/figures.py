"""Settings of tables, and of the figures that need forward passes: means of two models, and planes through three."""

from typing import Annotated, Literal

from pydantic import Field

from configs.fields import Count, NonNegative, Positive, closed


@closed
class Angles:
    """Figure 3: fine-tuned models that differ in one thing, in pairs."""

    # angles are over matrices and convolutions of the blocks (Appendix J.1's "repeated weights"), these with gains and
    # biases, or all parameters
    weights: Literal["repeated", "blocks", "all"] = "repeated"
    below_lr: Positive | None = None  # leave out models of this learning rate and above, the paper's 1e-4; null: none
    several: bool = False  # also pairs that differ in more than one thing


@closed
class Pairs:
    """Figure 4: random pairs of fine-tuned models."""

    count: Count = 100  # how many at most; a larger number keeps the pairs of a smaller one


@closed
class Plane:
    """Figures 2 and J.1: the error landscape in planes through the initialisation and two fine-tuned models."""

    rows: Annotated[tuple[tuple[Count, Count], ...], Field(min_length=1)] = ((1, 2), (1, 3))  # two models of each plane
    size: Annotated[int, Field(ge=3)] = 15  # points on the axis along which the models reach less far
    longest: Annotated[int, Field(ge=3)] = 15  # and at most on the other, which has as many as its spacing then needs
    margin: NonNegative = 0.25  # around the three models, as a share of how far they reach on each axis
    train_examples: Count = 10_000  # on which the training loss is measured, under the transform of evaluation
    chunk: Count = 1024  # examples that are read together for all points, between two saves


@closed
class Theory:
    """Figure K.1: approximation (1) against the truth, in the pairs of Appendix K.4."""

    # those of the rows that pairs are made of; four panels leave out the highest
    learning_rates: tuple[Positive, ...] = (1e-4, 1e-5, 1e-6)
    alphas: Annotated[int, Field(ge=5)] = 11  # equidistant, 0 and 1 among them
    # how the loss bends along a pair, from the losses at neighbouring alphas, or by second derivatives of the network,
    # which must be smooth (no relu)
    curvature: Literal["differences", "exact"] = "exact"


@closed
class Analysis:
    """How tables state their uncertainty, and what figures measure."""

    resamples: Count = 10_000  # how many the paired bootstrap takes
    bins: Count = 15  # for calibration errors, with as many examples in each; how many the paper has is not known
    oracle: bool = False  # a row with the best individual model on each test set, labelled so, as in Table 4
    seed: int = 0
    note: str = ""  # a sentence that captions end with, on what to keep in mind of these models
    labels: tuple[str, ...] = ()  # names of the rows 1, 2, ... in a table of rows; the first is its baseline
    sets: dict[str, tuple[Count, ...]] = Field(default_factory=dict)  # rows whose soup and ensemble join that table
    angles: Angles
    pairs: Pairs
    plane: Plane
    theory: Theory
