"""What is in the data folder, where it came from, under which licence; for machines and people."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.quickstart.downloads import Fetched, sha256
from scripts.quickstart.heldout import TEXT_NAME
from scripts.quickstart.phases import DONE
from scripts.quickstart.sources import Source

__all__ = ["write_manifest"]

LISTED = ("models", "shards", "heldout")
"""Folders whose every file is listed; the others are given one checksum each."""


def write_manifest(
    root: Path,
    fetched: Iterable[tuple[Source, Path, Fetched]],
    fraction: float,
    phases: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write manifest.json and SOURCES.md, both atomically; returns the manifest."""
    sources = [
        {
            "name": source.name,
            "package": source.package,
            "registry": source.registry,
            "version": note.version,
            "tested_release": note.tested,
            "file": note.file,
            "size": note.size,
            "sha256": note.sha256,
            "licence": source.licence,
            "attribution": source.attribution,
            "use": source.use,
        }
        for source, _, note in fetched
    ]
    text = root / "heldout" / "text.txt"
    manifest = {
        "fraction": fraction,
        "sources": sources,
        "phases": phases,
        "heldout_text": {"name": TEXT_NAME, "file": "heldout/text.txt", "sha256": sha256(text)},
        "files": {
            str(path.relative_to(root)): {"sha256": sha256(path), "size": path.stat().st_size}
            for folder in LISTED
            for path in _files(root / folder)
        },
        "folders": {
            f"raw/{folder.name}": _folder_digest(folder)
            for folder in sorted((root / "raw").iterdir())
            if folder.is_dir()
        },
    }
    _replace(root / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    _replace(root / "SOURCES.md", _page(sources, fraction))
    return manifest


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DONE)


def _folder_digest(folder: Path) -> str:
    """One checksum of all names and contents below a folder."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder)}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _page(sources: list[dict[str, Any]], fraction: float) -> str:
    lines = [
        "# Where this data comes from",
        "",
        "Written by the quick start. Some of these licences ask that copies carry them: do not",
        "commit the images or the shards to a repository with another licence.",
        "",
    ]
    if fraction < 1.0:
        lines += [f"Only {fraction:.0%} of the data was kept.", ""]
    for source in sources:
        tested = "" if source["tested_release"] else " (not the tested release)"
        lines += [
            f"## {source['package']} {source['version']}{tested}",
            "",
            f"- use: {source['use']}",
            f"- licence: {source['licence']}",
            f"- attribution: {source['attribution']}",
            f"- file: `{source['file']}`, {source['size']:,} bytes",
            f"- sha256: `{source['sha256']}`",
            "",
        ]
    return "\n".join(lines)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
