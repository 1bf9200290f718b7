"""What a killed recipe has already found out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from store.atomic import read_jsonl, write_jsonl
from store.runs import digest_of
from store.weights import Weights, digest


class Journal:
    """Results of candidates already tried, on disk as they come, so that a restart pays for none twice.

    A recipe is deterministic: a restart asks for the same candidates in the same order, and finds them here.
    """

    def __init__(self, path: Path, prefix: str = ""):
        """Args: where it is kept; and what results depend on beside the weights, where the path does not say it."""
        self.path, self.prefix = path, prefix
        self.rows: list[dict[str, Any]] = read_jsonl(path) if path.exists() else []
        self._known = {row["key"]: row["result"] for row in self.rows}

    def _lookup(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
            self.rows.append({"key": key, "result": self._known[key]})
            write_jsonl(self.path, self.rows)
        return self._known[key]

    def remembered(self, score: Callable[[Weights], float]) -> Callable[[Weights], float]:
        """`score`, but looked up where the same weights were scored before."""
        return lambda weights: self._lookup(self.prefix + digest(weights), lambda: score(weights))

    def remembered_images(
        self, images_correct: Callable[[Weights, Tensor], Tensor]
    ) -> Callable[[Weights, Tensor], Tensor]:
        """The same for results on some of the images, (n,) bool."""

        def lookup(weights: Weights, images: Tensor) -> Tensor:
            key = f"{digest(weights)}/{digest_of(images.tolist())}"
            return torch.tensor(self._lookup(key, lambda: images_correct(weights, images).tolist()))

        return lookup
