"""What pydantic finds wrong with a recipe, as lines for people: place, key, what is valid."""

from __future__ import annotations

import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mllm.recipe_yaml import Path_, RecipeError, Source, closest, nearest

T = TypeVar("T", bound=BaseModel)


def validated(schema: type[T], source: Source) -> T:
    """Return the values of a file as its schema says.

    Raises:
        RecipeError: one line for every unknown key, missing one or wrong type, with its place.
    """
    try:
        return schema.model_validate(source.values)
    except ValidationError as error:
        details = _causes(schema, error.errors())
        lines = [_explain(schema, source, detail) for detail in details]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def _causes(schema: type[BaseModel], details: list[ErrorDetails]) -> list[ErrorDetails]:
    """The errors without the keys that are missing because they were misspelt."""
    meant = {
        (*detail["loc"][:-1], closest(str(detail["loc"][-1]), _fields(schema, detail["loc"][:-1])))
        for detail in details
        if detail["type"] == "extra_forbidden"
    }
    return [item for item in details if item["type"] != "missing" or item["loc"] not in meant]


def _explain(schema: type[BaseModel], source: Source, detail: ErrorDetails) -> str:
    """One pydantic error as: place: key: what is wrong and what is valid."""
    path: Path_ = tuple(detail["loc"])
    dotted = ".".join(map(str, path))
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        valid = _fields(schema, path[:-1])
        return f"{source.place(path)}: unknown key {dotted!r}{nearest(str(path[-1]), valid)}"
    if kind == "missing":
        return f"{source.place(path[:-1])}: {dotted} is missing"
    text = detail["msg"].removeprefix("Value error, ")
    text = text.replace("Input should be", "expected")
    if kind in ("model_type", "dict_type"):
        valid = _fields(schema, path)
        keys = f" with the keys {', '.join(valid)}" if valid else ""
        text = f"expected a mapping{keys}"
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        expected = str(detail.get("ctx", {}).get("expected", ""))
        hint = nearest(value, [w.strip("' ") for w in expected.replace(" or ", ",").split(",")])
    return f"{source.place(path)}: {dotted}: {text}, got {value!r}{hint}"


def _fields(schema: type[BaseModel], path: Path_) -> list[str]:
    """The valid keys at a place of the schema, [] where any key is allowed."""
    here: Any = schema
    for part in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            fields = here.model_fields.items()
            here = next((f.annotation for n, f in fields if part in (n, f.alias)), None)
        else:
            here = _inner(here)
    here = _inner(here)
    if isinstance(here, type) and issubclass(here, BaseModel):
        return [
            f.alias or name
            for name, f in here.model_fields.items()
            if name not in ("frozen", "off")
        ]
    return []


def _inner(annotation: Any) -> Any:
    """The section inside Optional[...], tuple[X, ...], dict[str, X] and Annotated[X, ...]."""
    if typing.get_origin(annotation) is dict:
        annotation = typing.get_args(annotation)[1]
    for argument in typing.get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument
    return annotation
