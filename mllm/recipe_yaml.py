"""YAML with line numbers, and command-line overrides laid over it.

Recipes are read through the node tree of PyYAML, so that every refusal can name the line it is
about. Duplicate keys are refused, and `1e-4` is a number (YAML 1.1 reads it as text).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Path_ = tuple[str | int, ...]
TRAIN_SETTINGS = ("lr", "lora", "qlora")


class RecipeError(ValueError):
    """A recipe that cannot be run, with the place and what to do."""


class _Loader(yaml.SafeLoader):
    """The safe loader, with floats such as 1e-4 read as floats."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


@dataclass(slots=True)
class Source:
    """The values of one recipe file and where each of them was written.

    Attributes:
        file: as the user named it.
        values: plain Python values.
        places: path of a value (keys and list positions) → "file:line" or the override's text.
    """

    file: Path
    values: dict[str, Any]
    places: dict[Path_, str] = field(default_factory=dict)

    def place(self, path: Path_) -> str:
        """Where a value, or the nearest thing around it, was written."""
        for stop in range(len(path), -1, -1):
            if path[:stop] in self.places:
                return self.places[path[:stop]]
        return str(self.file)


def read(file: Path) -> Source:
    """Read one recipe file. Raises RecipeError naming file and line."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{file}: no such recipe{_neighbours(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read ({error})") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        source = Source(file, {}, {(): f"{file}:1"})
        if node is None:
            raise RecipeError(f"{file}:1: the recipe is empty")
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{file}:1: a recipe is a mapping (key: value), not {node.id}")
        values = _build(loader, node, (), source)
        assert isinstance(values, dict)
        source.values = values
        return source
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{file}:{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise RecipeError(
            f"{file}: not a recipe: nested too deeply, or something contains itself"
        ) from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _build(loader: _Loader, node: yaml.Node, path: Path_, source: Source) -> Any:
    source.places[path] = f"{source.file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))  # type: ignore[no-untyped-call]
            line = key_node.start_mark.line + 1
            if key in result:
                dotted = ".".join(map(str, (*path, key)))
                raise RecipeError(f"{source.file}:{line}: the key {dotted!r} is given twice")
            result[key] = _build(loader, value_node, (*path, key), source)
            source.places[(*path, key)] = f"{source.file}:{line}"
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, i), source) for i, item in enumerate(node.value)]
    try:
        return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
    except ValueError as error:  # 2026-13-45 looks like a date
        line = node.start_mark.line + 1
        raise RecipeError(f"{source.file}:{line}: {node.value!r} cannot be read: {error}") from None


def override(source: Source, assignments: Iterable[str]) -> None:
    """Lay `a.b=value` assignments over a recipe; the values are read as YAML.

    Below `train` a module path has dots itself: it ends before the first setting (lr, lora, …).
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"command line: {assignment!r}: expected key=value, as in optimizer.warmup=0.1"
            )
        try:
            value = yaml.load(text, _Loader) if text else None
        except (yaml.YAMLError, ValueError):
            value = text
        _assign(source, _split(source.values, key, value), value, assignment)


def _split(values: dict[str, Any], key: str, value: Any) -> list[str]:
    """The keys that a dotted key stands for."""
    parts = key.split(".")
    if parts[0] != "train" or len(parts) == 1:
        return parts
    cut = next((i for i, part in enumerate(parts) if i > 1 and part in TRAIN_SETTINGS), len(parts))
    known = values.get("train")
    if cut == len(parts) > 2 and value != "frozen" and not isinstance(value, dict):
        shorter = ".".join(parts[1:-1])
        if isinstance(known, dict) and shorter in known:
            cut -= 1  # a misspelt setting of a module that is there
    return ["train", ".".join(parts[1:cut]), *parts[cut:]]


def _assign(source: Source, parts: list[str], value: Any, assignment: str) -> None:
    place = f"command line ({assignment})"
    here: Any = source.values
    path: list[str | int] = []
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                listing = ".".join(parts[:i])
                raise RecipeError(
                    f"{place}: {listing} is a list of {len(here)}; expected a position from 0 to "
                    f"{len(here) - 1}, got {part!r}"
                )
            index = int(part)
            path.append(index)
            if last:
                here[index] = value
            else:
                here = here[index]
            continue
        path.append(part)
        if last:
            here[part] = value
        else:
            if not isinstance(here.get(part), dict | list):
                here[part] = {}
            here = here[part]
    written = tuple(path)
    for known in [place_ for place_ in source.places if place_[: len(written)] == written]:
        del source.places[known]
    source.places[written] = place


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is meant, None where none is like it."""
    close = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
    return close[0] if close else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """A helpful ending for 'unknown name': the nearest valid one, then all of them."""
    names = sorted(valid)
    if not names:
        return ""
    close = closest(name, names)
    guess = f"did you mean {close!r}? " if close else ""
    shown = ", ".join(names[:40]) + (", …" if len(names) > 40 else "")
    return f"; {guess}Valid: {shown}"


def _neighbours(file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f" (the folder {folder} does not exist)"
    names = [p.name for p in folder.glob("*.yaml")]
    return nearest(file.name, names) if names else f" (there is no .yaml file in {folder})"


def flatten(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    """Dotted key and value of everything in nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, inner in enumerate(value):
            yield from flatten(inner, f"{prefix}.{i}")
    else:
        yield prefix, value
