"""From documents to samples and prompts: the one place that says how many tokens an image takes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_packing.document import Document, DocumentError
from data_packing.images import decode
from data_packing.pack import join_views
from data_packing.sample import IGNORED, Cost, ImageSlot, Sample
from mllm.models import template
from mllm.models.connectors import CONNECTORS
from mllm.models.errors import check_folder, choose, loading, read_json, unknown
from mllm.models.geometry import ImageGeometry
from mllm.models.template import Template

_FILE = "processor_config.json"
IMAGE_TOKEN = "<image>"


class Processor:
    """Tokenizer, image geometry and connector geometry together; needs no model, can be pickled.

    Args:
        tokenizer: a fast tokenizer that has the image token.
        geometry: what the encoder wants to see.
        connector: the connector's `name` and options.
        image_token: the placeholder of one visual token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        geometry: ImageGeometry,
        connector: dict[str, Any],
        image_token: str = IMAGE_TOKEN,
    ) -> None:
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.connector = dict(connector)
        self.template = Template(tokenizer, image_token)
        kind = choose(CONNECTORS, connector["name"], "connector")
        kind.check(connector)
        self._output_grid = kind.output_grid
        self._output_grid(self.connector, geometry.grid(geometry.image_size, geometry.image_size))

    @property
    def image_token(self) -> str:
        """The placeholder of one visual token."""
        return self.template.image_token

    @property
    def image_token_id(self) -> int:
        """Its id."""
        return self.template.image_id

    # -- documents -------------------------------------------------------------------------------

    def encode(self, document: Document) -> Sample:
        """Return the document as the model sees it.

        Raises:
            DocumentError: it cannot be used (text, template or image), with the reason.
        """
        written = self.template.write(document)
        ids, slots = self._expand(written.ids, document)
        learned = self._repeat(written.ids, written.learned, slots)
        return Sample(
            input_ids=ids,
            labels=np.where(learned, ids, IGNORED),
            slots=slots,
            pixels=self._pixels(document),
            source=document.source,
            key=document.key,
        )

    def cost(self, document: Document) -> Cost:
        """Return what the document and any slice of it cost in text tokens, by piece.

        The length of `encode` of a slice is the overhead, plus its pieces' text tokens, plus
        `image_cost` of their images.

        Raises:
            DocumentError: it cannot be used.
        """
        return self.template.cost(document)

    def image_cost(self, height: int, width: int) -> tuple[int, int]:
        """Return (language tokens, vision patches) of an image of this size in pixels."""
        rows, columns = self._output_grid(self.connector, self.geometry.grid(height, width))
        return rows * columns, self.geometry.patches(height, width)

    def image_bytes(self, height: int, width: int) -> int:
        """Return the bytes of the pixels that an image of this size becomes, in all its views."""
        return 3 * self.geometry.image_size**2

    def prompt(self, document: Document) -> dict[str, Tensor]:
        """Return what `generate` takes for one document: see `prompts`."""
        return self.prompts([document])

    def prompts(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """Return what `generate` takes: left-padded rows and the views of all rows in order.

        A conversation ends with the user's turn; a raw document is left open to be continued.

        Returns:
            input_ids [B, T], attention_mask [B, T] and, if there is an image, pixels uint8 [P] of
            all views one after another and sizes int32 [V, 2], (height, width) of each.

        Raises:
            DocumentError: one of them cannot be used, or ends with an answer.
        """
        rows = [self._expand(self.template.prompt(one), one)[0] for one in documents]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = np.full((len(rows), longest), pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, target, seen in zip(rows, ids, mask, strict=True):
            target[longest - len(row) :] = row
            seen[longest - len(row) :] = 1
        result = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if views := [view for one in documents for view in self._pixels(one)]:
            result["pixels"], result["sizes"] = join_views(views)
        return result

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Pass on to the tokenizer."""
        return self.tokenizer.apply_chat_template(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Turn one row of ids into text, as the tokenizer does."""
        return str(self.tokenizer.decode(*args, **kwargs))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Turn rows of ids into texts, as the tokenizer does."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))

    def _expand(
        self, ids: NDArray[np.int64], document: Document
    ) -> tuple[NDArray[np.int64], list[ImageSlot]]:
        """Repeat every placeholder as often as its image has visual tokens."""
        slots: list[ImageSlot] = []
        grown = 0
        places = np.flatnonzero(ids == self.image_token_id)
        for place, image in zip(places, document.images, strict=True):
            cells = self.geometry.grid(image.height, image.width)
            rows, columns = self._output_grid(self.connector, cells)
            slots.append(ImageSlot(int(place) + grown, rows * columns, (rows, columns)))
            grown += rows * columns - 1
        return self._repeat(ids, ids, slots), slots

    def _repeat(self, ids: NDArray[np.int64], values: NDArray[Any], slots: list[ImageSlot]) -> Any:
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self.image_token_id] = [slot.length for slot in slots]
        return np.repeat(values, repeats)

    def _pixels(self, document: Document) -> list[NDArray[np.uint8]]:
        """The views of the document's images, uint8 [H, W, 3] each."""
        pixels = []
        for number, image in enumerate(document.images, start=1):
            try:
                pixels.append(self.geometry.preprocess(decode(image.data)))
            except DocumentError as error:
                raise DocumentError(f"image {number}: {error}") from error
        return pixels

    # -- identity, saving, loading ---------------------------------------------------------------

    @property
    def text_fingerprint(self) -> str:
        """A hash of what decides text token counts: tokenizer, chat template, the rule."""
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            str(self.tokenizer.chat_template),
            self.image_token,
            str(template.VERSION),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """A hash of what decides every sample: the text's and the images' part."""
        values = {"geometry": self.geometry.to_dict(), "connector": self.connector}
        text = self.text_fingerprint + json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the tokenizer's files and processor_config.json (last, atomically)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        values = {
            "geometry": self.geometry.to_dict(),
            "connector": self.connector,
            "image_token": self.image_token,
        }
        partial = folder / f"{_FILE}.partial"
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / _FILE)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, connector: dict[str, Any] | None = None, **kwargs: Any
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Args:
            folder: a stage's folder.
            connector: options of the connector to change, e.g. {"visual_tokens": 144}.
            kwargs: what AutoProcessor passes on; ignored.

        Raises:
            ValueError: the folder has no processor, or a file is damaged.
        """
        check_folder(folder, "processor")
        values = read_json(Path(folder) / _FILE)
        with loading("tokenizer", folder):
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        return cls(
            tokenizer,
            ImageGeometry.from_dict(values["geometry"]),
            changed_connector(values["connector"], connector or {}),
            values["image_token"],
        )


def changed_connector(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a saved connector's spec with options changed that need no other weights.

    Raises:
        ValueError: an option that cannot change after training, or another connector.
    """
    kind = choose(CONNECTORS, spec["name"], "connector")
    for name, value in changes.items():
        if name not in (*kind.OPTIONS, "name"):
            raise unknown(f"option of the connector {spec['name']}", name, kind.OPTIONS)
        if name not in kind.RELOADABLE and spec.get(name) != value:
            can = ", ".join(kind.RELOADABLE) or "none"
            raise ValueError(
                f"connector {name} is {spec.get(name)!r} in the saved model and cannot become "
                f"{value!r} without training anew (changeable: {can})"
            )
    return {**spec, **changes}
