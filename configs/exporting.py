"""The settings of `python -m soups.experiment.export`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, model_validator

from configs.errors import UserError
from configs.fields import closed
from configs.schema import checked

Target = Literal["timm", "open_clip", "transformers", "onnx"]


@closed
class Export:
    """Which soup, for which library, where to."""

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


def parse_export(words: Sequence[str]) -> Export:
    """Check and freeze the settings of a command line, as in ["soup=runs/demo/soups/greedy", "to=onnx", "out=FOLDER"].

    Raises:
        UserError: an unknown setting, a missing value, a wrong type.
    """
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(words)))
    missing = [name for name in ("soup", "to", "out") if values.get(name) is None]
    if missing:
        raise UserError(f"{missing[0]} has no value: type, for example, soup=runs/demo/soups/greedy to=onnx out=FOLDER")
    return checked(Export, values)
