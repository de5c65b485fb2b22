"""What the sections of a recipe are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: Any) -> Any:
    """A float without a fraction is a whole number: 1e6 is how people write a million."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Strict, so that `true` and "8" in quotes are refused and not read as 1 and 8.
Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
