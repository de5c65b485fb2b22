"""Folders that lie on a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils.hub import cached_file

from mllm.models.errors import check_folder, check_hub, loading

HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
"""What transformers' `from_pretrained` take about where files come from."""

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.yaml"]


def local_folder(path: str | Path, what: str) -> Path:
    """Return the folder of a model: as it is, or a copy of what a hub has under this name.

    Args:
        path: a folder, or a hub's `owner/name`.
        what: is being loaded, for messages.

    Raises:
        ValueError: no such folder, none with a model, or the hub has no such name.
    """
    check_folder(path, what)
    check_hub(path, what)
    if Path(path).is_dir():
        return Path(path)
    hub_file(path, "config.json", what)  # whose errors are the plainest
    with loading(what, path):
        return Path(snapshot_download(str(path), allow_patterns=_WANTED))


def hub_file(path: str | Path, name: str, what: str, **where: Any) -> Path:
    """Return one file of a folder, or of what a hub has under this name.

    Args:
        path: a folder, or a hub's `owner/name`.
        name: of the file.
        what: is being loaded, for messages.
        where: any of `HUB`.

    Raises:
        ValueError: it is not there.
    """
    check_folder(path, what)
    if Path(path).is_dir():
        return Path(path) / str(where.get("subfolder", "")) / name
    with loading(what, path):
        return Path(str(cached_file(str(path), name, **where)))
