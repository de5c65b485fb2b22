"""One readable file out of the parts of this package that a model is made of.

Classes and functions are taken as they stand here, in the order in which they need each other, so
there is no second copy of a connector or an encoder to keep in step. Of a class only the members
that something in the file refers to are taken.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mllm.export import source_fused as fused
from mllm.export.source_imports import MARGIN, import_lines
from mllm.export.source_sections import with_sections
from mllm.parts import IMAGES

ROOTS = (
    "mllm.export.standalone_processor",
    "mllm.export.standalone",
    "mllm.export.standalone_generating",
)
_CLASSES = "mllm.export.standalone"
"""What the modules are called whose classes are taken whole."""

_NATIVE = {"standalone_square": "standalone_native", "original_sizes": "image_grid_thw"}
"""What ROOTS say otherwise for encoders of native resolution."""

_OWN = ("mllm.", "data_packing.")
_ALWAYS = {"__init__", "__call__", "__post_init__", "_apply", "forward"}
"""Members that others call: torch, dataclasses, Python."""

_LEFT_OUT = {"VisionEncoder.forward", "VisionEncoder.train", "NativeTransformer.forward"}
"""Called by others too, but not here: pixels come normalised, and nothing is frozen."""

_OF_SQUARES = {"VisionEncoder.GEOMETRY", "VisionEncoder.square", "VisionTransformer.features"}
"""What encoders of native resolution inherit and do not use."""

_CHECKS = {"self.check", "check_images"}
"""Calls that refuse what a recipe may not say; a saved model was checked."""

_DOCS = {
    "VisionEncoder": "A vision encoder; `width` features per cell.",
    "Connector": "From features [C, Dv] of views, each a grid, to their visual tokens [sum M, D].",
    "TiledGeometry": "An image as several squares of the encoder; `spec` has the options by name.",
    **fused.DOCS,
}
"""Docstrings that speak of training."""

_REPLACED = {
    "chosen": '''\
def chosen(options: Mapping[str, Any], given: Mapping[str, Any], name: str) -> Any:
    """Return what is given for an option, or its default."""
    value = given.get(name)
    return options[name] if value is None else value''',
    **fused.REPLACED,
}
"""`OPTIONS` are written as name → default, without what a recipe's author reads about them."""


@dataclass(slots=True)
class _Module:
    """A parsed module: its text by lines, and what its names are."""

    lines: list[str]
    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(slots=True)
class _Bundle:
    """What goes into the file, in order."""

    tables: Mapping[str, tuple[str, ...]]
    blocks: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    imports: set[tuple[str, str]] = field(default_factory=set)
    pending: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)


def bundle(header: str, tables: Mapping[str, tuple[str, ...]], sections: frozenset[str]) -> str:
    """Return the file.

    Args:
        header: its docstring's text.
        tables: for each registry (ENCODERS, CONNECTORS, FUSIONS, TILINGS) the names that it has
            there.
        sections: parts of the ROOTS to take, of SECTIONS; `native` instead of squares.

    Raises:
        ValueError: two parts define the same name differently.
    """
    used: set[str] = set()
    left_out = _LEFT_OUT | (_OF_SQUARES if "native" in sections else set())
    while True:  # a member may refer to members of classes before it
        result = _Bundle(tables, used=set(used), left_out=left_out)
        for root in ROOTS:
            for name in _module(root, sections).defined:
                _take(result, root, name, sections)
        if result.used == used:
            break
        used = result.used
    body = re.sub(r"  # type: ignore\[[\w, -]+\]", "", "\n\n".join(_spaced(result.blocks)))
    return f'"""{header}"""\n\n{import_lines(result.imports)}\n\n{body}\n'


@cache
def _module(name: str, sections: frozenset[str]) -> _Module:
    """Parse a module of this package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    if name.startswith(_CLASSES):
        text = with_sections(text, sections)
    if name in ROOTS and "native" in sections:
        for ours, theirs in _NATIVE.items():
            text = text.replace(ours, theirs)
    module = _Module(text.splitlines())
    body = ast.parse(text).body
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.ImportFrom | ast.Import):
            module.imported.update(_imported(statement))
        for target in _targets(statement):
            documented = isinstance(statement, ast.Assign | ast.AnnAssign) and _is_text(after)
            module.defined[target] = [statement, *([after] if documented and after else [])]
    return module


def _take(result: _Bundle, where: str, name: str, sections: frozenset[str]) -> None:
    """Put a name, and before it what it needs, into the bundle."""
    module = _module(where, sections)
    if name in module.imported:
        source, original = module.imported[name]
        if source.startswith(_OWN):
            _take(result, source, original, sections)
        else:
            result.imports.add((source, original))
        return
    if name not in module.defined or name in result.pending:
        return
    if name in result.origin:
        if result.origin[name] != where:
            raise ValueError(f"{result.origin[name]} and {where} both define {name}")
        return
    result.origin[name] = where
    if name in result.tables:
        _take_table(result, module, where, name, sections)
        return
    result.pending.append(name)
    statement = module.defined[name][0]
    if isinstance(statement, ast.ClassDef):
        nodes, text = _class(result, module, statement)
    elif name in _REPLACED:
        nodes, text = [*ast.parse(_REPLACED[name]).body], _REPLACED[name]
    elif isinstance(statement, ast.FunctionDef):
        text, nodes = _member(module, statement)
    else:
        nodes, text = list(module.defined[name]), _text(module, module.defined[name])
    text = _without_aliases(_without_own_imports(text), module)
    for node in nodes:
        _take_needs(result, where, node, sections)
    result.pending.remove(name)
    result.blocks[name] = text


def _take_table(
    result: _Bundle, module: _Module, where: str, name: str, sections: frozenset[str]
) -> None:
    """Put a registry into the bundle, with the entries that the model uses."""
    statement = module.defined[name][0]
    assert isinstance(statement, ast.AnnAssign)
    assert isinstance(statement.value, ast.Dict)
    classes = {
        key.value: value.id
        for key, value in zip(statement.value.keys, statement.value.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
    }
    chosen = {key: classes[str(key)] for key in result.tables[name]}
    for kind in chosen.values():
        _take(result, where, kind, sections)
    _take_needs(result, where, statement.annotation, sections)
    entries = [f'"{key}": {kind}' for key, kind in chosen.items()]
    line = f"{name}: {ast.unparse(statement.annotation)} = {{{', '.join(entries)}}}"
    if len(line) > MARGIN:
        lines = "".join(f"    {entry},\n" for entry in entries)
        line = f"{name}: {ast.unparse(statement.annotation)} = {{\n{lines}}}"
    result.blocks[name] = line


def _take_needs(result: _Bundle, where: str, node: ast.AST, sections: frozenset[str]) -> None:
    """Put what a piece of code refers to into the bundle."""
    local: dict[str, tuple[str, str]] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and str(inner.module).startswith(_OWN):
            local.update(_imported(inner))
        if isinstance(inner, ast.Attribute):
            result.used.add(inner.attr)
    for inner in ast.walk(node):
        if not isinstance(inner, ast.Name):
            continue
        if inner.id in local:
            _take(result, *local[inner.id], sections)
        else:
            _take(result, where, inner.id, sections)


def _class(result: _Bundle, module: _Module, statement: ast.ClassDef) -> tuple[list[ast.AST], str]:
    """Return the parts of a class that are used, and their text."""
    whole = result.origin[statement.name].startswith(_CLASSES) or bool(
        {"dataclass", "NamedTuple"} & _names(*statement.decorator_list, *statement.bases)
    )
    kept = [
        member
        for member in statement.body
        if not _is_text(member) and _is_kept(result, statement.name, member, whole)
    ]
    abstract = any("abstractmethod" in _names(*_decorators(member)) for member in kept)
    bases = [base for base in statement.bases if abstract or ast.unparse(base) != "ABC"]
    head = module.lines[_start(statement) : statement.lineno - 1]
    listed = ", ".join(map(ast.unparse, bases))
    head.append(f"class {statement.name}({listed}):" if bases else f"class {statement.name}:")
    nodes: list[ast.AST] = [*statement.decorator_list, *bases]
    parts: list[str] = []
    if statement.name in _DOCS:
        parts.append(f'    """{_DOCS[statement.name]}"""')
    elif _is_text(statement.body[0]):
        parts.append(_text(module, [statement.body[0]]))
    for member in kept:
        if "OPTIONS" in _targets(member):
            text = _options(result.origin[statement.name], statement.name)
        else:
            text, needed = _member(module, member)
            nodes += needed
        apart = not module.lines[_start(member) - 1].strip() or len(parts) == 1
        parts.append(f"\n{text}" if parts and apart else text)
    return nodes, "\n".join([*head, *(parts or ["    pass"])])


def _is_kept(result: _Bundle, kind: str, member: ast.stmt, whole: bool) -> bool:
    names = set(_targets(member))
    if whole and not isinstance(member, ast.FunctionDef):
        return True
    if any(f"{kind}.{name}" in result.left_out for name in names):
        return False
    if "OPTIONS" in names and result.origin[kind].startswith("mllm.models.encoders"):
        return False  # an encoder reads its options from a folder, not when it is built
    if whole and result.origin[kind].startswith(_CLASSES):
        return True
    return bool(names & (_ALWAYS | result.used))


def _member(module: _Module, member: ast.stmt) -> tuple[str, list[ast.AST]]:
    """Return a member's text and code, without the checks of what a recipe says."""
    lines = _text(module, [member]).splitlines()
    if not isinstance(member, ast.FunctionDef):
        return "\n".join(lines), [member]
    first = _start(member) + 1
    checks = [one for one in member.body if _is_check(one)]
    for check in reversed(checks):
        assert check.end_lineno is not None
        del lines[check.lineno - first : check.end_lineno - first + 1]
    signature = [*member.decorator_list, member.args, *([member.returns] if member.returns else [])]
    return "\n".join(lines), [*signature, *(one for one in member.body if one not in checks)]


def _options(where: str, kind: str) -> str:
    """A class's options with their defaults; not those of every `images:` section."""
    options = getattr(importlib.import_module(where), kind).OPTIONS
    entries = [
        f'"{name}": {_literal(option.default)}'
        for name, option in options.items()
        if name not in IMAGES
    ]
    line = f"    OPTIONS: ClassVar[dict[str, Any]] = {{{', '.join(entries)}}}"
    if len(line) <= MARGIN:
        return line
    lines = "".join(f"        {entry},\n" for entry in entries)
    return f"    OPTIONS: ClassVar[dict[str, Any]] = {{\n{lines}    }}"


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _is_check(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return ast.unparse(statement.test) in fused.NEVER
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) in _CHECKS


def _text(module: _Module, statements: list[ast.stmt]) -> str:
    """The text of neighbouring statements with their decorators."""
    return "\n".join(module.lines[_start(statements[0]) : statements[-1].end_lineno])


def _start(statement: ast.stmt) -> int:
    """The first line of a statement, counted from 0."""
    return min([statement.lineno, *(node.lineno for node in _decorators(statement))]) - 1


def _decorators(statement: ast.stmt) -> list[ast.expr]:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return decorators


def _without_own_imports(text: str) -> str:
    """Leave out imports of this package inside functions."""
    pattern = r"^ +from (?:mllm|data_packing)\.[\w.]+ import [^\n(]+\n+"
    return re.sub(pattern, "", text, flags=re.MULTILINE)


def _without_aliases(text: str, module: _Module) -> str:
    """Call what is imported from elsewhere by its own name: others may not have the alias."""
    for alias, (_, name) in module.imported.items():
        if name and not name.startswith("as ") and alias != name:
            text = re.sub(rf"\b{alias}\b", name, text)
    return text


def _targets(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id


def _names(*nodes: ast.AST) -> set[str]:
    return {one.id for node in nodes for one in ast.walk(node) if isinstance(one, ast.Name)}


def _imported(statement: ast.ImportFrom | ast.Import) -> dict[str, tuple[str, str]]:
    """Name here -> (module, name there); a module itself has the name ""."""
    if isinstance(statement, ast.ImportFrom):
        module = str(statement.module)
        return {alias.asname or alias.name: (module, alias.name) for alias in statement.names}
    return {
        alias.asname or alias.name: (alias.name, f"as {alias.asname}" if alias.asname else "")
        for alias in statement.names
    }


def _is_text(statement: ast.stmt | None) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _spaced(blocks: Mapping[str, str]) -> Iterator[str]:
    """The blocks with two blank lines around classes and functions, one between constants."""
    before = True
    for text in blocks.values():
        line = not re.match(r"(@|class |def )", text)
        yield text if line and before else f"\n{text}"
        before = line
