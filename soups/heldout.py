"""Held-out examples by which a pool is scored or a soup is learned, before it is known what the pool is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from soups.errors import UserError
from soups.files.opening import opened
from soups.scoring import Metric, Scorer
from soups.sources import Pool

Kind = Literal["images", "texts", "choices", "perplexity"]


@dataclass(frozen=True)
class HeldOut:
    """Examples that neither trained the models nor will test the soup."""

    kind: Kind
    path: Path
    network: str | None = None  # timm:NAME, open_clip:NAME, transformers:FOLDER, function:module:name
    metric: Metric = "top1"
    batch_size: int | None = None
    image_size: int | None = None
    templates: str = "openai"
    columns: tuple[str, ...] = ("text",)
    label: str = "label"
    max_length: int | None = None
    per_token: bool = False
    workers: int | None = None

    def scorer(self, pool: Pool) -> Scorer:
        """How models of this pool are scored.

        Raises:
            UserError: examples, settings or a network that do not fit.
        """
        from soups.scorers.networks import network_name  # noqa: PLC0415  # torch takes seconds

        if not self.path.exists():
            raise UserError(f"--{self.kind} {self.path} does not exist")
        asked = network_name(self.network, self.image_size, self.templates) if self.network else None
        if self.kind != "images" and asked is not None and asked.kind != "transformers":
            raise UserError(f"--{self.kind} is read by networks of transformers: write --network transformers:FOLDER")
        size: dict[str, Any] = {} if self.batch_size is None else {"batch_size": self.batch_size}
        match self.kind:
            case "images":
                from soups.scorers.images import of_images  # noqa: PLC0415

                if asked is None:
                    raise UserError(
                        "--images needs --network timm:NAME, open_clip:NAME, transformers:FOLDER or "
                        "function:module:name; the library alone where a config lies beside the models"
                    )
                with opened([pool.paths[0]], pool.reading) as checkpoints:
                    entries = checkpoints[0].entries
                    names = [*entries, *checkpoints[0].ties]
                # ImageNet's head, whose classes keep their numbers where folders of some of them are missing.
                head = 1000 if any(entry.shape == (1000,) for entry in entries.values()) else None
                return of_images(
                    self.path, asked, pool.paths, names, head=head, metric=self.metric, workers=self.workers, **size
                )
            case "texts":
                from soups.scorers.texts import of_texts  # noqa: PLC0415

                size |= {} if self.max_length is None else {"max_length": self.max_length}
                return of_texts(
                    self.path, asked, pool.paths, columns=self.columns, label=self.label, metric=self.metric, **size
                )
            case "perplexity":
                from soups.scorers.language import of_perplexity  # noqa: PLC0415

                return of_perplexity(self.path, asked, pool.paths, max_length=self.max_length, **size)
            case "choices":
                from soups.scorers.language import of_choices  # noqa: PLC0415

                return of_choices(
                    self.path, asked, pool.paths, per_token=self.per_token, max_length=self.max_length, **size
                )
