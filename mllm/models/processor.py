"""From documents to samples and prompts: the one place that says how many tokens an image takes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from data_packing.document import Document, DocumentError
from data_packing.images import decode
from data_packing.sample import IGNORED, Cost, Sample
from mllm.models import template
from mllm.models.calls import Calls
from mllm.models.chat_template import with_images
from mllm.models.checks import check_tokenizer
from mllm.models.clips import thinned
from mllm.models.connectors import CONNECTORS
from mllm.models.errors import choose, loading, read_json, unknown
from mllm.models.expansion import Expander
from mllm.models.fusion import check_images as check_fusion
from mllm.models.fusion import fusion_class, needed_tokens
from mllm.models.geometry import Geometry, Layout, geometry_from_dict
from mllm.models.hub import HUB, hub_file
from mllm.models.image_processor import MultimodalImageProcessor
from mllm.models.images import NAMES
from mllm.models.native import LIMITS, bounded
from mllm.models.regions import REGION_TOKEN, STYLES, has_places, with_boxes
from mllm.models.rows import Rows
from mllm.models.template import ImageText, Template
from mllm.models.tiles import tiled
from mllm.models.turns import questions

_FILE = "processor_config.json"
IMAGE_TOKEN = "<image>"
_TOKENIZER = ("model_max_length", "padding_side", "truncation_side")
_OF_AUTO_CLASSES = {
    *("_commit_hash", "_from_auto", "_from_pipeline", "backend", "code_revision", "config"),
    *("trust_remote_code", "use_fast", *HUB, *LIMITS),
}
"""What transformers' Auto classes and pipelines pass on, which changes nothing here."""


class Processor(Calls, ProcessorMixin):  # type: ignore[misc]
    """Tokenizer, image geometry and connector geometry together; needs no model, can be pickled.

    Args:
        tokenizer: a fast tokenizer that has the image token.
        geometry: what the encoder wants to see.
        connector: the connector's `name` and options.
        image_token: the placeholder of one visual token.
        images: the `images:` section: how images are cut into tiles; empty for not at all.
        image_text: what is written for an image, around its token.
        fusion: the fusion's `name` and options; empty for in the sequence.

    Attributes:
        image_processor: the image half alone, as transformers' processors have it.

    Raises:
        ValueError: parts that do not fit, or a tokenizer without a token that is needed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        geometry: Geometry,
        connector: dict[str, Any],
        image_token: str = IMAGE_TOKEN,
        images: Mapping[str, Any] | None = None,
        image_text: ImageText | None = None,
        fusion: Mapping[str, Any] | None = None,
    ) -> None:
        self.connector, self.images = dict(connector), dict(images or {})
        self.fusion = dict(fusion or {})
        check_fusion(self.fusion, self.images)
        self.geometry = tiled(geometry, self.images)
        seen = MultimodalImageProcessor(self.geometry)
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"  # as generation needs rows
        super().__init__(seen, tokenizer, chat_template=tokenizer.chat_template)
        self.template = Template(tokenizer, image_token, image_text)
        with_images(tokenizer, self.template.image_text.asked)
        kind = choose(CONNECTORS, connector["name"], "connector")
        kind.check(connector)
        known = tokenizer.get_vocab()
        needed = needed_tokens(self.fusion, self.images)
        if missing := [token for token in needed if token not in known]:
            raise ValueError(f"images: the tokenizer has no token {missing[0]!r}")
        self.expander = Expander(
            self.geometry,
            partial(kind.output_grid, self.connector),
            self.template.image_id,
            known[REGION_TOKEN] if self._regions == "feature" else None,
            self.template.ids_of,
            fusion_class(self.fusion).layout,
        )
        self._reads_text = kind.reads_text(self.connector)
        kind.check_side(self.connector, self.geometry.most_cells)
        for size in self.geometry.extremes:
            self.layout(*size)
        self._check_regions(self.layout(*self.geometry.smallest))

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return what it is made of, as transformers asks."""
        return ["image_processor", "tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask", *NAMES]

    @property
    def chat_template(self) -> Any:
        """The tokenizer's: there is one for training, chat and export."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, value: Any) -> None:
        self.tokenizer.chat_template = value
        if hasattr(self, "template"):
            with_images(self.tokenizer, self.template.image_text.asked)
            self.template = Template(self.tokenizer, self.image_token, self.template.image_text)

    @property
    def _regions(self) -> str:
        """How boxes are written."""
        return str(self.images.get("regions") or STYLES[0])

    def _check_regions(self, layout: Layout) -> None:
        grids = [self.expander.output_grid(self.geometry.grid(*size)) for size in layout.sizes]
        if self._regions == "feature" and not has_places(grids):
            raise ValueError(
                f"images.regions: feature needs visual tokens that have places, and the connector "
                f"{self.connector['name']} makes a row of them; take decimals or thousandths"
            )

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
        document, kept = self._ready(document)
        written = self.template.write(document)
        expanded = self.expander.expand(written.ids, document)
        for slot, number in zip(expanded.slots, kept, strict=True):
            slot.image = number
        labels = np.where(written.learned, written.ids, IGNORED)
        return Sample(
            input_ids=expanded.ids,
            labels=expanded.unlearned(labels, IGNORED),
            slots=expanded.slots,
            pixels=self._pixels(document),
            order=expanded.order,
            bags=expanded.bags,
            asked=self._asked(document),
            source=document.source,
            key=document.key,
        )

    def cost(self, document: Document) -> Cost:
        """Return what the document and any slice of it cost in text tokens, by piece.

        The length of `encode` of a slice is the overhead, plus its pieces' text tokens, plus
        `image_cost` of their images. Frames that a clip's budget leaves out are in no piece.

        Raises:
            DocumentError: it cannot be used.
        """
        document, kept = self._ready(document)
        cost = self.template.cost(document)
        pieces = [(text, tuple(kept[one] for one in images)) for text, images in cost.pieces]
        return Cost(cost.overhead, tuple(pieces))

    def _asked(self, document: Document) -> list[NDArray[np.int64]]:
        """Ids of what is asked about each view, where the connector reads it."""
        if not self._reads_text:
            return []
        asked: list[NDArray[np.int64]] = []
        for image, question in zip(document.images, questions(document), strict=True):
            ids = np.array(self.template.ids_of(question), dtype=np.int64)
            asked += [ids] * len(self.layout(image.height, image.width).sizes)
        return asked

    def _ready(self, document: Document) -> tuple[Document, list[int]]:
        """Thin clips out and write boxes; also the numbers of the images that are kept."""
        document = with_boxes(document, self._regions)
        budget = self.images.get("clip_tokens")
        if budget is None:
            return document, [*range(len(document.images))]
        return thinned(
            document, budget, lambda image: self.image_cost(image.height, image.width)[0]
        )

    def image_cost(self, height: int, width: int) -> tuple[int, int]:
        """Return (language tokens, vision patches) of an image of this size in pixels."""
        return self.expander.tokens(height, width), self.layout(height, width).patches

    def image_bytes(self, height: int, width: int) -> int:
        """Return the bytes of the pixels that an image of this size becomes, in all its views."""
        return 3 * sum(high * wide for high, wide in self.geometry.view_sizes(height, width))

    def layout(self, height: int, width: int) -> Layout:
        """Return the views and the visual tokens of an image of this size in pixels."""
        return self.expander.layout(height, width)

    def prompt(self, document: Document) -> dict[str, Tensor]:
        """Return what `generate` takes for one document: see `prompts`."""
        return self.prompts([document])

    def prompts(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """Return what `generate` takes: left-padded rows and the views of all rows in order.

        A conversation ends with the user's turn; a raw document is left open to be continued.

        Returns:
            input_ids [B, T], attention_mask [B, T] and, if there is an image, pixels uint8 [P] of
            all views one after another and sizes int32 [V, 2], (height, width) of each; where
            visual tokens do not stand as they are made, order int64 [J] and bags int64 [K], and
            where the connector reads questions, asked int64 [V, L], see `Pack`.

        Raises:
            DocumentError: one of them cannot be used, or ends with an answer.
        """
        ready = [self._ready(document)[0] for document in documents]
        rows = Rows(padding_side="left")
        return self._batch([(self.template.prompt(one), one) for one in ready], rows)

    def _pixels(self, document: Document) -> list[NDArray[np.uint8]]:
        """The views of the document's images, uint8 [H, W, 3] each."""
        pixels: list[NDArray[np.uint8]] = []
        for number, image in enumerate(document.images, start=1):
            try:
                pixels += self.geometry.views(decode(image.data))
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
            *map(str, filter(None, self.template.image_text)),
            self._regions,
            *self._budget,
            str(template.VERSION),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def _budget(self) -> list[str]:
        """What decides which frames of a clip are written."""
        budget = self.images.get("clip_tokens")
        if budget is None:
            return []
        return [json.dumps([budget, self.geometry.to_dict(), self.images, self.connector])]

    @property
    def fingerprint(self) -> str:
        """A hash of what decides every sample: the text's and the images' part."""
        values = {
            "geometry": self.geometry.to_dict(),
            "images": self.images,
            "connector": self.connector,
            **({"fusion": self.fusion} if self.fusion else {}),
        }
        text = self.text_fingerprint + json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def cutting(self, images: Mapping[str, Any]) -> Self:
        """Return the same processor with images cut by another `images:` section."""
        geometry, text = geometry_from_dict(self.geometry.to_dict()), self.template.image_text
        token, fusion = self.image_token, self.fusion
        return type(self)(self.tokenizer, geometry, self.connector, token, images, text, fusion)

    def seeing(self, geometry: Geometry) -> Self:
        """Return the same processor for an encoder that wants to see something else."""
        token, images, text = self.image_token, self.images, self.template.image_text
        return type(self)(
            self.tokenizer, geometry, self.connector, token, images, text, self.fusion
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what processor_config.json holds."""
        return {
            "geometry": self.geometry.to_dict(),
            "images": self.images,
            "connector": self.connector,
            "fusion": self.fusion,
            "image_token": self.image_token,
            "image_text": self.template.image_text._asdict(),
            "image_processor": {"image_processor_type": type(self.image_processor).__name__},
        }

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the tokenizer's files and processor_config.json (last, atomically).

        Args:
            save_directory: the folder.
            push_to_hub: also send it to a hub.
            kwargs: for `push_to_hub`; its `repo_id` is the folder's name if left out.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        draft = folder / f"{_FILE}.partial"
        draft.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(draft, folder / _FILE)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / _FILE)]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        connector: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a stage's folder, or a hub's `owner/name`.
            connector: options of the connector to change, e.g. {"visual_tokens": 144}.
            kwargs: where files come from (`mllm.models.hub.HUB`); `padding_side` and others of the
                tokenizer; bounds of images of native resolution, e.g. `max_pixels`.

        Raises:
            ValueError: there is no processor, a file is damaged, or an argument is unknown.
        """
        path = pretrained_model_name_or_path
        where = {name: kwargs.pop(name) for name in HUB if kwargs.get(name) is not None}
        limits = {name: kwargs.pop(name) for name in LIMITS if kwargs.get(name) is not None}
        options = {name: kwargs.pop(name) for name in _TOKENIZER if name in kwargs}
        side = options.pop("padding_side", "left")
        pipelines = "_from_pipeline" in kwargs  # it hands the model's arguments to everything
        if (unused := kwargs.keys() - _OF_AUTO_CLASSES) and not pipelines:
            raise unknown("argument of the processor", min(unused), (*HUB, *LIMITS, *_TOKENIZER))
        values = read_json(hub_file(path, _FILE, "processor", **where))
        with loading("tokenizer", path):
            tokenizer = AutoTokenizer.from_pretrained(str(path), **where, **options)
        check_tokenizer(tokenizer, path)
        geometry = geometry_from_dict(values["geometry"])
        if limits:
            geometry = bounded(geometry, limits)
        made = cls(
            tokenizer,
            geometry,
            changed_connector(values["connector"], connector or {}),
            values["image_token"],
            values.get("images"),
            ImageText(**values["image_text"]) if "image_text" in values else None,
            values.get("fusion"),
        )
        made.tokenizer.padding_side = side
        return made


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
