"""From the classes of a network to those that a split reports: some of them, or several counted as one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError


@dataclass(frozen=True)
class LabelSpace:
    """Reported class j is the network's classes `ids[j]`, whichever of them has the highest logit.

    Raises:
        ValueError: no reported class, one without ids, or an id that is not in [0, size).

    Source: ImageNet-R and -A are reported over their own 200 classes (Hendrycks et al. 2021), ObjectNet over 113 that
    are 125 of ImageNet's (Barbu et al. 2019); no other logit takes part.
    """

    ids: tuple[tuple[int, ...], ...]
    size: int  # C, how many classes the network has

    def __post_init__(self) -> None:
        if not self.ids or not all(self.ids):
            raise ValueError("each reported class needs one of the network's, and there must be one")
        if not all(0 <= i < self.size for several in self.ids for i in several):
            raise ValueError(f"ids must be in [0, {self.size}), got {self.ids}")

    @classmethod
    def subset(cls, ids: Sequence[int], size: int) -> "LabelSpace":
        """Only the classes `ids`, reported in this order."""
        return cls(tuple((i,) for i in ids), size)

    def __len__(self) -> int:
        return len(self.ids)

    def project(self, logits: Tensor) -> Tensor:
        """(N, C) logits of the network to (N, len(ids)) of the reported classes.

        >>> LabelSpace(((2, 0), (3,)), 4).project(torch.tensor([[1.0, 9.0, 3.0, 2.0]]))
        tensor([[3., 2.]])

        Raises:
            ValueError: C is not `size`.
        """
        if logits.ndim != 2 or logits.shape[1] != self.size:
            raise ValueError(f"need (N, {self.size}) logits, got {tuple(logits.shape)}")
        most = max(map(len, self.ids))
        # A class with fewer ids than another names its first again, which does not change a maximum.
        padded = torch.tensor([[*several, *several[:1] * (most - len(several))] for several in self.ids])
        return logits[:, padded.to(logits.device)].amax(dim=2)

    def of_classes(self, ids: Sequence[int]) -> tuple["LabelSpace", tuple[int, ...]]:
        """What is left for a network of the classes `ids` alone, and which reported classes that are.

        A reported class stays while one of its ids does.

        Raises:
            UserError: none is left.
        """
        place = {old: new for new, old in enumerate(ids)}
        left = [tuple(place[i] for i in several if i in place) for several in self.ids]
        kept = tuple(j for j, several in enumerate(left) if several)
        if not kept:
            raise UserError("task.classes and task.parts leave a split without any class: take more, or drop the split")
        return LabelSpace(tuple(left[j] for j in kept), len(ids)), kept


def project(space: LabelSpace | None, logits: Tensor) -> Tensor:
    """Logits over what a split reports; without a space of its own, that is the network's classes."""
    return logits if space is None else space.project(logits)
