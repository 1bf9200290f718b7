"""One split of an image benchmark, in memory."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels that are used together, with the digest of the file they came from."""

    name: str
    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) int64 class ids
    digest: str  # sha256 of the file, hexadecimal

    def __len__(self) -> int:
        return len(self.labels)
