"""What settings are made of: closed dataclasses, numbers with limits, and what a setting needs to have an effect."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# A text may be typed as a number, which Hydra makes of 2024.
closed = dataclass(config=ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True), kw_only=True)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Needs:
    """Annotates a setting, or a group of them, that is ignored unless another setting has one of some values.

    Args:
        setting: the other one, as in "optim.kind".
        values: those of which some row must have one; none: that setting must be on, which is not null, 0 or empty.
        typed_only: it counts as given only where it is typed, because a file gives it a value that others leave.
    """

    def __init__(self, setting: str, *values: str | None, typed_only: bool = False) -> None:
        self.setting, self.values, self.typed_only = setting, values, typed_only

    def __str__(self) -> str:
        values = ["null" if value is None else value for value in self.values]
        return f"{self.setting}={either(values)}" if values else self.setting


def either(options: Sequence[str]) -> str:
    """Words as a list.

    >>> either(["sgd", "adam", "adamw"])
    'sgd, adam or adamw'
    """
    return f"{', '.join(options[:-1])} or {options[-1]}" if len(options) > 1 else options[0]


def default_of(kind: type, setting: str) -> Any:
    """A setting's default; `pydantic_core.PydanticUndefined` where it has none."""
    return kind.__pydantic_fields__[setting].get_default(call_default_factory=True)  # type: ignore[attr-defined]


def kinds_in(annotation: Any) -> list[type]:
    """The dataclasses that a value of this type may be; none where it is no group of settings."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return [annotation]
    if get_origin(annotation) in (tuple, dict):
        return []
    return [kind for part in get_args(annotation) for kind in kinds_in(part)]


def typed_fields(kind: type) -> dict[str, Any]:
    """Field of a dataclass -> its type, with what is annotated."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def needs_in(annotation: Any) -> Needs | None:
    """What a setting of this type needs to have an effect."""
    return next((each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, Needs)), None)
