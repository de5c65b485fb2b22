"""Images and clips that a record names or holds: a path, a data URL, bytes, or {bytes, path}.

Paths must stay inside one folder. Nothing is fetched from a network.
"""

from __future__ import annotations

import base64
import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_packing.document import DocumentError, Image, Role
from data_packing.formats.common import shown
from data_packing.video import FRAMES, sample_frames

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|//")
_ASTRAY = re.compile(
    rf"(image|video) .*(: {re.escape(os.strerror(errno.ENOENT))}| lies outside of .*)", re.DOTALL
)
_DATA = re.compile(r"data:([^;,]*)([^,]*),", re.IGNORECASE)
_HOLDERS = ("bytes", "url", "path", "image_url", "video_url", "image", "video")


@dataclass(frozen=True, slots=True)
class Media:
    """Opens what records name.

    Attributes:
        folder: where relative paths start; no path may leave it.
        frames: how many frames of a clip become images.
        members: files that lie beside the record in an archive, by name; then a name is
            looked for among them and nowhere else.
    """

    folder: Path
    frames: int = FRAMES
    members: Mapping[str, bytes] | None = None

    def image(self, value: Any, role: Role | None = None) -> Image:
        """Open an image.

        Raises:
            DocumentError: not an image, missing, outside the folder, or on a network.
        """
        name, found = self._find(value, "image")
        try:
            if isinstance(found, Path):
                return Image.open(found, role)
            return Image.from_bytes(found, role)
        except DocumentError as error:
            raise DocumentError(_renamed(error, found, name, "image")) from error

    def clip(self, value: Any, role: Role | None = None, number: int = 1) -> list[Image]:
        """Sample the frames of a clip, which is the document's first, second, … one.

        Raises:
            DocumentError: not a clip, missing, outside the folder, on a network, or no PyAV.
        """
        name, found = self._find(value, "video")
        try:
            frames = sample_frames(found, self.frames)
        except DocumentError as error:
            raise DocumentError(_renamed(error, found, name, "video")) from error
        return [replace(frame, role=role, clip=number) for frame in frames]

    def _find(self, value: Any, what: str) -> tuple[str, bytes | Path]:
        """Its name for a person, and its bytes or where it lies."""
        if isinstance(value, bytes):
            return "in the record", value
        if isinstance(value, dict):
            held = next(
                (value[name] for name in _HOLDERS if value.get(name) not in (None, "")), None
            )
            path = value.get("path")
            if isinstance(held, bytes):
                return shown(path) if isinstance(path, str) and path else "in the record", held
            if isinstance(held, str | dict):
                return self._find(held, what)
        if not isinstance(value, str) or not value:
            article = "an image" if what == "image" else "a video"
            raise DocumentError(f"{article} must be a file name, not {shown(repr(value))}")
        if value[:5].lower() == "data:":
            return "in a data URL", _data_url(value, what)
        if value.startswith("file://"):
            value = unquote(value.removeprefix("file://"))
        if _REMOTE.match(value):
            raise DocumentError(
                f"{what} {shown(value)} is on a network and is not fetched: download it and give "
                "its path"
            )
        if self.members is not None:
            if value not in self.members:
                raise DocumentError(f"{what} {shown(value)} is not beside the record in the tar")
            return shown(value), self.members[value]
        return shown(value), inside(self.folder, value, what)


def inside(folder: Path, name: str, what: str) -> Path:
    """Where a name leads, which must be inside the folder.

    Raises:
        DocumentError: it leads out, or no file can have such a name.
    """
    try:
        path = (folder / name).resolve()
        is_inside = path.is_relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError) as error:
        raise DocumentError(f"{what} {shown(repr(name))}: {error}") from error
    if not is_inside:
        raise DocumentError(f"{what} {shown(name)} lies outside of {folder}")
    return path


def astray(reason: str) -> bool:
    """Whether a reason says that no file is where the record has it: perhaps the wrong folder."""
    return _ASTRAY.fullmatch(reason) is not None


def _renamed(error: DocumentError, found: bytes | Path, name: str, what: str) -> str:
    reason = str(error)
    if isinstance(found, Path):
        reason = reason.removeprefix(f"{what} {found}: ")
    return f"{what} {name}: {reason}"


def _data_url(value: str, what: str) -> bytes:
    head = _DATA.match(value)
    if head is None:
        raise DocumentError(f"a broken data URL: {shown(value, 40)}")
    kind, parameters = head[1].lower(), head[2].lower()
    if not kind.startswith(f"{what}/"):
        raise DocumentError(f"a data URL of {kind or 'plain text'}, where {what} is expected")
    if "base64" not in parameters:
        raise DocumentError("a data URL that is not in base64")
    try:
        return base64.b64decode(re.sub(r"\s", "", unquote(value[head.end() :])), validate=True)
    except ValueError as error:
        raise DocumentError(f"a data URL whose base64 is broken: {error}") from error
