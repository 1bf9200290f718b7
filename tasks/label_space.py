"""Label spaces of test sets that show other classes than the model's: some of them, or several in one."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LabelSpace:
    """Each reported class is the largest of some of the model's logits.

    >>> both = LabelSpace(ids=((2,), (0, 3)), size=4)
    >>> both.project(torch.tensor([[1.0, 9.0, 2.0, 3.0]]))
    tensor([[2., 3.]])
    """

    ids: tuple[tuple[int, ...], ...]  # of each reported class, the model's classes that mean it
    size: int  # how many classes the model has

    def __post_init__(self) -> None:
        wrong = [each for each in self.ids if not each or not all(0 <= i < self.size for i in each)]
        if wrong:
            raise ValueError(f"a reported class needs ids in [0, {self.size}), got {wrong[0]}")

    @classmethod
    def subset(cls, ids: tuple[int, ...], size: int) -> "LabelSpace":
        """Some of the model's classes, in this order; all others are masked, as for ImageNet-R and -A."""
        return cls(tuple((i,) for i in ids), size)

    def project(self, logits: Tensor) -> Tensor:
        """(N, size) raw logits to (N, len(ids)).

        Raises:
            ValueError: logits over another number of classes.
        """
        if logits.ndim != 2 or logits.shape[1] != self.size:
            raise ValueError(f"need (N, {self.size}) logits, got {tuple(logits.shape)}")
        found = logits[:, [each[0] for each in self.ids]]
        for j, each in enumerate(self.ids):
            if len(each) > 1:
                found[:, j] = logits[:, list(each)].amax(dim=1)
        return found
