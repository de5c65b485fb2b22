"""The parts as people and scripts read them: what `mllm models` prints, without torch."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mllm.parts import REGISTRIES, WHOLE_MODELS, Registry
from mllm.parts.language_models import REFUSED, TESTED, Kind
from mllm.parts.option import CHOICE, Option, Part

PACKAGE = Path(__file__).resolve().parents[1]
ANY = "any causal LM of transformers that goes through its AttentionInterface, tried when assembled"
_NAME = 17  # columns of a terminal for a part's name
_NARROW = (14, 8, 10)  # columns of a terminal: an option's name, its values, its default
_WIDE = (14, 24, 10)
_INTERNAL = ("Spec:", "Args:", "Attributes:", "Legend:", "Shapes:")  # said to programmers
_PAGES = (*REGISTRIES, WHOLE_MODELS)


def overview() -> Group:
    """Every part with its options, and the language models that are known."""
    blocks: list[RenderableType] = []
    for registry in _PAGES:
        blocks += [*_heading(registry.title, f"{registry.key}: …", registry.note)]
        common, usual = _common(registry), _usual(registry)
        if common:
            blocks += [_options(common)]
        for option, without in usual.items():
            words = Text(f"all but {_listed(without)} take", style="italic")
            blocks += [words, _options({option: _of_most(registry)[option]})]
        for name, part in registry.parts.items():
            blocks.append(_line(name, part.summary))
            said = {*common, *(each for each, without in usual.items() if name not in without)}
            if own := {n: o for n, o in part.options.items() if n not in said}:
                blocks.append(_options(own))
        blocks.append(Text())
    blocks += [*_heading("language models", "model.language_model: {path: …}", ANY)]
    blocks += [_kind(kind) for kind in TESTED]
    blocks += [Text(), *_heading("refused language models", "", "")]
    blocks += [_kind(kind) for kind in REFUSED]
    blocks += [Text(), Text("mllm models NAME shows one in full.")]
    return Group(*blocks)


def in_full(name: str) -> Group:
    """Everything of this name: what its class says, its options, and how a recipe names it.

    Args:
        name: of a part, a published model or a family of language models, however it is spelt.

    Raises:
        ValueError: there is none of this name; the nearest are suggested.
    """
    blocks: list[RenderableType] = []
    for registry in _PAGES:
        for each, part in registry.parts.items():
            if _is_named(name, each, part.also):
                blocks += [*_page(each, registry, part), Text()]
    for kind in (*TESTED, *REFUSED):
        for family in kind.families:
            if _is_named(name, family):
                blocks += [*_language_model(family, kind), Text()]
    if not blocks:
        near = _listed([repr(one) for one in _near(name)], "or")
        guess = f"did you mean {near}? " if near else ""
        raise ValueError(f"there is no part {name!r}; {guess}`mllm models` lists all")
    return Group(*blocks[:-1])


def _page(name: str, registry: Registry, part: Part) -> Iterator[RenderableType]:
    yield from _heading(name, registry.title, part.summary)
    yield from _said(part)
    if part.options:
        yield Text()
        yield _options(part.options, full=True)
    yield Text()
    yield Text(snippet(registry, part), style="cyan")


def _language_model(family: str, kind: Kind) -> Iterator[RenderableType]:
    yield from _heading(family, "language models", "")
    if kind.what:
        yield Text(f"refused, it has {kind.what}: {kind.why}")
        return
    yield Text(f"tested; beside causal attention inside a document it has or needs: {kind.why}")
    yield Text()
    yield Text("model:\n  language_model: {path: a folder, a hub id or a .gguf file}", style="cyan")


def _is_named(name: str, *names: str | tuple[str, ...]) -> bool:
    """Whether a person means one of these names, whatever the case, dashes, dots or brackets."""
    flat = [one for each in names for one in ((each,) if isinstance(each, str) else each)]
    return plain(name) in {plain(one) for one in flat} | {plain(_short(one)) for one in flat}


def _short(family: str) -> str:
    """A family's name without what stands in brackets."""
    return family.partition(" (")[0]


def _near(name: str) -> list[str]:
    """The names that may be meant: all that contain it, or else the three nearest."""
    parts = {each: part for registry in _PAGES for each, part in registry.parts.items()}
    known = {*parts, *(other for part in parts.values() for other in part.also)}
    known |= {_short(family) for kind in (*TESTED, *REFUSED) for family in kind.families}
    spelt: dict[str, str] = {}
    for one in sorted(known, key=lambda one: one in parts):  # a part's own name counts
        spelt[plain(one)] = one
    if len(plain(name)) > 2 and (longer := [one for one in spelt if plain(name) in one]):
        return sorted(spelt[one] for one in longer)
    return [spelt[one] for one in get_close_matches(plain(name), spelt, n=3, cutoff=0.6)]


def as_json(name: str | None = None) -> dict[str, Any]:
    """The same for scripts: registry → parts with their options; of one name if it is given."""
    values: dict[str, Any] = {
        registry.title: {
            each: {"summary": part.summary, "options": _options_json(part)}
            for each, part in registry.parts.items()
            if name is None or _is_named(name, each, part.also)
        }
        for registry in _PAGES
    }
    tables = {"tested": TESTED, "refused": REFUSED}
    values["language models"] = {
        title: [
            {"families": list(kind.families), "what": kind.what, "why": kind.why}
            for kind in kinds
            if name is None or _is_named(name, *kind.families)
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


def _of_most(registry: Registry) -> dict[str, Option]:
    """The options that at least three of four parts have alike."""
    result: dict[str, Option] = {}
    for part in registry.parts.values():
        for name, option in part.options.items():
            alike = sum(other.options.get(name) == option for other in registry.parts.values())
            if 4 * alike >= 3 * len(registry.parts):
                result[name] = option
    return result


def _usual(registry: Registry) -> dict[str, list[str]]:
    """The options that most parts have alike, but not all → the parts that do not."""
    alike = {
        option: [each for each, part in registry.parts.items() if part.options.get(option) != most]
        for option, most in _of_most(registry).items()
    }
    return {option: without for option, without in alike.items() if without}


def _listed(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _line(name: str, summary: str) -> RenderableType:
    """A part's name and summary, below it where the name is longer than its column."""
    if len(name) <= _NAME:
        return Text.assemble("  ", (name.ljust(_NAME), "bold"), f" {summary}")
    below = Padding(Text(summary), (0, 0, 0, _NAME + 3))
    return Group(Text(f"  {name}", style="bold"), below)


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
        if option.most is not None and full:
            meaning = f"{meaning}; at most {option.most:,}"
        shown = name, words if full else short, option.default_words, meaning
        table.add_row(*map(Text, shown))
    return Padding(table, (0, 0, 0, 4))


def _kind(kind: Kind) -> RenderableType:
    """Families and what there is to say of them."""
    words = f"{kind.what}; {kind.why}" if kind.what else kind.why
    return Padding(Text.assemble((", ".join(kind.families), "bold"), f": {words}"), (0, 0, 0, 2))


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
            "most": option.most,
        }
        for name, option in part.options.items()
    }
