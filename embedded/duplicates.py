"""Near-duplicates: pictures that differ less than two designers' drawings of one thing do."""

from collections.abc import Iterator, Sequence

import numpy as np

THRESHOLD = 5.0  # mean absolute difference of thumbnails, in grey levels of 255; see README.md for how it was set


def thumbnails(images: np.ndarray) -> np.ndarray:
    """16 x 16 block means: (N, 64, 64, 3) uint8 -> (N, 768) float32."""
    blocks = images.reshape(len(images), 16, 4, 16, 4, 3)
    return blocks.mean(axis=(2, 4), dtype=np.float64).reshape(len(images), -1).astype(np.float32)


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean absolute difference of every pair: (N, D), (M, D) -> (N, M), in grey levels."""
    return np.stack([np.abs(second - row).mean(axis=1) for row in first]) if len(first) else np.zeros((0, len(second)))


def near(first: np.ndarray, second: np.ndarray, threshold: float = THRESHOLD) -> Iterator[tuple[int, int, float]]:
    """Pairs (i, j, distance) of pictures that are closer than `threshold`.

    Args:
        first, second: (N, 64, 64, 3) and (M, 64, 64, 3) uint8.
    """
    apart = distances(thumbnails(first), thumbnails(second))
    for i, j in np.argwhere(apart < threshold):
        yield int(i), int(j), float(apart[i, j])


def distinct(images: Sequence[np.ndarray], threshold: float = THRESHOLD) -> list[int]:
    """Indices of the pictures that are not near an earlier kept one; the first is always kept."""
    small = thumbnails(np.stack(images))
    kept: list[int] = []
    for i in range(len(small)):
        if not kept or distances(small[i : i + 1], small[kept]).min() >= threshold:
            kept.append(i)
    return kept


def confusable(drawings: Sequence[dict[str, np.ndarray]], threshold: float = 2.0, num_designs: int = 2) -> list[str]:
    """Concepts that at least `num_designs` designs draw like an earlier concept, as it is or mirrored.

    Args:
        drawings: one mapping per design, concept -> (64, 64, 3) uint8. The concepts' order is that of the first
            design that has them; the earlier concept of a pair stays.

    Mirrored pairs (the two halves of the moon) count because training mirrors pictures.
    """
    order = list(dict.fromkeys(name for design in drawings for name in design))
    votes: dict[tuple[str, str], int] = {}
    for design in drawings:
        names = [name for name in order if name in design]
        images = np.stack([design[name] for name in names])
        small, mirrored = thumbnails(images), thumbnails(images[:, :, ::-1])
        apart = np.minimum(distances(small, small), distances(small, mirrored))
        for i, j in np.argwhere(np.triu(apart < threshold, k=1)):
            votes[names[i], names[j]] = votes.get((names[i], names[j]), 0) + 1
    dropped: list[str] = []
    for first, second in sorted((p for p, n in votes.items() if n >= num_designs), key=lambda p: order.index(p[1])):
        if first not in dropped and second not in dropped:
            dropped.append(second)
    return dropped
