"""The settings of `python -m soups.experiment.export`: which soup, for which library, where to."""

from pathlib import Path
from typing import Annotated, Literal

from omegaconf import DictConfig
from pydantic import Field, model_validator

from configs.fields import closed
from configs.schema import checked, plain

Target = Literal["timm", "open_clip", "transformers", "onnx"]


@closed
class Export:
    """configs/export.yaml."""

    soup: Path  # runs/<name>/soups/<recipe> or runs/<name>/ingredients/<iii>
    to: Target  # the library that is to load it
    out: Path  # a folder that is not there yet
    license: Annotated[str, Field(pattern=r"^[a-z0-9.\-]+$")] = "other"  # the weights' licence, in the hub's words
    classes: tuple[str, ...] | None = None  # names by class id, where the data that have them are not here

    @model_validator(mode="after")
    def can_be_written(self) -> "Export":
        """An export never lands inside the soup that it is made from."""
        if self.out.resolve() == self.soup.resolve():
            raise ValueError("out=FOLDER is the soup itself")
        return self


def parse_export(cfg: DictConfig) -> Export:
    """Check and freeze Hydra's answer to configs/export.yaml.

    Raises:
        UserError: an unknown key, a missing value, a wrong type.
    """
    return checked(Export, plain(cfg, "e.g. soup=runs/demo/soups/greedy to=onnx out=FOLDER"))
