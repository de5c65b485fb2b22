"""The parts as people and scripts read them: what `mllm models` prints, without torch."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mllm.parts import REGISTRIES, Registry
from mllm.parts.language_models import REFUSED, TESTED, Kind
from mllm.parts.option import CHOICE, Option, Part
from mllm.recipe_yaml import closest

PACKAGE = Path(__file__).resolve().parents[1]
ANY = "any causal LM of transformers that goes through its AttentionInterface, tried when assembled"
_NARROW = (14, 8, 10)  # columns of a terminal: an option's name, its values, its default
_WIDE = (14, 24, 10)
_INTERNAL = ("Spec:", "Args:", "Attributes:")  # what a docstring says to programmers


def overview() -> Group:
    """Every part with its options, and the language models that are known."""
    blocks: list[RenderableType] = []
    for registry in REGISTRIES:
        blocks += [*_heading(registry.title, f"{registry.key}: …", registry.note)]
        common = _common(registry)
        if common:
            blocks += [_options(common)]
        for name, part in registry.parts.items():
            blocks.append(Text.assemble("  ", (name.ljust(16), "bold"), f" {part.summary}"))
            if own := {n: o for n, o in part.options.items() if n not in common}:
                blocks.append(_options(own))
        blocks.append(Text())
    blocks += [*_heading("language models", "model.language_model: {path: …}", ANY)]
    blocks += [_kind(kind) for kind in TESTED]
    blocks += [Text(), *_heading("refused language models", "", "")]
    blocks += [_kind(kind) for kind in REFUSED]
    blocks += [Text(), Text("mllm models NAME shows one in full.")]
    return Group(*blocks)


def in_full(name: str) -> Group:
    """One part: what its class says, its options, and how a recipe names it.

    Raises:
        ValueError: there is none of this name; the nearest is suggested.
    """
    found = [(each, each.parts[name]) for each in REGISTRIES if name in each.parts]
    blocks: list[RenderableType] = []
    for registry, part in found:
        blocks += [*_heading(name, registry.title, part.summary), *_said(part)]
        if part.options:
            blocks += [Text(), _options(part.options, full=True)]
        blocks += [Text(), Text(snippet(registry, part), style="cyan")]
    kinds = [kind for kind in (*TESTED, *REFUSED) if plain(name) in map(plain, kind.families)]
    blocks += [_kind(kind, name) for kind in kinds]
    if not blocks:
        known = {each for registry in REGISTRIES for each in registry.parts}
        families = {family for kind in (*TESTED, *REFUSED) for family in kind.families}
        near = closest(name, known | families)
        guess = f"did you mean {near!r}? " if near else ""
        raise ValueError(f"there is no part {name!r}; {guess}`mllm models` lists all")
    return Group(*blocks)


def as_json(name: str | None = None) -> dict[str, Any]:
    """The same for scripts: registry → parts with their options; of one name if it is given."""
    values: dict[str, Any] = {
        registry.title: {
            each: {"summary": part.summary, "options": _options_json(part)}
            for each, part in registry.parts.items()
            if name in (None, each)
        }
        for registry in REGISTRIES
    }
    tables = {"tested": TESTED, "refused": REFUSED}
    values["language models"] = {
        title: [
            {"families": list(kind.families), "what": kind.what, "why": kind.why}
            for kind in kinds
            if name is None or plain(name) in map(plain, kind.families)
        ]
        for title, kinds in tables.items()
    }
    return values


def snippet(registry: Registry, part: Part) -> str:
    """The lines of a recipe that name a part."""
    *sections, key = registry.key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    inner = "  " * (len(sections) + 1)
    several = "\n" in part.example
    example = f"\n{textwrap.indent(part.example, inner)}" if several else f" {part.example}"
    return "\n".join([*lines, f"{'  ' * len(sections)}{key}:{example}"])


def plain(family: str) -> str:
    """A family's name without what its authors and transformers write differently."""
    return "".join(letter for letter in family.lower() if letter.isalnum())


def _common(registry: Registry) -> dict[str, Option]:
    """The options that all parts have alike."""
    first, *others = [part.options for part in registry.parts.values()]
    return {
        name: option
        for name, option in first.items()
        if others and all(options.get(name) == option for options in others)
    }


def _heading(title: str, where: str, note: str) -> Iterator[RenderableType]:
    yield Text.assemble((title, "bold underline"), f"  {where}")
    if note:
        yield Text(note, style="italic")


def _options(options: Mapping[str, Option], full: bool = False) -> RenderableType:
    """Name, values, default and meaning of every option."""
    table = Table.grid(padding=(0, 1))
    for width in _WIDE if full else _NARROW:
        table.add_column(width=width)
    table.add_column()
    for name, option in options.items():
        short, words, meaning = option.values.short, option.values.words, option.meaning
        if short == CHOICE and not full:
            meaning = f"{words}: {meaning}"
        shown = name, words if full else short, option.default_words, meaning
        table.add_row(*map(Text, shown))
    return Padding(table, (0, 0, 0, 4))


def _kind(kind: Kind, only: str | None = None) -> RenderableType:
    """Families and what there is to say of them."""
    names = [each for each in kind.families if only is None or plain(each) == plain(only)]
    refused = "refused, " if kind.what and only else ""
    words = f"{refused}{kind.what}; {kind.why}" if kind.what else kind.why
    return Padding(Text.assemble((", ".join(names), "bold"), f": {words}"), (0, 0, 0, 2))


def _said(part: Part) -> Iterator[RenderableType]:
    """What the module and the class say of themselves, read from the source: no torch is needed."""
    if not part.where:
        return
    module, name = part.where.split(":")
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    classes = [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == name]
    for text in (ast.get_docstring(tree), *map(ast.get_docstring, classes)):
        if text:
            yield Text()
            yield Text(_unwrapped(text))


def _unwrapped(text: str) -> str:
    """Paragraphs as one line each, so that they fit any terminal; indented lines stay."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    paragraphs = [each for each in paragraphs if not each.startswith(_INTERNAL)]
    return "\n\n".join(
        each if any(line.startswith(" ") for line in each.splitlines()) else _joined(each)
        for each in paragraphs
    )


def _joined(paragraph: str) -> str:
    if any(line.startswith("- ") for line in paragraph.splitlines()):
        return paragraph
    return " ".join(textwrap.dedent(paragraph).splitlines())


def _options_json(part: Part) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "values": option.values.words,
            "meaning": option.meaning,
            "default": option.default,
            "otherwise": option.otherwise,
            "required": option.required,
        }
        for name, option in part.options.items()
    }
