"""Packages as the registries make them, small enough to write in a test."""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw


def png(text: str = "", size: tuple[int, int] = (80, 72)) -> bytes:
    """An image file whose bytes depend on the text."""
    image = Image.new("RGBA", size, (255, 255, 255, 0))
    ImageDraw.Draw(image).text((4, 4), text, fill=(10, 20, 30, 255))
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()


def data_tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """The xz-compressed tar inside a .deb."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return lzma.compress(output.getvalue())


def deb(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """A .deb: an ar archive with a version, a control and a data member."""
    control = lzma.compress(b"control")
    content = b"!<arch>\n"
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", control),
        ("data.tar.xz", data_tar(files, links)),
    ):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
        content += header.encode() + data + b"\n" * (len(data) % 2)
    return content


def stamp(name: str, caption: str, **languages: str) -> dict[str, bytes]:
    """The two files of a stamp."""
    root = f"./usr/share/tuxpaint/stamps/{name}"
    lines = [caption, *(f"{code}.utf8={text}" for code, text in languages.items())]
    return {f"{root}.png": png(name), f"{root}.txt": "\n".join(lines).encode()}


def catalogue(pieces: list[dict[str, str]], french: list[str]) -> bytes:
    """A furniture catalogue: a zip of properties and icons."""
    output = io.BytesIO()
    lines, other = ["id=Test", "name=Test catalogue", "license=CC0"], []
    with zipfile.ZipFile(output, "w") as archive:
        for number, piece in enumerate(pieces, start=1):
            lines += [f"{key}#{number}={value}" for key, value in piece.items()]
            lines.append(f"icon#{number}=/icons/{number}.png")
            other.append(f"name#{number}={french[number - 1]}")
            archive.writestr(f"icons/{number}.png", png(f"{piece['name']} {number}"))
        text = "\n".join(lines).encode("latin-1")
        archive.writestr("PluginFurnitureCatalog.properties", text)
        archive.writestr("PluginFurnitureCatalog_fr.properties", "\n".join(other).encode("latin-1"))
    return output.getvalue()


def write(path: Path, data: bytes) -> Path:
    """Write a file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
