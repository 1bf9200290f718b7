"""Model Stock: how far to go from the initialisation to the mean, told by the angles between fine-tuned models.

Source: Jang et al. 2024, Section 4. Theirs is for layers; a layer here is a tensor, as in their code, and for k > 2 the
cosine is the mean over pairs. One below 0, which their geometry excludes and noise may give, counts as 0.
"""

from collections.abc import Sequence

import torch

from soups.conformance import common_layout
from soups.files.reading import Reading
from soups.files.weights import Weights, checkpoint_of

BLOCK = 1 << 16  # elements of each model looked at together


def ratio(cosine: float, models: int) -> float:
    """Share of the mean of k models: k cos / ((k - 1) cos + 1), and 0 for a cosine that is not positive.

    >>> ratio(0.5, 2), ratio(1.0, 7), ratio(0.0, 3)
    (0.6666666666666666, 1.0, 0.0)
    """
    return models * cosine / ((models - 1) * cosine + 1) if cosine > 0 else 0.0


def stock_row(ratio: float, models: int) -> list[float]:
    """Weights of the start and of k models, whose mean has this share."""
    return [1 - ratio, *[ratio / models] * models]


def _mean_cosine(name: str, start: Weights, models: Sequence[Weights]) -> float:
    """Mean cosine over pairs of changes from the start; a model that did not move has no angle."""
    origin = start[name].reshape(-1).split(BLOCK)
    parts = [model[name].reshape(-1).split(BLOCK) for model in models]
    gram = torch.zeros(len(models), len(models), dtype=torch.float64)
    for block, zero in enumerate(origin):
        changes = torch.stack([part[block].double() - zero.double() for part in parts])  # (k, n)
        gram += changes @ changes.T
    lengths = gram.diagonal().sqrt()
    moved = (lengths > 0).nonzero().flatten()
    if len(moved) < 2:
        return 1.0
    cosines = (gram / lengths.outer(lengths))[moved][:, moved]
    above = torch.ones_like(cosines, dtype=torch.bool).triu(diagonal=1)
    return cosines[above].mean().item()


def stock_cosines(start: Weights, models: Sequence[Weights], reading: Reading | None = None) -> dict[str, float]:
    """Of each floating-point tensor that is averaged the mean cosine over pairs of models' changes from the start.

    In [-1, 1]; 1 where fewer than two models moved.
    """
    found = [checkpoint_of(f"model {i}", weights) for i, weights in enumerate((start, *models))]
    layout = common_layout(found, reading)
    averaged = layout.entries.keys() - set(layout.kept)
    names = [name for name in start if layout.ties.get(name, name) in averaged]
    return {name: _mean_cosine(name, start, models) for name in names if start[name].is_floating_point()}
