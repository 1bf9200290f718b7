"""Settings of the figures that need forward passes of their own: means of two models, and planes through three."""

from typing import Annotated, Literal

from pydantic import Field

from configs.training import Count, NonNegative, Positive, closed


@closed
class Angles:
    """Figure 3: fine-tuned models that differ in one thing, in pairs."""

    weights: Literal["repeated", "blocks", "all"] = "repeated"  # what angles are over: matrices and convolutions of the
    # blocks (Appendix J.1's "repeated weights"), these with gains and biases, or all parameters
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

    learning_rates: tuple[Positive, ...] = (1e-4, 1e-5, 1e-6)  # of the rows that pairs are made of; four panels leave
    # out the highest
    alphas: Annotated[int, Field(ge=5)] = 11  # equidistant, 0 and 1 among them
    # of the loss along a pair: from the losses at neighbouring alphas, or by second derivatives of the network, which
    # must be smooth (no relu)
    curvature: Literal["differences", "exact"] = "exact"
