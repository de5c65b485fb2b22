"""What a part's option is: its values, default and meaning. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from mllm.recipe_yaml import closest


@dataclass(frozen=True, slots=True)
class Values:
    """What an option may be.

    Attributes:
        words: as a recipe's author reads it.
        short: the same in a column of a table.
        fits: whether a value of a recipe is one.
        hint: said beside a value that is none.
    """

    words: str
    short: str
    fits: Callable[[Any], bool]
    hint: Callable[[Any], str] = lambda value: ""


def _is_whole(value: Any) -> bool:
    return type(value) is int and value > 0  # true is an int to Python


def _near_squares(value: Any) -> str:
    if not _is_whole(value):
        return ""
    side = isqrt(value)
    return f"; the nearest are {side**2} and {(side + 1) ** 2}"


def _is_grid(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_whole, value))


def _are_layers(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    whole = all(type(number) is int and number >= 0 for number in value)
    return whole and list(value) == sorted(set(value))


CHOICE = "word"


def one_of(*choices: str) -> Values:
    """One of these words."""

    def hint(value: Any) -> str:
        near = closest(str(value), choices)
        return f"; did you mean {near!r}?" if near else ""

    return Values(" | ".join(choices), CHOICE, lambda value: value in choices, hint)


WHOLE = Values("a whole number greater than 0", "n > 0", _is_whole)
SQUARE = Values(
    "a square number",
    "square",
    lambda value: _is_whole(value) and isqrt(value) ** 2 == value,
    _near_squares,
)
LAYER = Values("a whole number below 0", "n < 0", lambda value: type(value) is int and value < 0)
POSITIVE = Values(
    "a number above 0",
    "x > 0",
    lambda value: isinstance(value, int | float) and type(value) is not bool and value > 0,
)
FLAG = Values("true or false", "yes/no", lambda value: type(value) is bool)
FOLDER = Values(
    "a folder or hub id", "folder", lambda value: isinstance(value, str) and bool(value)
)
SECTION = Values("{name: …, path: …}", "section", lambda value: isinstance(value, Mapping))
GRIDS = Values(
    "[[rows, columns], …]",
    "pairs",
    lambda value: isinstance(value, list | tuple) and bool(value) and all(map(_is_grid, value)),
)
LAYERS = Values("[0, 4, …], rising", "list", _are_layers)
NOTHING = Values("left out", "-", lambda value: value is False)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a part.

    Attributes:
        values: what it may be.
        meaning: one line.
        default: what counts where a recipe gives none.
        otherwise: the same in words, where it is computed. Without either it must be given.
        reloadable: whether it may change when saved weights are loaded.
        most: the largest number that makes sense.
    """

    values: Values
    meaning: str
    default: Any = None
    otherwise: str = ""
    reloadable: bool = False
    most: int | None = None

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is None and not self.otherwise

    @property
    def default_words(self) -> str:
        """What counts where a recipe gives none, for people."""
        if self.required:
            return "required"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return self.otherwise or str(self.default)


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a recipe may name.

    Attributes:
        summary: one line.
        where: module and class, below the package.
        example: what a recipe writes after the section's key, or below it in several lines.
        options: what it takes, by name.
        also: other names that people know it by.
    """

    summary: str
    where: str
    example: str
    options: Mapping[str, Option] = field(default_factory=dict)
    also: tuple[str, ...] = ()


def problems(options: Mapping[str, Option], given: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What is wrong with the options that are given: (name, what it is and should be).

    Names that are not known are left to the caller; None is as good as not given.
    """
    for name, option in options.items():
        value, values = given.get(name), option.values
        if value is None:
            if option.required:
                yield name, f"{name} is missing; give {values.words}"
        elif not values.fits(value):
            if values is NOTHING:
                yield name, f"{name} is not supported yet; leave it out ({option.meaning})"
            else:
                hint = values.hint(value)
                yield name, f"{name} must be {values.words}, got {value!r}{hint}"
        elif option.most is not None and value > option.most:
            yield name, f"{name} must be at most {option.most:,}, got {value:,}"


def chosen(options: Mapping[str, Option], given: Mapping[str, Any], name: str) -> Any:
    """Return what a recipe gives, or the option's default."""
    value = given.get(name)
    return options[name].default if value is None else value
