"""Small real files of many formats, for the tests of the readers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from packing_toys import png

from data_packing.document import Document, Image, Text
from data_packing.formats import Options, read
from data_packing.ledger import Refusal

ASK, ANSWER = "<image>\nWhat is it?", "A bee."


def gather(
    path: Path, format: str | None = None, options: Options | None = None
) -> tuple[dict[str, Document], dict[str, str]]:
    """Documents by key, and reasons of refusals by key; no key is given twice."""
    items = list(read(path, format, options or Options()))
    documents = {item.key: item for item in items if isinstance(item, Document)}
    refused = {item.key: item.reason for item in items if isinstance(item, Refusal)}
    assert len(documents.keys() | refused.keys()) == len(items)
    return documents, refused


def words(document: Document) -> list[tuple[str | None, Any]]:
    """(role, text or bytes) of every part."""
    return [(p.role, p.text if isinstance(p, Text) else p.data) for p in document.parts]


def kinds(document: Document) -> str:
    """ "i" for an image and "t" for a text, in order."""
    return "".join("i" if isinstance(part, Image) else "t" for part in document.parts)


def expect(refused: dict[str, str], reasons: dict[str, str]) -> None:
    """Every refusal has its reason, and there is no other."""
    assert refused.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert reason in refused[key], (key, refused[key])


def talk(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    """Turns as OpenAI writes them."""
    return [{"role": role, "content": content} for role, content in turns]


def spoken(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    """Turns as LLaVA writes them."""
    return [{"from": role, "value": content} for role, content in turns]


def write_lines(path: Path, *records: Any) -> Path:
    """JSON lines; bytes are written as they are."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_parquet(path: Path, records: list[dict[str, Any]], group: int = 2) -> Path:
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    """A member that is a link."""
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, target
    return info


def clip(
    frames: int = 30,
    codec: str = "libx264",
    container: str = "mp4",
    side: tuple[int, int] = (48, 64),
) -> bytes:
    """A video whose frame `n` is grey of brightness 8 n; a key frame every ten."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width = side
        stream.pix_fmt, stream.gop_size = "yuv420p", 10
        for number in range(frames):
            pixels = np.full((*side, 3), 8 * number % 256, dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def pictures(folder: Path) -> Path:
    """Two pictures, `one.png` and `two.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "one.png").write_bytes(png())
    (folder / "two.png").write_bytes(png(seed=2))
    return folder
