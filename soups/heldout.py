"""Held-out examples by which a pool is scored or a soup is learned, before it is known what the pool is."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from soups.errors import UserError
from soups.scoring import Metric, Scorer
from soups.sources import Pool

MODULES = {"images": "images", "texts": "texts", "choices": "language", "perplexity": "language"}
NETWORKS = "write timm:NAME, open_clip:NAME, transformers:FOLDER or function:module:name"


@dataclass(frozen=True)
class HeldOut:
    """Examples that neither trained the models nor will test the soup; what is None is the scorer's to choose."""

    kind: Literal["images", "texts", "choices", "perplexity"]
    path: Path
    network: str | None = None  # timm:NAME, open_clip:NAME, transformers:FOLDER, function:module:name
    metric: Metric = "top1"  # of images and texts: what is counted
    batch_size: int | None = None  # examples of a forward pass
    image_size: int | None = None  # pixels, where the network does not say
    templates: str = "openai"  # of open_clip without a head: prompts around the class names, or `name` for them alone
    columns: tuple[str, ...] = ("text",)  # of texts: what is read; two are a pair
    label: str = "label"  # of texts: the column of class numbers, or of class names as in the network's config.json
    max_length: int | None = None  # tokens of a text or pair, of a window, of a prompt with a choice
    per_token: bool = False  # of choices: compare mean log-likelihoods of a token, not sums, which favour short choices
    workers: int | None = None  # processes that decode images; None: one for each core, at most 8

    @property
    def library(self) -> str:
        """What `network` says before the colon."""
        return (self.network or "").partition(":")[0]

    @property
    def name(self) -> str | None:
        """What `network` says behind the colon; None: a config beside the models says it."""
        return (self.network or "").partition(":")[2] or None

    def scorer(self, pool: Pool) -> Scorer:
        """How models of this pool are scored.

        Raises:
            UserError: examples, settings or a network that do not fit.
        """
        if not self.path.exists():
            raise UserError(f"--{self.kind} {self.path} does not exist")
        if self.network is not None and self.library not in ("timm", "open_clip", "transformers", "function"):
            raise UserError(f"--network {self.network}: {NETWORKS}")
        if self.library == "function" and (self.name or "").count(":") != 1:
            raise UserError(
                f"--network {self.network}: write function:module:name, as in function:torchvision.models:resnet18"
            )
        if self.kind != "images" and self.library not in ("", "transformers"):
            raise UserError(f"--{self.kind} is read by networks of transformers: write --network transformers:FOLDER")
        # Each loads torch and its library, which take seconds.
        made: Scorer = getattr(import_module(f"soups.scorers.{MODULES[self.kind]}"), f"of_{self.kind}")(self, pool)
        return made
