"""Errors for people: the nearest name, and loading failures in one line."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from ssl import SSLError
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

T = TypeVar("T")

_PATIENCE = 5.0  # seconds for the hub's first answer


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """An error for a name that is not in a table: what was meant, and what there is."""
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {what} {name!r}{hint} (known: {', '.join(names) or 'none'})")


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`.

    Raises:
        ValueError: no such name; the nearest one is suggested.
    """
    if name not in table:
        raise unknown(what, name, table)
    return table[name]


def check_options(options: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """Refuse options that a part does not have.

    Raises:
        ValueError: an unknown option; the nearest one is suggested.
    """
    names = set(known)
    for name in options:
        if name not in names:
            raise unknown(f"option of {what}", name, names)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def loading(what: str, path: str | Path) -> Iterator[None]:
    """Turn what libraries raise while they load `path` into one readable ValueError."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{what} {path}: a weights file is damaged or cut short ({_first_line(error)}); "
            "copy or download it again"
        ) from error
    except json.JSONDecodeError as error:
        file = _no_json(Path(path)) or "one of its JSON files"
        raise ValueError(
            f"cannot load {what} from {path}: {file} is no valid JSON ({error}), so damaged or cut "
            "short; copy or download it again"
        ) from error
    except (OSError, KeyError, struct.error) as error:
        _check_gguf(path, what, error)
        said = _first_line(error) + (" is missing or not known" if type(error) is KeyError else "")
        if isinstance(error, OSError) and not Path(path).parent.exists():
            said += " (and there is no folder of this name)"
        raise ValueError(f"cannot load {what} from {path}: {said}") from error
    except StrictDataclassError as error:
        raise ValueError(
            f"{what} {path}: config.json makes no sense: {_last_line(error)}; copy the "
            "checkpoint's own"
        ) from error
    except ValueError as error:
        _check_gguf(path, what, error)
        raise ValueError(_explained(str(error), what, path)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"cannot load {what} from {path}: its files make no sense to transformers "
            f"({_first_line(error)}); copy the checkpoint's own"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{what} {path}: weights have another shape than config.json says; take both files "
            "from one checkpoint"
        ) from error


def _check_gguf(path: str | Path, what: str, error: Exception) -> None:
    """Say so where it is a .gguf file that cannot be read from its beginning to its end.

    Raises:
        ValueError: it is damaged.
    """
    if not str(path).endswith(".gguf") or not Path(path).is_file() or find_spec("gguf") is None:
        return
    from gguf import GGUFReader  # an extra

    try:
        GGUFReader(path)
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError, struct.error):
        raise ValueError(
            f"cannot load {what} from {path}: the file is damaged or cut short "
            f"({_first_line(error)}); copy or download it again"
        ) from error


def _explained(text: str, what: str, path: str | Path) -> str:
    """What transformers says in paragraphs, in one line that names the folder."""
    if kind := re.search("has model type `(.*?)` but Transformers does not recognize", text):
        return (
            f"cannot load {what} from {path}: transformers does not know the model type "
            f"{kind[1]!r} of its config.json; is it another part's folder, or misspelt?"
        )
    if "instantiate the backend tokenizer" in text:
        return (
            f"cannot load {what} from {path}: its tokenizer cannot be read; copy the checkpoint's "
            "tokenizer.json and tokenizer_config.json beside the weights"
        )
    if "\n" not in text and str(path) in text:
        return text
    return f"cannot load {what} from {path}: {text.splitlines()[0]}"


def _last_line(error: BaseException) -> str:
    """The innermost cause, without its class."""
    last = str(error).strip().splitlines()[-1].strip()
    last = (last.partition("Error: ")[2] or last).rstrip(".")
    types = re.match("Field '(.*?)' with value (.*?) doesn't match any type", last)
    return f"{types[1]} is {types[2]}, which is of no type that it may have" if types else last


def _no_json(folder: Path) -> str:
    """The name of a file of a folder that is not the JSON that it should be; empty without one."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError:
            return file.name
    return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_folder(path: str | Path, what: str) -> None:
    """Refuse a path that is written like a local folder but is none.

    A hub id looks like `owner/name`; anything absolute, deeper, or starting with a dot is local.

    Raises:
        ValueError: no such folder, or no config.json in it.
    """
    folder, text = Path(path), str(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{what}: the folder {text} has no config.json, so it holds no model")
        return
    if folder.exists():
        raise ValueError(f"{what}: {text} is a file; give the folder that holds the model")
    if text.startswith((".", "~")) or folder.is_absolute() or text.count("/") != 1:
        raise ValueError(f"{what}: there is no folder {text}")


def check_hub(path: str | Path, what: str) -> None:
    """Refuse what is no folder while there is no hub to ask for it.

    Raises:
        ValueError: naming both possibilities.
    """
    if not Path(path).exists() and (why := _unreachable(str(path))):
        raise ValueError(
            f"{what}: there is no folder {path} here, and as the id of a model on the hub it "
            f"cannot be looked up ({why}); correct the path, or connect"
        )


@cache
def _unreachable(name: str) -> str:
    """Why the hub cannot be asked for a model; empty where it can, or the model is in the cache.

    One request without repeats: the libraries' own go on for half a minute.
    """
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return ""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    try:
        with urlopen(Request(address, method="HEAD"), timeout=_PATIENCE):
            return ""
    except HTTPError as error:  # what the hub itself answers the libraries explain
        behind = error.code in (502, 503, 504)
        return f"{constants.ENDPOINT}: {error.reason}" if behind else ""
    except URLError as error:
        # their certificates may be others
        return "" if isinstance(error.reason, SSLError) else f"{constants.ENDPOINT}: {error.reason}"
    except OSError as error:
        return f"{constants.ENDPOINT}: {error}"


def check_language_model(path: str | Path, what: str) -> None:
    """As `check_folder`, but a .gguf file will do.

    Raises:
        ValueError: as `check_folder`; no such file, or the package that reads it is missing.
    """
    if not str(path).endswith(".gguf"):
        check_folder(path, what)
        return
    if not Path(path).is_file():
        raise ValueError(f"{what}: there is no file {path}")
    if find_spec("gguf") is None:
        raise ValueError(f"{what}: {path} needs the package gguf: pip install 'mllm[gguf]'")
