"""What a killed recipe has already found out."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soups.errors import UserError
from soups.files.atomic import digest_of, read_jsonl, write_jsonl

if TYPE_CHECKING:
    from torch import Tensor

    from soups.files.weights import Weights


class Journal:
    """Results of candidates already tried, on disk as they come, so that a restart pays for none twice.

    A recipe is deterministic: a restart asks for the same candidates in the same order, and finds them here.
    """

    def __init__(self, path: Path | None):
        """Args: where it is kept, if anywhere."""
        self.path = path
        try:
            rows = read_jsonl(path) if path is not None and path.exists() else []
            self.known: dict[str, Any] = {row["key"]: row["result"] for row in rows}
        except (IsADirectoryError, KeyError, TypeError):
            raise UserError(
                f"{path} is no journal of scores: name another file, or one that is not there yet"
            ) from None

    def keep(self, key: str, result: Any) -> None:
        """Remember a result, on disk too."""
        self.known[key] = result
        if self.path is not None:
            write_jsonl(self.path, [{"key": key, "result": result} for key, result in self.known.items()])

    def _lookup(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.keep(key, compute())
        return self.known[key]

    def remembered(self, score: "Callable[[Weights], float]") -> "Callable[[Weights], float]":
        """`score`, but looked up where the same weights were scored before."""
        from soups.files.weights import digest  # noqa: PLC0415  # torch takes seconds, and a command needs none of it

        return lambda weights: self._lookup(digest(weights), lambda: score(weights))

    def remembered_images(
        self, images_correct: "Callable[[Weights, Tensor], Tensor]"
    ) -> "Callable[[Weights, Tensor], Tensor]":
        """The same for results on some of the images, (n,) bool."""
        import torch  # noqa: PLC0415

        from soups.files.weights import digest  # noqa: PLC0415

        def lookup(weights: "Weights", images: "Tensor") -> "Tensor":
            key = f"{digest(weights)}/{digest_of(images.tolist())}"
            return torch.tensor(self._lookup(key, lambda: images_correct(weights, images).tolist()))

        return lookup
